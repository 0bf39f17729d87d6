// SPDX-License-Identifier: MIT
/*
 * Closed forms instead of the general formula wherever the general one is 0/0 or infinity - infinity at an end:
 *
 *   linear  V = (1-t)/t                     V/sigma = 1/t
 *   GVP     V = ratio = (pi/2) sigma/alpha  V/sigma = (pi/2)/alpha     (sigma^2 + alpha^2 = 1)
 *   VP      V = ratio = beta/2              V/sigma = beta/(2 sigma)
 *
 * so a velocity model's score is -x at t = 0 of linear and GVP (not 0 times infinity), a VP velocity model's score 2v/beta - x is
 * finite at both ends, and a noise model's velocity on linear and GVP is finite at t = 1. What is left infinite is infinite in
 * truth: 1/alpha at t = 0 of linear and GVP, 1/sigma at t = 1.
 */
#include "core/diffusion/path.h"

#include <math.h>
#include <strings.h>

#define BETA_MIN 0.1
#define BETA_MAX 20.0
static const double half_pi = 1.57079632679489661923;

static const char *const path_names[PATH_COUNT] = { "linear", "gvp", "vp" };
static const char *const prediction_names[PRED_COUNT] = { "velocity", "noise", "score" };

static const char *name_at(const char *const *names, int n, int i) { return i >= 0 && i < n ? names[i] : "?"; }

static int index_of(const char *const *names, int n, const char *s) {
    for (int i = 0; s && i < n; i++)
        if (strcasecmp(names[i], s) == 0) return i;
    return -1;
}

const char *path_name(enum path_kind k) { return name_at(path_names, PATH_COUNT, (int)k); }
const char *prediction_name(enum prediction p) { return name_at(prediction_names, PRED_COUNT, (int)p); }
int path_parse(const char *s) { return index_of(path_names, PATH_COUNT, s); }
int prediction_parse(const char *s) { return index_of(prediction_names, PRED_COUNT, s); }

static void linear_eval(double t, struct path_at *at) {
    at->alpha = t;
    at->sigma = 1 - t;
    at->d_alpha = 1;
    at->d_sigma = -1;
    at->ratio = 1 / t;
    at->var = (1 - t) / t;
}

static void gvp_eval(double t, struct path_at *at) {
    at->alpha = sin(half_pi * t);
    at->sigma = sin(half_pi * (1 - t)); // the cosine, exactly 0 at t = 1
    at->d_alpha = half_pi * at->sigma;
    at->d_sigma = -half_pi * at->alpha;
    at->ratio = half_pi * at->sigma / at->alpha;
    at->var = at->ratio;
}

static void vp_eval(double t, struct path_at *at) {
    double u = 1 - t;
    double log_alpha = -u * u * (BETA_MAX - BETA_MIN) / 4 - u * BETA_MIN / 2;
    double half_beta = (BETA_MIN + u * (BETA_MAX - BETA_MIN)) / 2; // the derivative of log_alpha
    at->alpha = exp(log_alpha);
    at->sigma = sqrt(-expm1(2 * log_alpha));
    at->d_alpha = at->alpha * half_beta;
    at->d_sigma = -at->alpha * at->alpha * half_beta / at->sigma;
    at->ratio = half_beta;
    at->var = half_beta;
}

void path_eval(enum path_kind k, double t, struct path_at *at) {
    at->kind = k;
    at->t = t;
    if (k == PATH_LINEAR) linear_eval(t, at);
    else if (k == PATH_GVP) gvp_eval(t, at);
    else vp_eval(t, at);
}

// VP: ln(1 + sigma^2/alpha^2) = -2 log alpha(t) = (BETA_MAX - BETA_MIN) u^2/2 + BETA_MIN u with u = 1 - t; the root written
// without cancellation at u = 0.
static double vp_time(double alpha, double sigma) {
    double ratio = sigma / alpha;
    if (isinf(ratio)) return 0;
    double y = ratio < 1e150 ? log1p(ratio * ratio) : 2 * log(ratio);
    double u = 2 * y / (BETA_MIN + sqrt(BETA_MIN * BETA_MIN + 2 * (BETA_MAX - BETA_MIN) * y));
    return u < 1 ? 1 - u : 0;
}

double path_time(enum path_kind k, double alpha, double sigma) {
    if (k == PATH_LINEAR) return alpha / (alpha + sigma);
    if (k == PATH_GVP) return atan2(alpha, sigma) / half_pi;
    return vp_time(alpha, sigma);
}

double path_var_over_sigma(const struct path_at *at) {
    if (at->kind == PATH_LINEAR) return 1 / at->alpha;
    if (at->kind == PATH_GVP) return half_pi / at->alpha;
    return at->var / at->sigma;
}

struct lin path_velocity(const struct path_at *at, enum prediction p) {
    switch (p) {
    case PRED_NOISE: return (struct lin){ at->ratio, -path_var_over_sigma(at) };
    case PRED_SCORE: return (struct lin){ at->ratio, at->var };
    default: return (struct lin){ 0, 1 };
    }
}

struct lin path_noise(const struct path_at *at, enum prediction p) {
    if (p == PRED_NOISE) return (struct lin){ 0, 1 };
    if (p == PRED_SCORE) return (struct lin){ 0, -at->sigma };
    if (at->kind == PATH_LINEAR) return (struct lin){ 1, -at->t };
    if (at->kind == PATH_GVP) return (struct lin){ at->sigma, -at->alpha / half_pi };
    return (struct lin){ at->sigma, -at->sigma / at->var };
}

struct lin path_score(const struct path_at *at, enum prediction p) {
    if (p == PRED_SCORE) return (struct lin){ 0, 1 };
    if (p == PRED_VELOCITY && at->kind == PATH_VP) return (struct lin){ -1, 1 / at->var };
    if (p == PRED_VELOCITY && at->kind == PATH_GVP) return (struct lin){ -1, at->alpha / (half_pi * at->sigma) };
    struct lin e = path_noise(at, p);
    return (struct lin){ -e.x / at->sigma, -e.f / at->sigma };
}

struct lin path_data(const struct path_at *at, enum prediction p) {
    if (p == PRED_NOISE) return (struct lin){ 1 / at->alpha, -at->sigma / at->alpha };
    if (p == PRED_SCORE) return (struct lin){ 1 / at->alpha, at->sigma * at->sigma / at->alpha };
    if (at->kind == PATH_LINEAR) return (struct lin){ 1, at->sigma };
    if (at->kind == PATH_GVP) return (struct lin){ at->alpha, at->sigma / half_pi };
    return (struct lin){ at->alpha, at->sigma * at->sigma / (at->var * at->alpha) };
}
