// SPDX-License-Identifier: MIT
// Philox: the integers against the known answers that ship with Random123, the normals against libm and against their moments.
#include "kernels/philox.h"
#include "tests/test.h"

TEST(philox_known_answers) {
    static const uint32_t kat[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1},
    };
    for (int i = 0; i < 3; i++) {
        uint32_t c[4];
        memcpy(c, kat[i], sizeof c);
        philox_rounds(c, kat[i][4], kat[i][5]);
        CHECK(memcmp(c, kat[i] + 6, sizeof c) == 0);
    }
}

// Every 2^10-th bit pattern and both ends: relative error of the pieces against double libm.
TEST(philox_pieces_are_accurate) {
    double worst_log = 0, worst_cs = 0, worst_unit = 0;
    for (uint64_t i = 0; i <= 1 << 22; i++) {
        uint32_t x = i == 1 << 22 ? ~0u : (uint32_t)(i << 10);
        float uf = fmaf((float)(int32_t)(x >> 1), 0x1p-31f, 0x1p-32f), c, s;
        double l = -2 * log((double)uf), got = (double)philox_minus2_log(x);
        CHECK(got >= 0);
        if (l > 0) worst_log = fmax(worst_log, fabs(got - l) / l);
        philox_cos_sin(x, &c, &s);
        double angle = 1.5707963267948966 * ((double)(x >> 30) + ((double)(x & 0x3fffffffu) - 0x1p29 + 0.5) * 0x1p-30);
        worst_cs = fmax(worst_cs, fmax(fabs((double)c - cos(angle)), fabs((double)s - sin(angle))));
        worst_unit = fmax(worst_unit, fabs((double)c * (double)c + (double)s * (double)s - 1));
    }
    CHECK_NEAR(worst_log, 0, 4e-7);
    CHECK_NEAR(worst_cs, 0, 2e-7);
    CHECK_NEAR(worst_unit, 0, 4e-7);
}

TEST(philox_normals_have_the_right_moments) {
    enum { N = 1 << 22 };
    double m[5] = {0}, lag = 0, prev = 0;
    int beyond[3] = {0}; // |z| > 1, 2, 3
    for (uint32_t b = 0; b < N / 4; b++) {
        float z[4];
        philox_normal4(12345, 6, 7, b, z);
        for (int i = 0; i < 4; i++) {
            double v = (double)z[i], p = 1;
            for (int k = 0; k < 5; k++, p *= v) m[k] += p;
            for (int k = 0; k < 3; k++) beyond[k] += fabs(v) > k + 1;
            lag += v * prev;
            prev = v;
        }
    }
    double sd = 1 / sqrt((double)N);
    CHECK_NEAR(m[1] / N, 0, 4 * sd);
    CHECK_NEAR(m[2] / N, 1, 4 * sqrt(2) * sd);
    CHECK_NEAR(m[3] / N, 0, 4 * sqrt(15) * sd);
    CHECK_NEAR(m[4] / N, 3, 4 * sqrt(96) * sd);
    CHECK_NEAR(lag / N, 0, 4 * sd);
    static const double tail[3] = {0.31731050786291, 0.04550026389636, 0.00269979606326};
    for (int k = 0; k < 3; k++) CHECK_NEAR((double)beyond[k] / N, tail[k], 4 * sqrt(tail[k]) * sd);
}

TEST(philox_streams_differ_in_every_coordinate) {
    float z = philox_normal(1, 2, 3, 4);
    CHECK(philox_normal(1, 2, 3, 4) == z);
    CHECK(philox_normal(2, 2, 3, 4) != z && philox_normal(1ull << 32 | 1, 2, 3, 4) != z);
    CHECK(philox_normal(1, 3, 3, 4) != z && philox_normal(1, 2, 4, 4) != z && philox_normal(1, 2, 3, 8) != z);
    float all[4];
    philox_normal4(1, 2, 3, 1, all);
    for (uint32_t i = 0; i < 4; i++) CHECK(philox_normal(1, 2, 3, 4 + i) == all[i]);
}

// The bytes themselves: a change of these numbers changes every picture ever promised by a seed.
TEST(philox_normals_are_pinned) {
    static const uint32_t want[8] = {0xbf0c807f, 0x3f52be8a, 0x3ef93184, 0x400efc1c,
                                     0x3d3f076e, 0x3e19bc46, 0xbf0d311d, 0x3f81bb5b};
    for (uint32_t i = 0; i < 8; i++) CHECK(philox_float_bits(philox_normal(42, 0, 0, i)) == want[i]);
}
