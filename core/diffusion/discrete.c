// SPDX-License-Identifier: MIT
/*
 * DDPM and DDIM along a discrete-time model's own schedule (DiT diffusion/gaussian_diffusion.py and respace.py).
 *
 * The visited times are a subsequence k_0 < ... < k_(n-1); with abar = abar(k_i), before = abar(k_(i-1)) (1 before k_0) a step's
 * beta is 1 - abar/before, and the network is asked at the original k_i. DDPM:
 *
 *     x <- [beta sqrt(before)/(1 - abar)] x1-hat + [(1 - before) sqrt(1 - beta)/(1 - abar)] x + sd Z
 *
 * with ln sd^2 between ln(beta (1 - before)/(1 - abar)) and ln beta as the network's second half of channels says, or at the upper
 * one where it has no such half. The step to data adds no noise. DDIM is exponential.c's, on the schedule's numbers. Draw number j
 * belongs to step j whether or not it adds noise, as in the authors' code.
 */
#include <math.h>

#include "core/diffusion/solver.h"

static void ddpm_step(struct sampler *s, struct sampler_step *out, const struct convert_net *net, double abar, double before) {
    double beta = 1 - abar / before, data = beta * sqrt(before) / (1 - abar);
    struct sampler_assign *x = sampler_assign_to(out, SAMPLER_X);
    x->c[SAMPLER_X] = (1 - before) * sqrt(1 - beta) / (1 - abar);
    if (s->spec.clip) {
        out->clip.c[SAMPLER_X] = net->data.x;
        out->clip.c_out = net->data.f;
        x->c_clip = data;
    } else {
        sampler_add(x, SAMPLER_X, data, net->data);
    }
    if (before == 1) return;
    out->learned = s->model.learned_variance;
    x->c_noise = out->learned ? 1 : sqrt(beta);
    if (!out->learned) return;
    out->log_lo = log(beta * (1 - before) / (1 - abar)) / 2;
    out->log_span = log(beta) / 2 - out->log_lo;
}

int discrete_next(struct sampler *s, struct sampler_step *out) {
    const struct sampler_spec *spec = &s->spec;
    if (s->step == spec->steps) return 0;
    int i = spec->steps - 1 - s->step, time = schedule_time(spec->spacing, spec->steps, i);
    double abar = schedule_abar(time), before = i > 0 ? schedule_abar(schedule_time(spec->spacing, spec->steps, i - 1)) : 1;
    struct convert_net net;
    sampler_ask_net(s, out, SAMPLER_X, sqrt(abar), sqrt(1 - abar), &net);
    out->t = time; // exactly, though the way back from its ratio gave it to rounding
    if (spec->type == SAMPLER_DDPM) ddpm_step(s, out, &net, abar, before);
    else exponential_ddim(spec, out, &net, sqrt(abar), sqrt(1 - abar), sqrt(before), sqrt(1 - before));
    out->draw = ++s->draws;
    s->t = out->time;
    s->step++;
    return 1;
}
