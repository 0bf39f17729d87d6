// SPDX-License-Identifier: MIT
// Clipping and learned variance of the row update, by numbers worked out beforehand; and the exponential behind it.
#include <math.h>

#include "kernels/exp.h"
#include "kernels/kern.h"
#include "tests/test.h"

TEST(exp_is_accurate) { // against libm's double; its ends; a NaN stays one
    double worst = 0;
    for (int i = -870000; i <= 880000; i += 7) {
        float x = (float)i * 1e-4f;
        double want = exp((double)x), got = (double)kern_expf(x);
        if (fabs(got / want - 1) > worst) worst = fabs(got / want - 1);
    }
    if (getenv("SITD_TEST_PRINT")) printf("    worst relative error %.3g\n", worst);
    CHECK(worst < 1.2e-7);
    CHECK(kern_expf(0) == 1 && kern_expf(-0.0f) == 1 && isinf(kern_expf(88.1f)) && kern_expf(-87.1f) == 0);
    CHECK(isinf(kern_expf(INFINITY)) && kern_expf(-INFINITY) == 0 && kern_expf(1e30f) > 0 && isnan(kern_expf(NAN)));
}

static const char *const names[] = {"ref", "cpu"};

static struct kern *opened(const char *name, float **cols, float **out, size_t floats) {
    struct kern_config config = {.backend = name, .threads = 1};
    struct kern *k;
    void *a, *b;
    CHECK(kern_open(&k, &config, NULL, 0) == 0);
    CHECK(k->alloc(k, KERN_COLS * floats * sizeof(float), &a) == 0 && k->alloc(k, 8 * floats * sizeof(float), &b) == 0);
    *cols = a;
    *out = b;
    return k;
}

static void closed(struct kern *k, float *cols, float *out) {
    k->free(k, cols);
    k->free(k, out);
    kern_close(k);
}

TEST(row_update_clips) { // D = clamp(2 x - F): inside, above, below, and a NaN
    static const float x[] = {0.25f, 3, -3, 0}, f[] = {0.75f, 1, 1, NAN}, want[] = {-0.25f, 1, -1};
    for (int b = 0; b < 2; b++) {
        float *cols, *out;
        struct kern *k = opened(names[b], &cols, &out, 4);
        for (int i = 0; i < 4; i++) cols[i] = x[i], out[i] = f[i];
        struct kern_row_update u = {.row_u = -1, .n = 2, .clip = {.c = {2}, .c_out = -1}};
        u.assign[0] = (struct kern_assign){.dst = 0, .c_clip = 1};
        u.assign[1] = (struct kern_assign){.dst = 1, .c = {10}, .c_clip = 0.5f};
        CHECK(k->row_update(k, cols, 4, 4, out, 4, NULL, &u, 1) == 0);
        for (int i = 0; i < 3; i++) CHECK(cols[i] == want[i] && cols[4 + i] == 10 * x[i] + 0.5f * want[i]);
        CHECK(isnan(cols[3]) && isnan(cols[7]));
        closed(k, cols, out);
    }
}

// Two channels of 70 elements: the network puts out four, guided are the first three, so the noise of channel 0 follows the guided
// logit and that of channel 1 the conditional row's own.
TEST(row_update_scales_noise_by_the_learned_variance) {
    enum { PLANE = 70, N = 2 * PLANE };
    for (int b = 0; b < 2; b++) {
        float *cols, *out, noise[N];
        struct kern *k = opened(names[b], &cols, &out, N);
        for (int i = 0; i < N; i++) noise[i] = (float)(i % 5) - 2;
        for (int i = 0; i < N; i++) out[i] = out[2 * N + i] = 1000; // the prediction: not wanted
        for (int i = 0; i < N; i++) out[N + i] = 1, out[3 * N + i] = 0;
        struct kern_row_update u = {.row_c = 0, .row_u = 1, .row_rest = 0, .scale = 3, .guided = 3, .learned = 1, .n = 1};
        u.log_lo = -2;
        u.log_span = 0.5f;
        u.assign[0] = (struct kern_assign){.dst = 0, .c_noise = 2};
        CHECK(k->row_update(k, cols, N, PLANE, out, 2 * N, noise, &u, 1) == 0);
        for (int i = 0; i < N; i++) { // v = 0 + 3 (1 - 0) = 3 guided, 1 not: f = 2 and 1
            double want = 2 * (double)noise[i] * exp(-2 + 0.5 * (i < PLANE ? 2 : 1));
            CHECK_NEAR((double)cols[i], want, 3e-7 * (1 + fabs(want)));
        }
        closed(k, cols, out);
    }
}
