// SPDX-License-Identifier: MIT
/*
 * The product abar is walked from 0 each time it is wanted, a microsecond at most, beside a network's milliseconds: so there is
 * no table to make, to share or to keep right.
 */
#include "core/diffusion/schedule.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#define LAST (SCHEDULE_TIMES - 1)

static const char *const names[SPACING_COUNT] = {"openai", "ddim", "leading", "trailing"};

const char *spacing_name(int i) { return i >= 0 && i < SPACING_COUNT ? names[i] : "?"; }

int spacing_parse(const char *s) {
    for (int i = 0; s && i < SPACING_COUNT; i++)
        if (strcmp(names[i], s) == 0) return i;
    return -1;
}

static double beta(int k) { return k == LAST ? 0.02 : 0.0001 + k * ((0.02 - 0.0001) / LAST); }

double schedule_abar(int k) {
    double abar = 1;
    for (int i = 0; i <= k; i++) abar *= 1 - beta(i);
    return abar;
}

/* which times are visited */

static int ddim_stride(int n) { // the least one that gives n times, or 0
    for (int s = 1; s <= LAST; s++)
        if ((LAST + s) / s == n) return s;
    return 0;
}

bool schedule_has(enum spacing spacing, int n) {
    return n >= 1 && n <= SCHEDULE_TIMES && (spacing != SPACING_DDIM || ddim_stride(n) > 0);
}

// The stride is added up as respace.py does, so that its rounding errors fall on the same side of a half.
static int openai_time(int n, int i) {
    double at = 0, stride = n > 1 ? (double)LAST / (n - 1) : 1;
    for (int j = 0; j < i; j++) at += stride;
    return (int)nearbyint(at);
}

// numpy.arange(1000, 0, -1000/n) adds multiples of the difference of its first two points, which decides some halves.
static int trailing_time(int n, int i) {
    double second = SCHEDULE_TIMES - (double)SCHEDULE_TIMES / n, delta = second - SCHEDULE_TIMES;
    return (int)nearbyint(SCHEDULE_TIMES + (n - 1 - i) * delta) - 1;
}

int schedule_time(enum spacing spacing, int n, int i) {
    switch (spacing) {
    case SPACING_DDIM:
        return i * ddim_stride(n);
    case SPACING_LEADING:
        return i * (SCHEDULE_TIMES / n);
    case SPACING_TRAILING:
        return trailing_time(n, i);
    default:
        return openai_time(n, i);
    }
}

/* between the times */

static double log_ratio(double abar) { return (log(abar) - log1p(-abar)) / 2; } // of alpha/sigma

void schedule_at(double time, double *alpha, double *sigma) {
    int k = (int)fmin(fmax(floor(time), 0), LAST - 1);
    double abar = schedule_abar(k), next = abar * (1 - beta(k + 1)), a = log_ratio(abar), b = log_ratio(next);
    double l = a + (b - a) * fmin(fmax(time - k, 0), 1);
    *alpha = 1 / sqrt(1 + exp(-2 * l));
    *sigma = 1 / sqrt(1 + exp(2 * l));
}

double schedule_find(double alpha, double sigma) {
    double ratio = alpha / sigma, here = 1 - beta(0), before = here;
    int k = 0;
    while (k < LAST && here > ratio * ratio * (1 - here)) before = here, here *= 1 - beta(++k);
    if (k == 0) return 0; // sigma 0 among these: here > infinity is false
    double a = log_ratio(before), b = log_ratio(here), l = log(ratio);
    return fmin(k - 1 + (l - a) / (b - a), LAST);
}

double schedule_least(void) { return exp(log_ratio(schedule_abar(LAST))); }
double schedule_most(void) { return exp(log_ratio(schedule_abar(0))); }
