// SPDX-License-Identifier: MIT
// clock: seconds of a clock that is never set. Any thread, signal handlers too.
#ifndef SITD_CLOCK_H
#define SITD_CLOCK_H
#include <time.h>

static inline double clock_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#endif
