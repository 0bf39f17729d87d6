// SPDX-License-Identifier: MIT
// A recorded autoencoder case: latents that are not square, three widths, shortcuts both ways.
#include "core/engine/replay.h"
#include "tests/test.h"

static void replay_vae_case(const char *backend) {
    struct kern_config config = {.backend = backend, .threads = 2};
    struct replay_result result;
    struct kern *k;
    struct replay *r;
    char why[256] = "";
    struct err e = {0};
    if (kern_open(&k, &config, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s", why);
    CHECK_OK(replay_open(&r, k, "tests/golden/vae-small", 0, &e), &e);
    CHECK_OK(replay_case(r, "tests/golden/vae-small.golden.safetensors", &result, &e), &e);
    CHECK(result.finite && result.tolerance <= 1e-5);
    if (!(result.rel_l2 <= result.tolerance)) test_fail(__FILE__, __LINE__, "relative L2 %g", result.rel_l2);
    CHECK(replay_case(r, "tests/golden/sit-tiny.forward.safetensors", &result, &e) == E_CONFLICT); // no network is in it
    CHECK_STR(e.param, "kind");
    replay_close(r);
    kern_close(k);
}

TEST(golden_vae_reference) { replay_vae_case("ref"); }
TEST(golden_vae_cpu) { replay_vae_case("cpu"); }
TEST(golden_vae_cpu_avx2) {
    setenv("ONEDNN_MAX_CPU_ISA", "AVX2", 1);
    replay_vae_case("cpu");
}
