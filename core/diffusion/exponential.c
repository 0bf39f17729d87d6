// SPDX-License-Identifier: MIT
/*
 * Steps of x1-hat along a path's time, which need neither velocities nor scores (models-and-math section 4).
 *
 * If x1-hat did not change, the flow from (A, S) to (A', S') would be x' = (S'/S) x + (A' - S' A/S) x1-hat exactly, on every
 * path: that is the exponential integrator, on linear the same as Euler, and DDIM where the path is its schedule. At S' = 0 it
 * returns x1-hat, so a run ends in an estimate of the data.
 *
 * exponential: takes x1-hat as it is. Order 1.
 *
 * dpmpp2m: extrapolates it from the step before, x1-hat + (h/(2 h_prev)) (x1-hat - before), h in ln(A/S) (DPM-Solver++ 2M). The
 * first step and the one into S' = 0 take it as it is. Order 2 but for a logarithm, since steps that are even in t are long in
 * ln(A/S) at both ends; on vp, where S falls like a square root, the last few steps leave a small error of order 1.
 *
 * ddim: with eta > 0 part of what is left of the noise is replaced by fresh noise of the same size, of variance eta^2 S'^2
 * (1 - ((A/S)/(A'/S'))^2): DDIM's own, on a path of any scale. It may clip x1-hat.
 *
 * Columns: X the state, K(0) the x1-hat of the step before.
 */
#include "core/diffusion/solver.h"

#include <math.h>

#define COL_BEFORE COL_K(0)

// Step i of n begins here: even steps to 1, or a little shorter ones where the network would be asked beyond `asked`.
static double begins(const struct sampler *s, int i) {
    int n = s->spec.steps;
    if (i == n) return 1;
    double stride = (1 - s->t0) / n;
    if (n > 1) stride = fmin(stride, (s->asked - s->t0) / (n - 1));
    return s->t0 + i * stride;
}

static double log_ratio(const struct path_at *at) { return log(at->alpha / at->sigma); }

// By how much dpmpp2m extrapolates at step i.
static double extrapolation(const struct sampler *s, const struct path_at *now, const struct path_at *next) {
    struct path_at before;
    if (s->spec.method != METHOD_DPMPP2M || s->step == 0 || next->sigma == 0) return 0;
    path_eval(s->spec.path, begins(s, s->step - 1), &before);
    double h = log_ratio(next) - log_ratio(now), h_before = log_ratio(now) - log_ratio(&before);
    return h / (2 * h_before); // 0 after a step from pure noise, where h_before is infinite
}

static void flow_step(struct sampler *s, struct sampler_step *out, const struct path_at *next) {
    struct convert_at at;
    sampler_ask(s, out, SAMPLER_X, s->t, &at);
    double keep = next->sigma / at.path.sigma, data = next->alpha - keep * at.path.alpha;
    double more = extrapolation(s, &at.path, next);
    struct sampler_assign *x = sampler_assign_to(out, SAMPLER_X);
    x->c[SAMPLER_X] = keep;
    sampler_add(x, SAMPLER_X, data * (1 + more), at.data);
    if (more != 0) x->c[COL_BEFORE] = -data * more;
    if (s->spec.method == METHOD_DPMPP2M) sampler_add(sampler_assign_to(out, COL_BEFORE), SAMPLER_X, 1, at.data);
}

void exponential_ddim(const struct sampler_spec *spec, struct sampler_step *out, const struct convert_net *net, double a,
                      double s, double a_next, double s_next) {
    double turned = a * s_next / (a_next * s), fresh = spec->eta * s_next * sqrt(fmax(0, 1 - turned * turned));
    double old = sqrt(fmax(0, s_next * s_next - fresh * fresh)); // of the noise that stays
    struct sampler_assign *x = sampler_assign_to(out, SAMPLER_X);
    if (spec->clip) {
        out->clip.c[SAMPLER_X] = net->data.x;
        out->clip.c_out = net->data.f;
        x->c[SAMPLER_X] = old / s; // e-hat = (x - a D)/s
        x->c_clip = a_next - old * a / s;
    } else {
        sampler_add(x, SAMPLER_X, a_next, net->data);
        sampler_add(x, SAMPLER_X, old, net->noise);
    }
    x->c_noise = fresh;
}

static void ddim_step(struct sampler *s, struct sampler_step *out, const struct path_at *next) {
    struct convert_at at;
    sampler_ask(s, out, SAMPLER_X, s->t, &at);
    struct convert_net net = {.data = at.data, .noise = at.noise};
    exponential_ddim(&s->spec, out, &net, at.path.alpha, at.path.sigma, next->alpha, next->sigma);
    out->draw = ++s->draws;
}

int exponential_next(struct sampler *s, struct sampler_step *out) {
    struct path_at next;
    if (s->step == s->spec.steps) return 0;
    s->t = begins(s, s->step);
    path_eval(s->spec.path, begins(s, s->step + 1), &next);
    if (s->spec.type == SAMPLER_DDIM) ddim_step(s, out, &next);
    else flow_step(s, out, &next);
    s->step++;
    return 1;
}
