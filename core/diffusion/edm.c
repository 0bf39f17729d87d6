// SPDX-License-Identifier: MIT
/*
 * EDM's sampler (Karras et al. 2022, algorithm 2; MaskDiT sample.py): x = x1 + sigma x0, dx/dsigma = e-hat, over
 *   sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i < n, then sigma_n = 0.
 *
 * A step may first raise sigma by the factor 1 + gamma with fresh noise (churn): gamma = min(churn/n, sqrt(2) - 1) where s_min <=
 * sigma <= s_max, a move without an evaluation. Then Heun, or Euler; the step to 0 is Euler's and returns x1-hat. Any model runs
 * under it: a path or discrete model is asked where it has sigma/alpha = sigma (convert.c). Draw j belongs to step j, churned or
 * not.
 */
#include <math.h>

#include "core/diffusion/solver.h"

int edm_evaluations(const struct sampler_spec *spec) { return spec->method == METHOD_EULER ? spec->steps : 2 * spec->steps - 1; }

static double sigma_at(const struct sampler_spec *spec, int i) {
    if (i == spec->steps) return 0;
    if (i == 0) return spec->sigma_max;
    double a = pow(spec->sigma_max, 1 / spec->rho), b = pow(spec->sigma_min, 1 / spec->rho);
    return pow(a + (double)i / (spec->steps - 1) * (b - a), spec->rho);
}

static double churned(const struct sampler_spec *spec, double sigma) {
    bool in = sigma >= spec->s_min && sigma <= spec->s_max;
    return in ? sigma * (1 + fmin(spec->churn / spec->steps, sqrt(2) - 1)) : sigma;
}

static void kick(struct sampler *s, struct sampler_step *out, double sigma, double hat) {
    struct sampler_assign *as = sampler_assign_to(out, SAMPLER_X);
    as->c[SAMPLER_X] = 1;
    as->c_noise = sqrt(hat * hat - sigma * sigma) * s->spec.s_noise;
    out->time = 1 / (1 + sigma);
    out->draw = s->draws;
}

int edm_next(struct sampler *s, struct sampler_step *out) {
    const struct sampler_spec *spec = &s->spec;
    if (s->step == spec->steps) return 0;
    double sigma = sigma_at(spec, s->step), hat = churned(spec, sigma), next = sigma_at(spec, s->step + 1);
    if (s->stage == 0) { // a step begins
        s->draws++;
        s->stage = 1;
        if (hat > sigma) {
            kick(s, out, sigma, hat);
            return 1;
        }
    }
    const struct tableau *tab = spec->method == METHOD_EULER || next == 0 ? &ode_euler : &ode_heun;
    int i = s->stage - 1;
    struct convert_net net;
    sampler_ask_net(s, out, i ? COL_Y : SAMPLER_X, 1, i ? next : hat, &net);
    ode_stage(out, tab, i, next - hat, &net.noise);
    s->t = out->time;
    if (++s->stage <= tab->stages) return 1;
    s->stage = 0;
    s->step++;
    return 1;
}
