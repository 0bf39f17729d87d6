// SPDX-License-Identifier: MIT
/*
 * The reverse-time SDE in the code's time: dX = [v + D s] dt + sqrt(2D) dW, s the score of the sampling path (SiT paper section
 * 3, where w = 2D; transport/integrators.py).
 *
 * D and s meet an infinity at t = 1 (s = -e-hat/sigma) that their product often does not have: D = sigma gives D s = -e-hat. So
 * the product is formed from s where s is finite, from D/sigma where it is not, and for "sbdm" from its definition V s = v -
 * (alpha'/alpha) x.
 *
 * Euler-Maruyama: x <- x + dt b(x, t) + sqrt(2 D dt) z, one evaluation and one assignment. Heun: first the kick x <- x + sqrt(2
 * D(t) dt) z, a step without an evaluation, then a Heun step of the drift from there. The last step, evaluated at t1, adds no
 * noise.
 */
#include "core/diffusion/solver.h"

#include <math.h>

static const double pi = 3.14159265358979323846;

static double diffusion(const struct sampler_spec *spec, const struct path_at *at) {
    double eta = spec->w_t_scale, u;
    switch (spec->w_t) {
    case W_CONSTANT: return eta;
    case W_SBDM: return eta * at->var;
    case W_SIGMA: return eta * at->sigma;
    case W_LINEAR: return eta * (1 - at->t);
    case W_DECREASING: u = eta * cos(pi * at->t) + 1; return 0.25 * u * u;
    default: u = sin(pi * at->t); return eta * u * u;
    }
}

// D/sigma for the forms whose limit at sigma = 0 is finite; elsewhere the plain quotient.
static double diffusion_over_sigma(const struct sampler_spec *spec, const struct path_at *at) {
    if (spec->w_t == W_SIGMA) return spec->w_t_scale;
    if (at->sigma != 0) return diffusion(spec, at) / at->sigma;
    if (spec->w_t == W_LINEAR) return -spec->w_t_scale / at->d_sigma; // by de l'Hopital; 0 for VP, whose sigma' is infinite
    if (spec->w_t == W_INC_DEC || (spec->w_t == W_DECREASING && spec->w_t_scale == 1)) return 0;
    return INFINITY;
}

static struct lin drift(const struct sampler_spec *spec, const struct convert_at *at) {
    struct lin v = at->velocity, s = at->score;
    if (spec->w_t == W_SBDM) {
        double eta = spec->w_t_scale;
        return (struct lin){ v.x + eta * (v.x - at->path.ratio), v.f + eta * v.f };
    }
    if (isfinite(s.x) && isfinite(s.f)) {
        double d = diffusion(spec, &at->path);
        return (struct lin){ v.x + d * s.x, v.f + d * s.f };
    }
    double g = diffusion_over_sigma(spec, &at->path);
    return (struct lin){ v.x - g * at->noise.x, v.f - g * at->noise.f };
}

int sde_steps(const struct sampler_spec *spec) { return spec->steps - (spec->last != LAST_NONE); }

// The grid's step: the recorder takes dt = t[1] - t[0] in float32 for every step.
static double step_size(const struct sampler *s) {
    int n = sde_steps(&s->spec);
    return s->spec.replay ? (double)((float)sampler_grid(s, 1, n) - (float)sampler_grid(s, 0, n)) : (s->t1 - s->t0) / n;
}

static void euler_step(struct sampler *s, struct sampler_step *out) {
    struct convert_at at;
    sampler_ask(s, out, SAMPLER_X, s->t, &at);
    struct lin b = drift(&s->spec, &at);
    struct sampler_assign *as = sampler_assign_to(out, SAMPLER_X);
    as->c[SAMPLER_X] = 1 + s->h * b.x;
    as->c_out = s->h * b.f;
    as->c_noise = sqrt(2 * diffusion(&s->spec, &at.path) * s->h);
    out->draw = ++s->draws;
    s->step++;
}

static void kick(struct sampler *s, struct sampler_step *out) {
    struct path_at at;
    path_eval(s->spec.path, s->t, &at);
    struct sampler_assign *as = sampler_assign_to(out, SAMPLER_X);
    as->c[SAMPLER_X] = 1;
    as->c_noise = sqrt(2 * diffusion(&s->spec, &at) * s->h);
    out->time = s->t;
    out->draw = ++s->draws;
}

static void heun_step(struct sampler *s, struct sampler_step *out) {
    if (s->stage == 0) {
        kick(s, out);
        s->stage = 1;
        return;
    }
    int i = s->stage - 1;
    double t_next = s->spec.replay ? (double)((float)s->t + (float)s->h) : sampler_grid(s, s->step + 1, sde_steps(&s->spec));
    struct convert_at at;
    sampler_ask(s, out, i ? COL_Y : SAMPLER_X, i ? t_next : s->t, &at);
    struct lin b = drift(&s->spec, &at);
    ode_stage(out, &ode_heun, i, s->h, &b);
    s->stage = i ? 0 : 2;
    s->step += i;
}

static void last_step(struct sampler *s, struct sampler_step *out) {
    struct convert_at at;
    sampler_ask(s, out, SAMPLER_X, s->t, &at);
    struct sampler_assign *as = sampler_assign_to(out, SAMPLER_X);
    if (s->spec.last == LAST_TWEEDIE) { // x/alpha + (sigma^2/alpha) s is x1-hat
        as->c[SAMPLER_X] = at.data.x;
        as->c_out = at.data.f;
    } else {
        struct lin b = s->spec.last == LAST_MEAN ? drift(&s->spec, &at) : at.velocity;
        as->c[SAMPLER_X] = 1 + s->spec.last_size * b.x;
        as->c_out = s->spec.last_size * b.f;
    }
    s->step++;
}

int sde_next(struct sampler *s, struct sampler_step *out) {
    int n = sde_steps(&s->spec);
    if (s->step == s->spec.steps) return 0;
    s->t = sampler_grid(s, s->step, n);
    s->h = step_size(s);
    if (s->step == n) last_step(s, out);
    else if (s->spec.method == METHOD_EULER) euler_step(s, out);
    else heun_step(s, out);
    return 1;
}
