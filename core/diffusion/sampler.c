// SPDX-License-Identifier: MIT
/*
 * The common part: names, ranges, the grid, the first move, and the guards around every step (guidance interval, finite
 * coefficients, counting).
 */
#include "core/diffusion/solver.h"

#include <limits.h>
#include <math.h>
#include <string.h>

#define DOPRI5_ESTIMATE 62 // first guess of dopri5's evaluations: ten steps

static const char *const type_names[SAMPLER_TYPE_COUNT] = { "ode", "sde" };
static const char *const method_names[METHOD_COUNT] = { "euler", "heun", "midpoint", "rk4", "dopri5" };
static const char *const form_names[W_COUNT] = { "constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing" };
static const char *const last_names[LAST_COUNT] = { "none", "mean", "tweedie", "euler" };

static const char *name_at(const char *const *names, int n, int i) { return i >= 0 && i < n ? names[i] : "?"; }

static int index_of(const char *const *names, int n, const char *s) {
    for (int i = 0; s && i < n; i++)
        if (strcmp(names[i], s) == 0) return i;
    return -1;
}

const char *sampler_type_name(int i) { return name_at(type_names, SAMPLER_TYPE_COUNT, i); }
const char *sampler_method_name(int i) { return name_at(method_names, METHOD_COUNT, i); }
const char *w_form_name(int i) { return name_at(form_names, W_COUNT, i); }
const char *last_step_name(int i) { return name_at(last_names, LAST_COUNT, i); }
int sampler_type_parse(const char *s) { return index_of(type_names, SAMPLER_TYPE_COUNT, s); }
int sampler_method_parse(const char *s) { return index_of(method_names, METHOD_COUNT, s); }
int last_step_parse(const char *s) { return index_of(last_names, LAST_COUNT, s); }
int w_form_parse(const char *s) { return s && strcmp(s, "kl") == 0 ? (int)W_SBDM : index_of(form_names, W_COUNT, s); }

static bool adaptive(const struct sampler_spec *spec) { return spec->type == SAMPLER_ODE && spec->method == METHOD_DOPRI5; }

void sampler_defaults(struct sampler_spec *spec, const struct sampler_model *model, enum sampler_type type) {
    bool ode = type == SAMPLER_ODE;
    *spec = (struct sampler_spec){
        .type = type,
        .method = ode ? METHOD_HEUN : METHOD_EULER,
        .steps = ode ? 50 : 250,
        .max_evaluations = 1000,
        .path = model->path,
        .w_t = W_SIGMA,
        .w_t_scale = 1,
        .last = LAST_MEAN,
        .last_size = 0.04,
        .atol = 1e-6,
        .rtol = 1e-3,
        .guidance = 1,
        .guide_from = 0,
        .guide_to = 1,
        .guide_channels = INT_MAX,
    };
}

/* ranges */

static int in_range(double v, double lo, double hi, const char *param, struct err *err) {
    if (v >= lo && v <= hi) return OK; // false for NaN
    return err_param(err, E_RANGE, param, "%s must be from %g to %g", param, lo, hi);
}

static int above(double v, double lo, double hi, const char *param, struct err *err) {
    if (v > lo && v <= hi) return OK;
    return err_param(err, E_RANGE, param, "%s must be above %g and at most %g", param, lo, hi);
}

static int one_of(int v, int count, const char *param, struct err *err) {
    return v >= 0 && v < count ? OK : err_param(err, E_RANGE, param, "%s has no value number %d", param, v);
}

static int check_guidance(const struct sampler_spec *spec, struct err *err) {
    int rc = in_range(spec->guidance, 0, 1e6, "guidance.scale", err);
    if (!rc) rc = in_range(spec->guide_from, 0, 1, "guidance.interval", err);
    if (!rc) rc = in_range(spec->guide_to, 0, 1, "guidance.interval", err);
    if (!rc && spec->guide_from > spec->guide_to)
        rc = err_param(err, E_RANGE, "guidance.interval", "guidance.interval must not end (%g) before it begins (%g)",
                       spec->guide_to, spec->guide_from);
    if (!rc && spec->guidance != 1 && spec->guide_channels < 1)
        rc = err_param(err, E_RANGE, "guidance.channels", "guidance.channels must be at least 1");
    return rc;
}

