// SPDX-License-Identifier: MIT
/*
 * Dormand-Prince 5(4) with torchdiffeq's controller, one image's error norm at a time.
 *
 * Columns: X = y at t, Y = the stage's input and, once the seventh stage is asked, y at t + h; K(0..6) the drifts. The seventh
 * drift is the next step's first (FSAL). The norms of a step come back with the next call; until then the image sits out and the
 * others go on.
 *
 *   FIRST   k0 at t0; norms d0 = |x|, d1 = |k0|              \
 *   PROBE   Y = x + h0 k0                                     } Hairer, Norsett, Wanner II.4: the first step size
 *   SECOND  k1 at (Y, t0 + h0); norm |k1 - k0|               /
 *   BEGIN   Y = x + h a21 k0
 *   1..6    k_i, next Y; after the sixth the error's norm
 *   JUDGE   accepted: x = Y, k0 = k6, and BEGIN of the next step in the same move; refused: BEGIN again with a smaller h
 *
 * The end: the daemon shortens the last step to end at t1 exactly, and stretches it by at most 1 % so that no sliver is left. A
 * replay steps over t1 as torchdiffeq does and reads y(t1) from its quartic interpolant, which is linear in x, Y and the drifts.
 * (torchdiffeq also nudges some times by one float32 ulp: 6e-8 of t, far below the tolerance that a recorded dopri5 run can be
 * met to, so it is left out.)
 */
#include "core/diffusion/solver.h"

#include <math.h>
#include <stddef.h>

enum { FIRST, STAGE_1, STAGE_6 = STAGE_1 + 5, PROBE, SECOND, BEGIN, JUDGE };
enum { KEEP_D0, KEEP_D1, KEEP_H0, KEEP_LAST }; // of sampler.keep

static const struct tableau dopri5 = {
    .stages = 7,
    .c = { 0, 1.0 / 5, 3.0 / 10, 4.0 / 5, 8.0 / 9, 1, 1 },
    .a = { { 0 },
           { 1.0 / 5 },
           { 3.0 / 40, 9.0 / 40 },
           { 44.0 / 45, -56.0 / 15, 32.0 / 9 },
           { 19372.0 / 6561, -25360.0 / 2187, 64448.0 / 6561, -212.0 / 729 },
           { 9017.0 / 3168, -355.0 / 33, 46732.0 / 5247, 49.0 / 176, -5103.0 / 18656 },
           { 35.0 / 384, 0, 500.0 / 1113, 125.0 / 192, -2187.0 / 6784, 11.0 / 84 } },
    .b = { 35.0 / 384, 0, 500.0 / 1113, 125.0 / 192, -2187.0 / 6784, 11.0 / 84, 0 },
};
// b - b_hat, torchdiffeq's fifth-order weights less its fourth-order ones
static const double error_weight[SOLVER_STAGES] = {
    35.0 / 384 - 1951.0 / 21600,
    0,
    500.0 / 1113 - 22642.0 / 50085,
    125.0 / 192 - 451.0 / 720,
    -2187.0 / 6784 + 12231.0 / 42400,
    11.0 / 84 - 649.0 / 6300,
    -1.0 / 60,
};
// y(t + h/2) = x + h sum mid_i k_i (Shampine 1986)
static const double mid_weight[SOLVER_STAGES] = {
    6025192743.0 / 30085553152.0 / 2,     0,
    51252292925.0 / 65400821598.0 / 2,    -2691868925.0 / 45128329728.0 / 2,
    187940372067.0 / 1594534317056.0 / 2, -1776094331.0 / 19743644256.0 / 2,
    11237099.0 / 235043384.0 / 2,
};

static struct sampler_norm *norm_of(const struct sampler *s, struct sampler_step *out, int a, int b) {
    struct sampler_norm *n = &out->norm[out->norms++];
    n->a = a;
    n->b = b;
    n->atol = s->spec.atol;
    n->rtol = s->spec.rtol;
    return n;
}

