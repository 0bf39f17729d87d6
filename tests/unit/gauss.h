// SPDX-License-Identifier: MIT
/*
 * gauss: data x1 ~ N(mu, s^2), element by element, for which everything a network could predict is known in closed form.
 *
 * x_t ~ N(alpha mu, P), P = alpha^2 s^2 + sigma^2; E[x1 | x] = mu + alpha s^2 (x - alpha mu)/P; E[x0 | x] = sigma (x - alpha
 * mu)/P.
 */
#ifndef GAUSS_H
#define GAUSS_H
#include <math.h>

#include "tests/unit/f64_exec.h"

struct gauss {
    struct sampler_model model;
    double mu, s;
};

static inline double gauss_var(const struct gauss *g, const struct path_at *at) {
    return at->alpha * at->alpha * g->s * g->s + at->sigma * at->sigma;
}
static inline double gauss_data(const struct gauss *g, const struct path_at *at, double x) {
    return g->mu + at->alpha * g->s * g->s * (x - at->alpha * g->mu) / gauss_var(g, at);
}
static inline double gauss_score(const struct gauss *g, const struct path_at *at, double x) {
    return -(x - at->alpha * g->mu) / gauss_var(g, at);
}
static inline double gauss_noise(const struct gauss *g, const struct path_at *at, double x) {
    return -at->sigma * gauss_score(g, at, x);
}
static inline double gauss_velocity(const struct gauss *g, const struct path_at *at, double x) {
    double turn = at->sigma > 0 ? at->d_sigma * gauss_noise(g, at, x) : 0;
    if (at->kind == PATH_VP)
        turn = -at->alpha * at->alpha * at->var * -gauss_score(g, at, x); // sigma' sigma = -alpha^2 beta/2, finite at 1
    return at->d_alpha * gauss_data(g, at, x) + turn;
}

static inline void gauss_net(void *ctx, const struct sampler_step *st, const double *x, double *f, int n) {
    const struct gauss *g = ctx;
    struct path_at at;
    path_eval(g->model.path, st->t, &at);
    for (int e = 0; e < n; e++)
        f[e] = g->model.prediction == PRED_VELOCITY ? gauss_velocity(g, &at, x[e])
               : g->model.prediction == PRED_NOISE  ? gauss_noise(g, &at, x[e])
                                                    : gauss_score(g, &at, x[e]);
}

#endif