static int check_ode(const struct sampler_spec *spec, struct err *err) {
    if (spec->method != METHOD_DOPRI5) return in_range(spec->steps, 1, SAMPLER_MAX_STEPS, "sampler.steps", err);
    int rc = in_range(spec->max_evaluations, 8, SAMPLER_MAX_EVALUATIONS, "sampler.max_evaluations", err);
    if (!rc) rc = above(spec->atol, 0, 1, "sampler.atol", err);
    return rc ? rc : in_range(spec->rtol, 0, 1, "sampler.rtol", err);
}

static int check_sde(const struct sampler_spec *spec, const struct sampler_model *model, struct err *err) {
    if (spec->method != METHOD_EULER && spec->method != METHOD_HEUN)
        return err_param(err, E_RANGE, "sampler.method", "sampler.method of an sde is euler or heun, not %s",
                         sampler_method_name((int)spec->method));
    int rc = one_of((int)spec->w_t, W_COUNT, "sampler.w_t", err);
    if (!rc) rc = above(spec->w_t_scale, 0, 1e6, "sampler.w_t_scale", err);
    if (!rc) rc = one_of((int)spec->last, LAST_COUNT, "sampler.last_step", err);
    if (!rc) rc = in_range(spec->steps, spec->last == LAST_NONE ? 1 : 2, SAMPLER_MAX_STEPS, "sampler.steps", err);
    if (rc || spec->last == LAST_NONE) return rc;
    struct interval iv;
    rc = in_range(spec->last_size, 0, 1, "sampler.last_step_size", err);
    if (rc) return rc;
    interval_of(spec, model, &iv);
    if (iv.t1 > iv.t0) return OK;
    return err_param(err, E_RANGE, "sampler.last_step_size",
                     "sampler.last_step_size must be below %g: this sampler starts at t = %.4g", 1 - iv.t0, iv.t0);
}

int sampler_check(const struct sampler_spec *spec, const struct sampler_model *model, struct err *err) {
    int rc = one_of((int)spec->type, SAMPLER_TYPE_COUNT, "sampler.type", err);
    if (!rc) rc = one_of((int)spec->method, METHOD_COUNT, "sampler.method", err);
    if (!rc) rc = one_of((int)spec->path, PATH_COUNT, "interpolant", err);
    if (!rc) rc = one_of((int)model->path, PATH_COUNT, "model.path", err);
    if (!rc) rc = one_of((int)model->prediction, PRED_COUNT, "model.prediction", err);
    if (!rc) rc = spec->type == SAMPLER_ODE ? check_ode(spec, err) : check_sde(spec, model, err);
    return rc ? rc : check_guidance(spec, err);
}

int sampler_notes(const struct sampler_spec *spec, const struct sampler_model *model, const char **notes, int max) {
    struct interval iv;
    interval_of(spec, model, &iv);
    int n = 0;
    for (int i = 0; i < NOTE_COUNT && n < max; i++)
        if (iv.notes >> i & 1) notes[n++] = interval_note((enum note)i);
    return n;
}

int sampler_evaluations(const struct sampler_spec *spec, const struct sampler_model *model) {
    (void)model;
    if (adaptive(spec)) return spec->max_evaluations < DOPRI5_ESTIMATE ? spec->max_evaluations : DOPRI5_ESTIMATE;
    if (spec->type == SAMPLER_ODE) return spec->steps * ode_stages(spec->method);
    int n = sde_steps(spec);
    return n * ode_stages(spec->method) + (spec->steps - n);
}

int sampler_peak_rows(const struct sampler_spec *spec) { return spec->guidance == 1 ? 1 : 2; }

/* shared by the families */

double sampler_grid(const struct sampler *s, int i, int n) {
    if (!s->spec.replay) return i == n ? s->t1 : s->t0 + (s->t1 - s->t0) * ((double)i / n);
    // torch.linspace of n + 1 points: the halves run from the ends inwards
    float a = (float)s->t0, b = (float)s->t1, step = (b - a) / (float)n;
    return i < (n + 1) / 2 ? a + step * (float)i : b - step * (float)(n - i);
}

struct sampler_assign *sampler_assign_to(struct sampler_step *out, int dst) {
    struct sampler_assign *as = &out->assign[out->n++];
    memset(as, 0, sizeof *as);
    as->dst = dst;
    return as;
}