static void drift_to(const struct sampler *s, struct sampler_step *out, int in, double t, int dst) {
    struct convert_at at;
    sampler_ask(s, out, in, t, &at);
    struct sampler_assign *as = sampler_assign_to(out, dst);
    as->c[in] = at.velocity.x;
    as->c_out = at.velocity.f;
}

static void first(struct sampler *s, struct sampler_step *out) {
    drift_to(s, out, SAMPLER_X, s->t, COL_K(0));
    norm_of(s, out, SAMPLER_X, SAMPLER_X)->c[SAMPLER_X] = 1;
    norm_of(s, out, SAMPLER_X, SAMPLER_X)->c[COL_K(0)] = 1;
    s->stage = PROBE;
}

static void probe(struct sampler *s, const double *norms, struct sampler_step *out) {
    double d0 = norms[0], d1 = norms[1], h0 = d0 < 1e-5 || d1 < 1e-5 ? 1e-6 : 0.01 * d0 / d1, one = 1;
    if (!s->spec.replay) h0 = fmin(h0, s->t1 - s->t0); // the network is not asked beyond t1
    s->keep[KEEP_D0] = d0;
    s->keep[KEEP_D1] = d1;
    s->keep[KEEP_H0] = h0;
    ode_combine(out, COL_Y, h0, &one, 0, NULL);
    s->stage = SECOND;
}

static void second(struct sampler *s, struct sampler_step *out) {
    drift_to(s, out, COL_Y, s->t + s->keep[KEEP_H0], COL_K(1));
    struct sampler_norm *n = norm_of(s, out, SAMPLER_X, SAMPLER_X);
    n->c[COL_K(1)] = 1;
    n->c[COL_K(0)] = -1;
    s->stage = BEGIN;
}

static double first_step_size(const struct sampler *s, double norm) {
    double h0 = s->keep[KEEP_H0], d1 = s->keep[KEEP_D1], d2 = norm / h0;
    double h1 = d1 <= 1e-15 && d2 <= 1e-15 ? fmax(1e-6, 1e-3 * h0) : pow(0.01 / fmax(d1, d2), 0.2);
    return fmin(100 * h0, h1);
}

static int size_next(struct sampler *s, struct err *err) { // h from h_try: refuses what cannot be done, shortens the last step
    if (s->evaluations + 6 > s->spec.max_evaluations)
        return err_param(err, E_RANGE, "sampler.max_evaluations",
                         "dopri5 needs more than %d evaluations (it has come to t = %.4g)", s->spec.max_evaluations, s->t);
    if (!(s->t + s->h_try > s->t))
        return err_param(err, E_RANGE, "sampler.rtol", "dopri5's step size vanished at t = %.9g: the tolerances cannot be met",
                         s->t);
    bool last = !s->spec.replay && s->t + 1.01 * s->h_try >= s->t1;
    s->keep[KEEP_LAST] = last;
    s->h = last ? s->t1 - s->t : s->h_try;
    return OK;
}

static int begin(struct sampler *s, double norm, struct sampler_step *out, struct err *err) {
    s->h_try = first_step_size(s, norm);
    int rc = size_next(s, err);
    if (rc) return rc;
    ode_combine(out, COL_Y, s->h, dopri5.a[1], 0, NULL);
    s->stage = STAGE_1;
    return 1;
}

static double end_of_step(const struct sampler *s) { return s->keep[KEEP_LAST] != 0 ? s->t1 : s->t + s->h; }

static void stage(struct sampler *s, struct sampler_step *out) {
    int i = s->stage - STAGE_1 + 1;
    double t = dopri5.c[i] == 1 ? end_of_step(s) : s->t + dopri5.c[i] * s->h;
    if (i == 6) {
        drift_to(s, out, COL_Y, t, COL_K(6));
        struct sampler_norm *n = norm_of(s, out, SAMPLER_X, COL_Y);
        for (int j = 0; j < SOLVER_STAGES; j++) n->c[COL_K(j)] = s->h * error_weight[j];
        s->stage = JUDGE;
        return;
    }
    struct convert_at at;
    sampler_ask(s, out, COL_Y, t, &at);
    struct sampler_assign *k = sampler_assign_to(out, COL_K(i));
    k->c[COL_Y] = at.velocity.x;
    k->c_out = at.velocity.f;
    ode_combine(out, COL_Y, s->h, dopri5.a[i + 1], i, &at.velocity);
    s->stage++;
}

