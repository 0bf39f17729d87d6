// SPDX-License-Identifier: MIT
/*
 * Cases recorded from the authors' own code (facebookresearch/DiT, willisma/SiT under PyTorch), and of the bundled models from an independent network,
 * replayed. tests/golden/README.md says what they are.
 */
#include <dirent.h>

#include "core/engine/replay.h"
#include "tests/test.h"

struct golden { struct kern *k; struct replay *r; };

static struct golden open_golden(const char *backend, const char *model) {
    struct kern_config config = {.backend = backend, .threads = 2};
    char why[256] = "";
    struct golden g;
    struct err e = {0};
    if (kern_open(&g.k, &config, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s", why);
    CHECK_OK(replay_open(&g.r, g.k, model, 0, &e), &e);
    return g;
}

static void close_golden(struct golden *g) {
    replay_close(g->r);
    kern_close(g->k);
}

static void replay_one(struct golden *g, const char *path) {
    struct replay_result result;
    struct err e = {0};
    if (replay_case(g->r, path, &result, &e)) test_fail(__FILE__, __LINE__, "%s: %s", path, e.text);
    if (!result.finite || !(result.rel_l2 <= result.tolerance)) test_fail(__FILE__, __LINE__, "%s: relative L2 %g", path, result.rel_l2);
}

// Every case of a folder whose name holds `what`; at least `least` of them.
static void replay_folder(struct golden *g, const char *folder, const char *what, int least) {
    struct dirent **names;
    int n = scandir(folder, &names, NULL, alphasort), replayed = 0;
    CHECK(n > 0);
    for (int i = 0; i < n; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", folder, names[i]->d_name);
        if (strstr(names[i]->d_name, ".safetensors") && strstr(names[i]->d_name, what)) replay_one(g, path), replayed++;
        free(names[i]);
    }
    free(names);
    if (replayed < least) test_fail(__FILE__, __LINE__, "%d cases in %s, expected at least %d", replayed, folder, least);
}

TEST(golden_tiny_forward_reference) {
    struct golden g = open_golden("ref", "tests/golden/sit-tiny.safetensors");
    replay_one(&g, "tests/golden/sit-tiny.forward.safetensors");
    close_golden(&g);
}

TEST(golden_tiny_ode_reference) {
    struct golden g = open_golden("ref", "tests/golden/sit-tiny.safetensors");
    replay_folder(&g, "tests/golden/transport", "Linear.velocity.ode", 10);
    close_golden(&g);
}

TEST(golden_forward_cpu) {
    struct golden g = open_golden("cpu", "tests/golden/sit-tiny.safetensors");
    replay_one(&g, "tests/golden/sit-tiny.forward.safetensors");
    close_golden(&g);
}

TEST(golden_ode_cpu) {
    struct golden g = open_golden("cpu", "tests/golden/sit-tiny.safetensors");
    replay_folder(&g, "tests/golden/transport", ".ode.", 40);
    close_golden(&g);
}

TEST(golden_sde_cpu) {
    struct golden g = open_golden("cpu", "tests/golden/sit-tiny.safetensors");
    replay_folder(&g, "tests/golden/transport", ".sde.", 19);
    close_golden(&g);
}

// Recorded with the very weights that are bundled (make_bundled.py): what is trained anew is recorded anew.
TEST(golden_bundled_models) {
    static const char *const models[] = {"fashion-sit", "fashion-dit", "emoji-sit"};
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        char dir[64];
        snprintf(dir, sizeof dir, "deploy/models/%s", models[i]);
        struct golden g = open_golden("cpu", dir);
        replay_folder(&g, "tests/golden/bundled", models[i], 2);
        close_golden(&g);
    }
}

TEST(golden_dit_reference) {
    struct golden g = open_golden("ref", "tests/golden/dit-tiny.safetensors");
    replay_one(&g, "tests/golden/dit-tiny.forward.safetensors");
    replay_folder(&g, "tests/golden/dit", "ddpm", 4);
    close_golden(&g);
}

TEST(golden_dit_cpu) {
    struct golden g = open_golden("cpu", "tests/golden/dit-tiny.safetensors");
    replay_one(&g, "tests/golden/dit-tiny.forward.safetensors");
    replay_folder(&g, "tests/golden/dit", "dit.", 10);
    close_golden(&g);
}

TEST(golden_maskdit_reference) {
    struct golden g = open_golden("ref", "tests/golden/maskdit-tiny.safetensors");
    replay_one(&g, "tests/golden/maskdit-tiny.forward.safetensors");
    replay_folder(&g, "tests/golden/maskdit", "edm", 4);
    close_golden(&g);
}

TEST(golden_maskdit_cpu) {
    struct golden g = open_golden("cpu", "tests/golden/maskdit-tiny.safetensors");
    replay_one(&g, "tests/golden/maskdit-tiny.forward.safetensors");
    replay_folder(&g, "tests/golden/maskdit", "edm", 4);
    close_golden(&g);
}
