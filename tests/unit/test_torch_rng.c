// SPDX-License-Identifier: MIT
// PyTorch's own numbers (1.13 and 2.x, CPU), the calls in their order.
#include "core/diffusion/torch_rng.h"
#include "tests/test.h"

static void near(const float *x, const double *want, int n) {
    for (int i = 0; i < n; i++) CHECK_NEAR((double)x[i], want[i], 5e-7);
}

TEST(torch_rng_golden) {
    struct torch_rng r;
    float x[1024];
    static const int ints[] = {56, 868, 794, 33, 126, 119, 391, 254};
    torch_rng_seed(&r, 0);
    torch_rng_normals(&r, x, 16);
    near(x, (const double[]){-1.1258398, -1.1523602, -0.25057858, -0.43387881}, 4);
    for (int i = 0; i < 8; i++) CHECK(torch_rng_below(&r, 1000) == (uint64_t)ints[i]);
    torch_rng_seed(&r, 42);
    torch_rng_normals(&r, x, 1024);
    near(x, (const double[]){1.9269153, 1.4872841, 0.9007172}, 3);
    torch_rng_seed(&r, ((uint64_t)1 << 32) + 42); // the low 32 bits count
    torch_rng_normals(&r, x, 3);
    near(x, (const double[]){0.3366904, 0.1288094, 0.2344624}, 3);
}

TEST(torch_rng_calls_follow_each_other) { // manual_seed(7): randn(3), randn(4), randn(2), randint(2**33, (3,)), rand(2), randn(17)
    struct torch_rng r;
    float x[17];
    static const uint64_t wide[] = {3731473840u, 5715911047u, 1687674368u};
    torch_rng_seed(&r, 7);
    torch_rng_normals(&r, x, 3); // an odd number: the second of a pair waits for the next call
    near(x, (const double[]){-0.1467950940132141, 0.7861412763595581, 0.9468216300010681}, 3);
    torch_rng_normals(&r, x, 4);
    near(x, (const double[]){-1.1143440008163452, 1.6907901763916016, -0.8948279023170471, -0.3556250333786011}, 4);
    torch_rng_normals(&r, x, 2);
    near(x, (const double[]){1.2323857545852661, 0.13817265629768372}, 2);
    for (int i = 0; i < 3; i++) CHECK(torch_rng_below(&r, (uint64_t)1 << 33) == wide[i]);
    torch_rng_uniforms(&r, x, 2);
    near(x, (const double[]){0.8797041773796082, 0.6285890936851501}, 2);
    torch_rng_normals(&r, x, 17); // the last sixteen are drawn again
    near(x + 14, (const double[]){-0.4375407099723816, -2.1085333824157715, 1.1450074911117554}, 3);
}

TEST(torch_rng_words) { // the tenth thousand of MT19937 seeded with 5489, as its authors and C++ give it
    struct torch_rng r;
    uint32_t y = 0;
    torch_rng_seed(&r, 5489);
    for (int i = 0; i < 10000; i++) y = torch_rng_next(&r);
    CHECK(y == 4123659995u);
}
