// SPDX-License-Identifier: MIT
// PyTorch's own numbers (Debian's 1.13, CPU) for images of 64: manual_seed(11); z = randn(5, 2, 4, 8), or z = randn(1, 2, 4, 8) and then
// randn(1 or 2, 2, 4, 8) a step, as the authors' scripts call it.
#include "core/diffusion/stream.h"
#include "tests/test.h"

static struct sampler_model path = {.kind = MODEL_PATH}, discrete = {.kind = MODEL_DISCRETE, .learned_variance = true},
                            edm = {.kind = MODEL_EDM, .sigma_data = 0.5};

static struct sampler_spec spec_of(enum sampler_type type, const struct sampler_model *m, double guidance) {
    struct sampler_spec s;
    sampler_defaults(&s, m, type);
    s.guidance = guidance;
    return s;
}

static void check_draw(struct stream *st, uint32_t draw, size_t numel, const double *want) {
    float x[64];
    stream_draw(st, draw, x);
    const float got[] = {x[0], x[1], x[numel - 2], x[numel - 1]};
    for (int i = 0; i < 4; i++) CHECK_NEAR((double)got[i], want[i], 1e-6);
}

TEST(stream_slices_of_one_randn) {
    struct sampler_spec s = spec_of(SAMPLER_ODE, &path, 4);
    struct stream st;
    stream_start(&st, &s, &path, 64, 11, 0);
    check_draw(&st, 0, 64, (const double[]){-0.51079756, 1.02827179, 0.569985271, 1.48411644});
    stream_start(&st, &s, &path, 64, 11, 3);
    check_draw(&st, 0, 64, (const double[]){-1.35785472, -1.01802897, -0.244104013, 0.128142148});
}

TEST(stream_steps_draw_for_both_halves) {
    struct sampler_spec s = spec_of(SAMPLER_SDE, &path, 4);
    struct stream st;
    stream_start(&st, &s, &path, 64, 11, 0);
    check_draw(&st, 0, 64, (const double[]){-0.51079756, 1.02827179, 0.569985271, 1.48411644});
    check_draw(&st, 1, 64, (const double[]){-1.45556903, 0.558226109, -1.17173827, 1.11464834});
    check_draw(&st, 2, 64, (const double[]){-1.35785472, -1.01802897, -0.244104013, 0.128142148});
    check_draw(&st, 4, 64, (const double[]){-0.888118207, 1.55844915, -0.473800421, 0.142592043}); // the third was not wanted
    s.guidance = 1;
    stream_start(&st, &s, &path, 64, 11, 0);
    check_draw(&st, 0, 64, (const double[]){-0.51079756, 1.02827179, 0.569985271, 1.48411644});
    check_draw(&st, 2, 64, (const double[]){-0.955421567, -1.00547123, 0.440835238, 2.07316899});
}

TEST(stream_edm_has_a_generator_an_image) {
    struct sampler_spec s = spec_of(SAMPLER_EDM, &edm, 1);
    struct stream st;
    stream_start(&st, &s, &edm, 64, 11, 3);
    check_draw(&st, 0, 64, (const double[]){-0.341786385, -0.095649451, 0.55702889, -1.51273012});
    stream_start(&st, &s, &edm, 36, 11, 3); // no multiple of sixteen
    check_draw(&st, 0, 36, (const double[]){-0.341786385, -0.095649451, -0.22400859, -0.818844676});
}

static void refused(const struct sampler_spec *s, const struct sampler_model *m, size_t numel, uint64_t first, uint64_t n, const char *param) {
    struct err e = {0};
    CHECK(stream_check(s, m, numel, first, n, &e) == E_RANGE);
    CHECK_STR(e.param, param);
}

TEST(stream_check_refuses) {
    struct sampler_spec ode = spec_of(SAMPLER_ODE, &path, 1), sde = spec_of(SAMPLER_SDE, &path, 1), ddpm = spec_of(SAMPLER_DDPM, &discrete, 1),
                        ddim = spec_of(SAMPLER_DDIM, &discrete, 1), heun = spec_of(SAMPLER_EDM, &edm, 1);
    struct err e = {0};
    CHECK_OK(stream_check(&ode, &path, 64, 1000, 24, &e), &e);
    refused(&ode, &path, 64, 1000, 25, "seed_index");
    refused(&ode, &path, 36, 0, 1, "rng");
    CHECK_OK(stream_check(&sde, &path, 64, 0, 1, &e), &e);
    refused(&sde, &path, 64, 0, 2, "rng");
    refused(&ddpm, &discrete, 64, 1, 1, "rng");
    CHECK_OK(stream_check(&ddim, &discrete, 64, 5, 3, &e), &e);
    ddim.eta = 0.5;
    refused(&ddim, &discrete, 64, 5, 3, "rng");
    CHECK_OK(stream_check(&heun, &edm, 36, 4000000000u, 10, &e), &e);
    heun.churn = 1;
    refused(&heun, &edm, 64, 0, 1, "rng");
    refused(&heun, &path, 64, 0, 1, "rng"); // no script of a SiT's or DiT's authors churns
    refused(&heun, &discrete, 64, 0, 1, "rng");
}
