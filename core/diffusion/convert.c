// SPDX-License-Identifier: MIT
#include "core/diffusion/convert.h"

#include <math.h>

#define EDM_LEAST (1 / 80.0) // of alpha/sigma: EDM's sigma runs from 80 to 0.002
#define EDM_MOST (1 / 0.002)

/* what a network is asked where x = A x1 + S x0, and what it answers */

// k of x = k y, where y has (a, s): equal quotients where both are finite; never 0/0
static double quotient(double alpha, double sigma, double a, double s) { return alpha < sigma ? sigma / s : alpha / a; }

static void path_net(const struct sampler_model *m, double alpha, double sigma, struct convert_net *net) {
    struct path_at at;
    net->t = path_time(m->path, alpha, sigma);
    path_eval(m->path, net->t, &at);
    net->k = quotient(alpha, sigma, at.alpha, at.sigma);
    net->in_scale = 1 / net->k;
    net->data = path_data(&at, m->prediction);
    net->noise = path_noise(&at, m->prediction);
}

static void discrete_net(double alpha, double sigma, struct convert_net *net) {
    double a, s;
    net->t = schedule_find(alpha, sigma);
    schedule_at(net->t, &a, &s);
    net->k = quotient(alpha, sigma, a, s);
    net->in_scale = 1 / net->k;
    net->data = (struct lin){1 / a, -s / a};
    net->noise = (struct lin){0, 1};
}

// D = c_skip y + c_out F(c_in y, ln(sigma)/4) of y = x/k; e-hat = (y - D)/sigma, written out so that nothing cancels.
static void edm_net(const struct sampler_model *m, double alpha, double sigma, struct convert_net *net) {
    double s = sigma / alpha, d = m->sigma_data, sum = s * s + d * d, root = sqrt(sum);
    net->t = log(s) / 4;
    net->k = alpha;
    net->in_scale = 1 / (root * alpha);
    net->data = (struct lin){d * d / sum, s * d / root};
    net->noise = (struct lin){s / sum, -d / root};
}

void convert_net(const struct sampler_model *m, double alpha, double sigma, struct convert_net *net) {
    if (m->kind == MODEL_DISCRETE) discrete_net(alpha, sigma, net);
    else if (m->kind == MODEL_EDM) edm_net(m, alpha, sigma, net);
    else path_net(m, alpha, sigma, net);
    net->data.x /= net->k;
    net->noise.x /= net->k;
}

/* on a path */

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
    if (m->kind == MODEL_PATH && sampling == m->path) {
        own_path(m, at);
        return;
    }
    const struct path_at *p = &at->path;
    struct convert_net net;
    convert_net(m, p->alpha, p->sigma, &net);
    at->t = net.t;
    at->in_scale = net.in_scale;
    at->data = net.data;
    at->noise = net.noise;
    at->velocity.x = p->d_alpha * at->data.x + p->d_sigma * at->noise.x;
    at->velocity.f = p->d_alpha * at->data.f + p->d_sigma * at->noise.f;
    at->score.x = -at->noise.x / p->sigma;
    at->score.f = -at->noise.f / p->sigma;
}

/* how far a model reaches */

static double path_ratio(enum path_kind path, double t) {
    struct path_at at;
    path_eval(path, t, &at);
    return at.alpha / at.sigma;
}

void convert_range(const struct sampler_model *m, double *least, double *most) {
    *least = 0;
    *most = INFINITY;
    if (m->kind == MODEL_DISCRETE) {
        *least = schedule_least();
        *most = schedule_most();
    } else if (m->kind == MODEL_EDM) {
        *least = EDM_LEAST;
        *most = EDM_MOST;
    } else if (m->path == PATH_VP) {
        *least = path_ratio(PATH_VP, 0);
    } else if (m->prediction != PRED_VELOCITY) {
        *least = path_ratio(m->path, 1e-3);
        *most = path_ratio(m->path, 1 - 1e-3);
    }
}

double convert_start(enum path_kind sampling, const struct sampler_model *m) {
    double least, most;
    if (m->kind == MODEL_PATH && sampling == m->path && m->path == PATH_VP) return 0;
    convert_range(m, &least, &most);
    return path_time(sampling, least, 1);
}

double convert_end(enum path_kind sampling, const struct sampler_model *m) {
    double least, most;
    convert_range(m, &least, &most);
    return isinf(most) ? 1 : path_time(sampling, most, 1);
}
