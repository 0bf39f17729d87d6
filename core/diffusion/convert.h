// SPDX-License-Identifier: MIT
/*
 * convert: one network evaluation seen from where the sampler stands. Private to core/diffusion.
 *
 * Every sampler here stands at some x = A x1 + S x0. On a path model's own path the network is asked at (x, t). Anywhere else it
 * is asked at (x/k, t_r), where it was trained with the same signal-to-noise ratio; its output gives (x1-hat, e-hat), which do
 * not depend on where one stands, and these give the sampling path's velocity A' x1-hat + S' e-hat and score -e-hat/S
 * (flow_matching's ScheduleTransformedModel without the derivative of the map). A discrete-time model is asked at a fractional
 * time of its schedule, an EDM model at ln(sigma)/4 with its preconditioning folded in. All of it is linear in (x, F), so a
 * solver folds it into its coefficients. Pure functions, double precision, any thread.
 */
#ifndef SITD_CONVERT_H
#define SITD_CONVERT_H
#include "core/diffusion/sampler.h"

struct convert_net {
    double t, in_scale;     // what the network is asked: in_scale * x at its own time t
    double k;               // x = k times what stands at t where the network was trained
    struct lin data, noise; // from (x, F), x not scaled
};
void convert_net(const struct sampler_model *, double alpha, double sigma, struct convert_net *);

struct convert_at {
    struct path_at path;                     // the sampling path's numbers at its time path.t
    double t, in_scale;                      // as above
    struct lin velocity, score, data, noise; // of the sampling path, from (x, F) with x not yet scaled
};
void convert_eval(enum path_kind sampling, const struct sampler_model *, double t, struct convert_at *);

// The ratios alpha/sigma that a model was trained on: *least (0: down to pure noise) and *most (infinite: up to data).
void convert_range(const struct sampler_model *, double *least, double *most);
// Earliest and latest time of the sampling path that the model reaches (0 and 1 where it reaches the path's ends).
double convert_start(enum path_kind sampling, const struct sampler_model *);
double convert_end(enum path_kind sampling, const struct sampler_model *);

#endif
