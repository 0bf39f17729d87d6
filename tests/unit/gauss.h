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
    int times[1000], n; // the visited times of a schedule, ascending, where ddpm asks for its exact variance (gauss_net)
};

static inline struct gauss gauss_path(enum path_kind path, enum prediction prediction, double mu, double s) {
    return (struct gauss){.model = {.path = path, .prediction = prediction}, .mu = mu, .s = s};
}

// Every kind of network: path models by path and prediction, then discrete, then edm.
#define GAUSS_MODELS (PATH_COUNT * PRED_COUNT + 2)
static inline struct gauss gauss_model(int i, double mu, double s) {
    if (i < PATH_COUNT * PRED_COUNT) return gauss_path((enum path_kind)(i / PRED_COUNT), (enum prediction)(i % PRED_COUNT), mu, s);
    struct gauss g = {.mu = mu, .s = s};
    g.model.kind = i == PATH_COUNT * PRED_COUNT ? MODEL_DISCRETE : MODEL_EDM;
    g.model.sigma_data = 0.5;
    return g;
}

// Sets a form of w_t with what it needs besides its name. False where the model cannot have it.
static inline bool gauss_w_t(struct sampler_spec *spec, struct sampler_model *m, enum w_form form) {
    spec->w_t = form;
    spec->w_t_eta = 0.5;
    spec->knots = (struct sampler_curve){3, {0, 0.4, 1}, {0.5, 2, 0.1}};
    m->loss = (struct sampler_curve){3, {0.1, 0.5, 0.9}, {1.5, 0.8, 1.2}};
    return form != W_KL_ETA || m->kind == MODEL_PATH;
}

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

static inline struct path_at gauss_at(double alpha, double sigma) { // no path's: only alpha and sigma are meant
    return (struct path_at){.kind = PATH_LINEAR, .alpha = alpha, .sigma = sigma};
}

static inline void gauss_edm_net(const struct gauss *g, double t, const double *x, double *f, int n) {
    double sigma = exp(4 * t), d = g->model.sigma_data, sum = sigma * sigma + d * d;
    struct path_at at = gauss_at(1, sigma);
    for (int e = 0; e < n; e++) {
        double y = x[e] * sqrt(sum); // x = c_in y
        f[e] = (gauss_data(g, &at, y) - d * d / sum * y) / (sigma * d / sqrt(sum));
    }
}

// What the network says of ddpm's variance: that of x before given x at time k, which for Gaussian data is known. The step's mean takes
// x1-hat for x1, so to the posterior's variance comes its weight squared times the variance of x1 given x.
static inline double gauss_logit(const struct gauss *g, double t) {
    int i = 0;
    while (i < g->n && g->times[i] < t) i++;
    if (i == 0 || i == g->n) return 0;
    double abar = schedule_abar(g->times[i]), before = schedule_abar(g->times[i - 1]), beta = 1 - abar / before;
    double weight = beta * sqrt(before) / (1 - abar), post = beta * (1 - before) / (1 - abar);
    double rest = g->s * g->s * (1 - abar) / (abar * g->s * g->s + 1 - abar);
    return 2 * log((post + weight * weight * rest) / post) / log(beta / post) - 1;
}

static inline void gauss_discrete_net(const struct gauss *g, double t, const double *x, double *f, int n) {
    double alpha, sigma;
    schedule_at(t, &alpha, &sigma);
    struct path_at at = gauss_at(alpha, sigma);
    for (int e = 0; e < n; e++) f[e] = gauss_noise(g, &at, x[e]);
    for (int e = 0; g->n && e < n; e++) f[n + e] = gauss_logit(g, t);
}

static inline void gauss_net(void *ctx, const struct sampler_step *st, const double *x, double *f, int n) {
    const struct gauss *g = ctx;
    struct path_at at;
    if (g->model.kind == MODEL_EDM) return gauss_edm_net(g, st->t, x, f, n);
    if (g->model.kind == MODEL_DISCRETE) return gauss_discrete_net(g, st->t, x, f, n);
    path_eval(g->model.path, st->t, &at);
    for (int e = 0; e < n; e++)
        f[e] = g->model.prediction == PRED_VELOCITY ? gauss_velocity(g, &at, x[e])
               : g->model.prediction == PRED_NOISE  ? gauss_noise(g, &at, x[e])
                                                    : gauss_score(g, &at, x[e]);
}

#endif
