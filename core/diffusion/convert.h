// SPDX-License-Identifier: MIT
/*
 * convert: one network evaluation seen from the sampling path. Private to core/diffusion.
 *
 * On the model's own path the network is asked at (x, t). On another path it is asked at (x/k, t_r), where the model's path has
 * the same signal-to-noise ratio; its output gives (x1-hat, e-hat), which do not depend on the path, and these give the sampling
 * path's velocity A' x1-hat + S' e-hat and score -e-hat/S (flow_matching's ScheduleTransformedModel without the derivative of the
 * map). All of it is linear in (x, F), so a solver folds it into its coefficients. Pure functions, double precision, any thread.
 */
#ifndef SITD_CONVERT_H
#define SITD_CONVERT_H
#include "core/diffusion/sampler.h"

struct convert_at {
    struct path_at path;                     // the sampling path's numbers at its time path.t
    double t, in_scale;                      // what the network is asked: in_scale * x at the model's time t
    struct lin velocity, score, data, noise; // of the sampling path, from (x, F) with x not yet scaled
};
void convert_eval(enum path_kind sampling, const struct sampler_model *, double t, struct convert_at *);

// Earliest time of the sampling path that the model's path reaches (0 except for a VP model on linear or GVP, where 0.0065 and
// 0.0042).
double convert_start(enum path_kind sampling, enum path_kind model);

#endif
