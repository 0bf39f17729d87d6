// SPDX-License-Identifier: MIT
// The discrete schedule and its spacings, against numbers of the authors' code and of Python's own round, range and numpy.arange.
#include <math.h>
#include <stdint.h>

#include "core/diffusion/schedule.h"
#include "tests/test.h"

TEST(schedule_golden) {
    CHECK_NEAR(schedule_abar(0), 0.9999, 1e-15);
    CHECK_NEAR(schedule_abar(1), 0.99978009207, 5e-12);
    CHECK_NEAR(schedule_abar(499), 0.078587242882, 5e-13);
    CHECK_NEAR(schedule_abar(998), 4.1181936e-5, 5e-13);
    CHECK_NEAR(schedule_abar(999), 4.0358298e-5, 5e-13);
    CHECK(schedule_abar(-1) == 1);
    CHECK_NEAR(schedule_least(), 0.00635, 5e-6);
    CHECK_NEAR(schedule_most(), 99.995, 1e-3);
}

static void times_are(enum spacing s, int n, const int *at, const int *want, int count) {
    for (int i = 0; i < count; i++)
        if (schedule_time(s, n, at[i]) != want[i])
            test_fail(__FILE__, __LINE__, "%s %d, number %d: %d, not %d", spacing_name((int)s), n, at[i], schedule_time(s, n, at[i]), want[i]);
}

#define TIMES(s, n, at, ...) times_are(s, n, (const int[])at, (const int[])__VA_ARGS__, (int)(sizeof((int[])__VA_ARGS__) / sizeof(int)))
#define LIST(...) {__VA_ARGS__}

TEST(schedule_spacings_golden) {
    TIMES(SPACING_OPENAI, 250, LIST(0, 1, 2, 247, 248, 249), {0, 4, 8, 991, 995, 999});
    TIMES(SPACING_OPENAI, 50, LIST(0, 1, 2, 3, 4, 5, 6, 7, 48, 49), {0, 20, 41, 61, 82, 102, 122, 143, 979, 999});
    TIMES(SPACING_OPENAI, 7, LIST(0, 1, 2, 3, 4, 5, 6), {0, 166, 333, 500, 666, 832, 999}); // halves to even
    TIMES(SPACING_OPENAI, 4, LIST(0, 1, 2, 3), {0, 333, 666, 999});
    TIMES(SPACING_OPENAI, 1, LIST(0), {0});
    TIMES(SPACING_DDIM, 50, LIST(0, 1, 49), {0, 20, 980});
    TIMES(SPACING_DDIM, 25, LIST(0, 1, 24), {0, 40, 960});
    TIMES(SPACING_LEADING, 50, LIST(0, 49), {0, 980});
    TIMES(SPACING_TRAILING, 50, LIST(0, 1, 49), {19, 39, 999});
}

TEST(schedule_spacings_are_pythons) { // all times of all counts, as a checksum made by a Python script
    static const uint32_t want[SPACING_COUNT] = {3377794890u, 529941717u, 1077524002u, 2201570406u};
    for (int s = 0; s < SPACING_COUNT; s++) {
        uint32_t sum = 0;
        int counts = 0;
        for (int n = 1; n <= SCHEDULE_TIMES; n++) {
            if (!schedule_has((enum spacing)s, n)) continue;
            counts++;
            for (int i = 0, before = -1; i < n; i++) {
                int t = schedule_time((enum spacing)s, n, i);
                CHECK(t > before && t < SCHEDULE_TIMES);
                before = t;
                sum = sum * 1000003u + (uint32_t)(t * (i + 1) + n);
            }
        }
        CHECK(counts == (s == SPACING_DDIM ? 62 : 1000));
        CHECK(sum == want[s]);
    }
    CHECK(!schedule_has(SPACING_OPENAI, 0) && !schedule_has(SPACING_TRAILING, 1001) && !schedule_has(SPACING_DDIM, 37));
    for (int s = 0; s < SPACING_COUNT; s++) CHECK(spacing_parse(spacing_name(s)) == s);
    CHECK(spacing_parse("") == -1 && spacing_parse(NULL) == -1);
}

TEST(schedule_find_inverts) { // whole times, times between, and the ends beyond
    for (int i = 0; i <= 999 * 4; i++) {
        double time = i / 4.0, a, s;
        schedule_at(time, &a, &s);
        CHECK_NEAR(a * a + s * s, 1, 1e-14);
        if (i % 4 == 0) CHECK_NEAR(a * a, schedule_abar(i / 4), 1e-13);
        CHECK_NEAR(schedule_find(a, s), time, 1e-8);
        CHECK_NEAR(schedule_find(3 * a, 3 * s), time, 1e-8); // of a ratio, whatever its size
    }
    CHECK(schedule_find(1, 0) == 0 && schedule_find(1000, 1) == 0 && schedule_find(0, 1) == 999 && schedule_find(1e-9, 1) == 999);
}
