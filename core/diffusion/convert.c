// SPDX-License-Identifier: MIT
#include "core/diffusion/convert.h"

#include <math.h>

#define BETA_MIN 0.1
#define BETA_SPAN 19.9
static const double half_pi = 1.57079632679489661923;

// VP: ln(1 + sigma^2/alpha^2) = -2 log alpha(t) = u^2 span/2 + u beta_min with u = 1 - t; the root written without cancellation at u = 0.
static double vp_time(double alpha, double sigma) {
    double r = sigma / alpha;
    if (isinf(r)) return 0;
    double y = log1p(r * r);
    double u = 2 * y / (BETA_MIN + sqrt(BETA_MIN * BETA_MIN + 2 * BETA_SPAN * y));
    return u < 1 ? 1 - u : 0;
}

double convert_time(enum path_kind model, double alpha, double sigma) {
    if (model == PATH_LINEAR) return alpha / (alpha + sigma);
    if (model == PATH_GVP) return atan2(alpha, sigma) / half_pi;
    return vp_time(alpha, sigma);
}

double convert_start(enum path_kind sampling, enum path_kind model) {
    if (model != PATH_VP || sampling == PATH_VP) return 0;
    struct path_at at;
    path_eval(PATH_VP, 0, &at);
    return convert_time(sampling, at.alpha, at.sigma);
}

static void own_path(const struct sampler_model *m, struct convert_at *at) {
    at->t = at->path.t;
    at->in_scale = 1;
    at->velocity = path_velocity(&at->path, m->prediction);
    at->score = path_score(&at->path, m->prediction);
    at->data = path_data(&at->path, m->prediction);
    at->noise = path_noise(&at->path, m->prediction);
}

void convert_eval(enum path_kind sampling, const struct sampler_model *m, double t, struct convert_at *at) {
    path_eval(sampling, t, &at->path);
    if (sampling == m->path) {
        own_path(m, at);
        return;
    }
    const struct path_at *p = &at->path;
    struct path_at net;
    at->t = convert_time(m->path, p->alpha, p->sigma);
    path_eval(m->path, at->t, &net);
    double k = p->alpha < p->sigma ? p->sigma / net.sigma : p->alpha / net.alpha; // equal where both are finite; never 0/0
    at->in_scale = 1 / k;
    at->data = path_data(&net, m->prediction);
    at->noise = path_noise(&net, m->prediction);
    at->data.x /= k;
    at->noise.x /= k;
    at->velocity.x = p->d_alpha * at->data.x + p->d_sigma * at->noise.x;
    at->velocity.f = p->d_alpha * at->data.f + p->d_sigma * at->noise.f;
    at->score.x = -at->noise.x / p->sigma;
    at->score.f = -at->noise.f / p->sigma;
}