void sampler_ask(const struct sampler *s, struct sampler_step *out, int in, double t, struct convert_at *at) {
    const struct sampler_spec *spec = &s->spec;
    convert_eval(spec->path, &s->model, t, at);
    out->evaluate = true;
    out->in = in;
    out->in_scale = at->in_scale;
    out->t = at->t;
    out->time = t;
    double judged = fmin(t, 1); // a replayed dopri5 steps past the end, guided as it was up to there
    out->guidance = judged >= spec->guide_from && judged <= spec->guide_to ? spec->guidance : 1;
}

/* running */

// A VP model sampled on linear or GVP starts inside the interval, with the noise that makes x/k standard normal: what it sees at
// VP's own t = 0.
static double start_scale(const struct sampler *s) {
    if (s->model.path != PATH_VP || s->spec.path == PATH_VP) return 1;
    struct convert_at at;
    convert_eval(s->spec.path, &s->model, s->t0, &at);
    return 1 / at.in_scale;
}

int sampler_start(struct sampler *s, const struct sampler_spec *spec, const struct sampler_model *model, bool start_given,
                  struct err *err) {
    int rc = sampler_check(spec, model, err);
    if (rc) return rc;
    struct interval iv;
    interval_of(spec, model, &iv);
    *s = (struct sampler){ .spec = *spec, .model = *model, .t0 = iv.t0, .t1 = iv.t1, .t = iv.t0 };
    if (spec->replay) { // the recorder's points are float32, the ends among them
        s->t0 = s->t = (float)iv.t0;
        s->t1 = (float)iv.t1;
    }
    s->estimate = sampler_evaluations(spec, model);
    s->keep[0] = start_scale(s);
    s->keep[1] = start_given;
    s->phase = start_given && s->keep[0] == 1 ? PHASE_RUN : PHASE_START;
    return OK;
}

static int begin(struct sampler *s, struct sampler_step *out) {
    struct sampler_assign *as = sampler_assign_to(out, SAMPLER_X);
    if (s->keep[1] != 0) as->c[SAMPLER_X] = s->keep[0];
    else as->c_noise = s->keep[0];
    out->time = s->t0;
    s->phase = PHASE_RUN;
    return 1;
}

static int check_step(const struct sampler_step *out, struct err *err) {
    double sum = out->in_scale + out->t;
    for (int a = 0; a < out->n; a++) {
        sum += out->assign[a].c_out + out->assign[a].c_noise;
        for (int j = 0; j < SAMPLER_COLS; j++) sum += out->assign[a].c[j];
    }
    return isfinite(sum) ? OK : err_set(err, E_NONFINITE, "a coefficient of the sampler is not finite at t = %.9g", out->time);
}

// dopri5: the evaluations that the whole interval would take at the present rate.
static void estimate_again(struct sampler *s) {
    double done = (s->t - s->t0) / (s->t1 - s->t0), all = done > 0 ? s->evaluations / done : s->estimate;
    if (all < s->evaluations + 6) all = s->evaluations + 6;
    if (all > s->spec.max_evaluations) all = s->spec.max_evaluations;
    s->estimate = s->phase == PHASE_DONE ? s->evaluations : (int)ceil(all);
}

int sampler_next(struct sampler *s, const double *norms, struct sampler_step *out, struct err *err) {
    memset(out, 0, sizeof *out);
    out->guidance = 1;
    if (s->phase == PHASE_START) return begin(s, out);
    if (s->phase == PHASE_DONE) return 0;
    int rc = adaptive(&s->spec)            ? dopri5_next(s, norms, out, err)
             : s->spec.type == SAMPLER_ODE ? ode_next(s, out)
                                           : sde_next(s, out);
    if (rc == 0) s->phase = PHASE_DONE;
    if (rc <= 0) return rc;
    rc = check_step(out, err);
    if (rc) return rc;
    s->evaluations += out->evaluate;
    if (adaptive(&s->spec)) estimate_again(s);
    return 1;
}

int sampler_left(const struct sampler *s) {
    int left = s->estimate - s->evaluations;
    return left > 0 ? left : 0;
}

double sampler_progress(const struct sampler *s) {
    if (s->phase == PHASE_DONE) return 1;
    if (adaptive(&s->spec)) return (s->t - s->t0) / (s->t1 - s->t0);
    return s->estimate > 0 ? (double)s->evaluations / s->estimate : 1;
}
