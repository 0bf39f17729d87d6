// SPDX-License-Identifier: MIT
/*
 * schedule: the discrete-time schedule that DiT was trained on, and which of its times a sampler visits.
 *
 * Times k = 0 (almost data) .. 999 (almost noise): x_k = sqrt(abar_k) x1 + sqrt(1 - abar_k) x0, abar the running product of 1 -
 * beta, beta linear from 1e-4 to 0.02 (DiT diffusion/gaussian_diffusion.py, respace.py; diffusers' DDIMScheduler). Times between
 * are reached by interpolating the logarithm of the signal-to-noise ratio. Double precision, pure functions, any thread.
 */
#ifndef SITD_SCHEDULE_H
#define SITD_SCHEDULE_H
#include <stdbool.h>

#define SCHEDULE_TIMES 1000

enum spacing { SPACING_OPENAI, SPACING_DDIM, SPACING_LEADING, SPACING_TRAILING, SPACING_COUNT };
const char *spacing_name(int);   // "openai", "ddim", "leading", "trailing"
int spacing_parse(const char *); // index or -1

double schedule_abar(int k); // 1 for k < 0
// Time number i of n, ascending (the sampler goes from n-1 to 0):
//   openai    round(i 999/(n-1)), halves to even; n = 1: time 0
//   ddim      i times the least whole stride s with n = ceil(1000/s); not every n has one
//   leading   i (1000/n), whole division
//   trailing  1000 - (n-i-1) 1000/n, rounded, less 1
int schedule_time(enum spacing, int n, int i);
bool schedule_has(enum spacing, int n); // is there such a spacing of n times?

// alpha and sigma at a time from 0 to 999, whole or not; and the time at which they have this ratio (beyond the ends: the end).
void schedule_at(double time, double *alpha, double *sigma);
double schedule_find(double alpha, double sigma);
// alpha/sigma at time 999 and at time 0: 0.0064 and 99.99.
double schedule_least(void);
double schedule_most(void);

#endif
