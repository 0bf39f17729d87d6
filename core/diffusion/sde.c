// SPDX-License-Identifier: MIT
/*
 * The reverse-time SDE in the code's time: dX = [v + D s] dt + sqrt(2D) dW, s the score of the sampling path (SiT paper section
 * 3, where w = 2D; transport/integrators.py).
 *
 * D (w_t.c) and s meet an infinity at t = 1 (s = -e-hat/sigma) that their product often does not have: D = sigma gives D s =
 * -e-hat. So the product is formed from s where s is finite, from D/sigma where it is not, and for "sbdm" from its definition V s =
 * v - (alpha'/alpha) x.
 *
 * Euler-Maruyama: x <- x + dt b(x, t) + sqrt(2 D dt) z, one evaluation and one assignment. Heun: first the kick x <- x + sqrt(2
 * D(t) dt) z, a step without an evaluation, then a Heun step of the drift from there. The last step, evaluated at t1, adds no
 * noise.
 */
#include "core/diffusion/solver.h"

#include <math.h>

static const double pi = 3.14159265358979323846;

// The recorder takes GVP's cosine of a float32 angle: at t = 1 that is -4.4e-8 and not 0, and what it makes of a velocity's score
// there, where the truth is infinite, is large but finite. D keeps the plain t.
static void recorded_score(struct convert_at *at, const struct sampler_model *m) {
    float angle = (float)at->path.t * (float)pi / 2;
    struct path_at rounded;
    path_eval(PATH_GVP, 2 * (double)angle / pi, &rounded);
    at->path.sigma = rounded.sigma;
    at->score = path_score(&rounded, m->prediction);
}

static struct lin drift(const struct sampler *sampler, const struct convert_at *at) {
    const struct sampler_spec *spec = &sampler->spec;
    struct lin v = at->velocity, s = at->score;
    if (spec->w_t == W_SBDM) {
        double eta = spec->w_t_scale;
        return (struct lin){ v.x + eta * (v.x - at->path.ratio), v.f + eta * v.f };
    }
    if (isfinite(s.x) && isfinite(s.f)) {
        double d = w_t_diffusion(spec, &sampler->model, &at->path);
        return (struct lin){ v.x + d * s.x, v.f + d * s.f };
    }
    double g = w_t_over_sigma(spec, &sampler->model, &at->path);
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
    struct lin b = drift(s, &at);
    struct sampler_assign *as = sampler_assign_to(out, SAMPLER_X);
    as->c[SAMPLER_X] = 1 + s->h * b.x;
    as->c_out = s->h * b.f;
    as->c_noise = sqrt(2 * w_t_diffusion(&s->spec, &s->model, &at.path) * s->h);
    out->draw = ++s->draws;
    s->step++;
}

static void kick(struct sampler *s, struct sampler_step *out) {
    struct path_at at;
    path_eval(s->spec.path, s->t, &at);
    struct sampler_assign *as = sampler_assign_to(out, SAMPLER_X);
    as->c[SAMPLER_X] = 1;
    as->c_noise = sqrt(2 * w_t_diffusion(&s->spec, &s->model, &at) * s->h);
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
    if (s->spec.replay && at.path.kind == PATH_GVP) recorded_score(&at, &s->model);
    struct lin b = drift(s, &at);
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
        struct lin b = s->spec.last == LAST_MEAN ? drift(s, &at) : at.velocity;
        double h = fmin(s->spec.last_size, 1 - s->t1); // less where the model ends before 1 - last_size
        as->c[SAMPLER_X] = 1 + h * b.x;
        as->c_out = h * b.f;
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