static double growth(double ratio) {
    if (ratio == 0) return 10;
    return fmin(10, fmax(0.9 / pow(ratio, 0.2), ratio < 1 ? 1 : 0.2));
}

// y at t + u h from the quartic through (x, k0), the middle and (Y, k6): a u^4 + b u^3 + c u^2 + d u + x.
static void interpolate(struct sampler_step *out, double h, double u) {
    double u2 = u * u, u3 = u2 * u, u4 = u3 * u, mid = 16 * u4 - 32 * u3 + 16 * u2;
    struct sampler_assign *as = sampler_assign_to(out, SAMPLER_X);
    as->c[SAMPLER_X] = 1 - 8 * u4 + 18 * u3 - 11 * u2 + mid;
    as->c[COL_Y] = -8 * u4 + 14 * u3 - 5 * u2;
    for (int j = 0; j < SOLVER_STAGES; j++) as->c[COL_K(j)] = h * mid * mid_weight[j];
    as->c[COL_K(0)] += h * (-2 * u4 + 5 * u3 - 4 * u2 + u);
    as->c[COL_K(6)] += h * (2 * u4 - 3 * u3 + u2);
}

static void copy(struct sampler_step *out, int dst, int src) { sampler_assign_to(out, dst)->c[src] = 1; }

static void finish(struct sampler *s, struct sampler_step *out) {
    double u = (s->t1 - s->t) / s->h;
    if (s->spec.replay && u < 1) interpolate(out, s->h, u);
    else copy(out, SAMPLER_X, COL_Y);
    s->t = s->t1;
    s->phase = solver_denoises(&s->spec, &s->model) ? PHASE_DENOISE : PHASE_DONE;
}

static int accept(struct sampler *s, struct sampler_step *out, struct err *err) {
    s->t = end_of_step(s);
    s->step++;
    int rc = size_next(s, err);
    if (rc) return rc;
    copy(out, SAMPLER_X, COL_Y);
    copy(out, COL_K(0), COL_K(6));
    struct sampler_assign *y = sampler_assign_to(out, COL_Y);
    y->c[COL_Y] = 1;
    y->c[COL_K(6)] = s->h * dopri5.a[1][0];
    s->stage = STAGE_1;
    return 1;
}

static int judge(struct sampler *s, double ratio, struct sampler_step *out, struct err *err) {
    s->h_try = s->h * growth(ratio);
    if (ratio <= 1 && end_of_step(s) >= s->t1) {
        finish(s, out);
        return 1;
    }
    if (ratio <= 1) return accept(s, out, err);
    int rc = size_next(s, err);
    if (rc) return rc;
    ode_combine(out, COL_Y, s->h, dopri5.a[1], 0, NULL);
    s->stage = STAGE_1;
    return 1;
}

static int check_norms(const struct sampler *s, const double *norms, int n, struct err *err) {
    if (!norms) return err_set(err, E_INTERNAL, "dopri5 was not given its norms");
    for (int i = 0; i < n; i++)
        if (!isfinite(norms[i])) return err_set(err, E_NONFINITE, "dopri5's error norm is not finite at t = %.4g", s->t);
    return OK;
}

int dopri5_next(struct sampler *s, const double *norms, struct sampler_step *out, struct err *err) {
    int wanted = s->stage == PROBE ? 2 : s->stage == BEGIN || s->stage == JUDGE ? 1 : 0;
    int rc = wanted ? check_norms(s, norms, wanted, err) : OK;
    if (rc) return rc;
    out->time = s->t;
    switch (s->stage) {
    case FIRST: first(s, out); return 1;
    case PROBE: probe(s, norms, out); return 1;
    case SECOND: second(s, out); return 1;
    case BEGIN: return begin(s, norms[0], out, err);
    case JUDGE: return judge(s, norms[0], out, err);
    default: stage(s, out); return 1;
    }
}
