// SPDX-License-Identifier: MIT
#include "core/diffusion/convert.h"

double convert_start(enum path_kind sampling, enum path_kind model) {
    if (model != PATH_VP || sampling == PATH_VP) return 0;
    struct path_at at;
    path_eval(PATH_VP, 0, &at);
    return path_time(sampling, at.alpha, at.sigma);
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
    at->t = path_time(m->path, p->alpha, p->sigma);
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
