// SPDX-License-Identifier: MIT
/*
 * The common part: names, defaults, the grid, the first move, the last one, and the guards around every step (guidance interval,
 * finite coefficients, counting). check.c has the ranges.
 */
#include "core/diffusion/solver.h"

#include <limits.h>
#include <math.h>
#include <string.h>

#define DOPRI5_ESTIMATE 62 // first guess of dopri5's evaluations: ten steps
#define INTERVAL_SLACK 1e-9 // a grid's 0.96 * (6.0 / 24) is not the 0.24 of a request, but means it

static const char *const type_names[SAMPLER_TYPE_COUNT] = {"ode", "sde", "ddpm", "ddim", "edm"};
static const char *const method_names[METHOD_COUNT] = {"euler", "heun", "midpoint", "rk4", "dopri5", "exponential", "dpmpp2m"};
static const char *const form_names[W_COUNT] = {"constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing",
                                                "kl-eta", "knots"};
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

bool solver_adaptive(const struct sampler_spec *spec) { return spec->type == SAMPLER_ODE && spec->method == METHOD_DOPRI5; }

bool solver_discrete(const struct sampler_spec *spec, const struct sampler_model *m) {
    return m->kind == MODEL_DISCRETE && (spec->type == SAMPLER_DDPM || spec->type == SAMPLER_DDIM);
}

bool solver_exponential(const struct sampler_spec *spec, const struct sampler_model *m) {
    if (spec->type == SAMPLER_DDIM) return !solver_discrete(spec, m);
    return spec->type == SAMPLER_ODE && (spec->method == METHOD_EXPONENTIAL || spec->method == METHOD_DPMPP2M);
}

bool solver_denoises(const struct sampler_spec *spec, const struct sampler_model *m) {
    return spec->type == SAMPLER_ODE && spec->denoise && !solver_exponential(spec, m);
}

bool solver_leads(const struct sampler_spec *spec, const struct sampler_model *m) {
    return spec->type == SAMPLER_ODE && spec->path == PATH_VP && m->kind == MODEL_PATH && m->path != PATH_VP && m->prediction == PRED_VELOCITY;
}

enum path_kind sampler_home_path(const struct sampler_model *m) {
    return m->kind == MODEL_DISCRETE ? PATH_VP : m->kind == MODEL_EDM ? PATH_LINEAR : m->path;
}

enum sampler_type sampler_home_type(const struct sampler_model *m) {
    return m->kind == MODEL_DISCRETE ? SAMPLER_DDPM : m->kind == MODEL_EDM ? SAMPLER_EDM : SAMPLER_ODE;
}

void sampler_defaults(struct sampler_spec *spec, const struct sampler_model *model, enum sampler_type type) {
    static const int steps[SAMPLER_TYPE_COUNT] = {50, 250, 250, 50, 40};
    double least, most;
    convert_range(model, &least, &most);
    *spec = (struct sampler_spec){
        .type = type,
        .method = type == SAMPLER_ODE || type == SAMPLER_EDM ? METHOD_HEUN : METHOD_EULER,
        .steps = steps[type],
        .denoise = model->kind != MODEL_PATH,
        .max_evaluations = 1000,
        .path = sampler_home_path(model),
        .w_t = W_SIGMA,
        .w_t_scale = 1,
        .last = LAST_MEAN,
        .last_size = 0.04,
        .atol = 1e-6,
        .rtol = 1e-3,
        .s_max = INFINITY,
        .s_noise = 1,
        .rho = 7,
        .sigma_min = fmax(0.002, 1 / most),
        .sigma_max = least > 0 ? fmin(80, 1 / least) : 80,
        .guidance = 1,
        .guide_from = 0,
        .guide_to = 1,
        .guide_channels = INT_MAX,
    };
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
    int ends = solver_leads(spec, model) + solver_denoises(spec, model);
    if (solver_adaptive(spec)) return (spec->max_evaluations < DOPRI5_ESTIMATE ? spec->max_evaluations : DOPRI5_ESTIMATE) + ends;
    if (spec->type == SAMPLER_EDM) return edm_evaluations(spec);
    if (solver_exponential(spec, model) || solver_discrete(spec, model)) return spec->steps + ends;
    if (spec->type == SAMPLER_ODE) return spec->steps * ode_stages(spec->method) + ends;
    int n = sde_steps(spec);
    return n * ode_stages(spec->method) + (spec->steps - n);
}

int sampler_peak_rows(const struct sampler_spec *spec) { return spec->guidance == 1 ? 1 : 2; }

/* shared by the families */

double sampler_grid(const struct sampler *s, int i, int n) {
    if (!s->spec.replay) return i == n ? s->t1 : s->t0 + (s->t1 - s->t0) * ((double)i / n);
    // torch.linspace of n + 1 points: the halves run from the ends inwards, each product meets its sum unrounded
    float a = (float)s->t0, b = (float)s->t1, step = (b - a) / (float)n;
    return i < (n + 1) / 2 ? fmaf(step, (float)i, a) : fmaf(-step, (float)(n - i), b);
}

struct sampler_assign *sampler_assign_to(struct sampler_step *out, int dst) {
    struct sampler_assign *as = &out->assign[out->n++];
    memset(as, 0, sizeof *as);
    as->dst = dst;
    return as;
}

void sampler_add(struct sampler_assign *as, int in, double weight, struct lin l) {
    as->c[in] += weight * l.x;
    as->c_out += weight * l.f;
}

static void ask(const struct sampler *s, struct sampler_step *out, int in, double in_scale, double t, double time) {
    const struct sampler_spec *spec = &s->spec;
    out->evaluate = true;
    out->in = in;
    out->in_scale = in_scale;
    out->t = t;
    out->time = time;
    double judged = fmin(time, 1); // a replayed dopri5 steps past the end, guided as it was up to there
    bool inside = judged >= spec->guide_from - INTERVAL_SLACK && judged <= spec->guide_to + INTERVAL_SLACK;
    out->guidance = inside ? spec->guidance : 1;
}

void sampler_ask(const struct sampler *s, struct sampler_step *out, int in, double t, struct convert_at *at) {
    convert_eval(s->spec.path, &s->model, t, at);
    ask(s, out, in, at->in_scale, at->t, t);
}

void sampler_ask_net(const struct sampler *s, struct sampler_step *out, int in, double alpha, double sigma, struct convert_net *net) {
    convert_net(&s->model, alpha, sigma, net);
    ask(s, out, in, net->in_scale, net->t, alpha / (alpha + sigma));
}

/* running */

// The size of the first noise. A model that begins inside the interval starts with what it sees at home: there k = 1 and its noise has
// size 1, an EDM model's the size of its first sigma.
static double start_scale(const struct sampler *s) {
    const struct sampler_model *m = &s->model;
    if (s->spec.type == SAMPLER_EDM) return s->spec.sigma_max;
    if (s->t0 == 0 || (m->kind == MODEL_PATH && (m->path != PATH_VP || s->spec.path == PATH_VP))) return 1;
    struct path_at at;
    struct convert_net net;
    path_eval(s->spec.path, s->t0, &at);
    convert_net(m, at.alpha, at.sigma, &net);
    return m->kind == MODEL_EDM ? at.sigma : net.k;
}

int sampler_start(struct sampler *s, const struct sampler_spec *spec, const struct sampler_model *model, bool start_given,
                  struct err *err) {
    int rc = sampler_check(spec, model, err);
    if (rc) return rc;
    struct interval iv;
    interval_of(spec, model, &iv);
    *s = (struct sampler){.spec = *spec, .model = *model, .t0 = iv.t0, .t1 = iv.t1, .asked = iv.asked, .t = iv.t0};
    if (spec->replay) { // the recorder's points are float32, the ends among them
        s->t0 = s->t = (float)iv.t0;
        s->t1 = (float)iv.t1;
    }
    s->estimate = sampler_evaluations(spec, model) - (start_given && solver_leads(spec, model));
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
    s->phase = s->keep[1] == 0 && solver_leads(&s->spec, &s->model) ? PHASE_LEAD : PHASE_RUN;
    return 1;
}

// From pure noise to where the path begins.
static int lead(struct sampler *s, struct sampler_step *out) {
    struct convert_net net;
    struct path_at at;
    path_eval(s->spec.path, s->t0, &at);
    sampler_ask_net(s, out, SAMPLER_X, 0, 1, &net);
    struct sampler_assign *as = sampler_assign_to(out, SAMPLER_X);
    as->c[SAMPLER_X] = at.sigma;
    sampler_add(as, SAMPLER_X, at.alpha, net.data);
    s->phase = PHASE_RUN;
    return 1;
}

// x1-hat at the end of an ODE.
static int denoise(struct sampler *s, struct sampler_step *out) {
    struct convert_at at;
    sampler_ask(s, out, SAMPLER_X, s->t1, &at);
    sampler_add(sampler_assign_to(out, SAMPLER_X), SAMPLER_X, 1, at.data);
    s->t = s->t1;
    s->phase = PHASE_DONE;
    return 1;
}

static int check_step(const struct sampler_step *out, struct err *err) {
    double sum = out->in_scale + out->t + out->log_lo + out->log_span + out->clip.c_out + out->clip.c[SAMPLER_X];
    for (int a = 0; a < out->n; a++) {
        sum += out->assign[a].c_out + out->assign[a].c_clip + out->assign[a].c_noise;
        for (int j = 0; j < SAMPLER_COLS; j++) sum += out->assign[a].c[j];
    }
    return isfinite(sum) ? OK : err_set(err, E_NONFINITE, "a coefficient of the sampler is not finite at t = %.9g", out->time);
}

// dopri5: the evaluations that the whole interval would take at the present rate.
static void estimate_again(struct sampler *s) {
    double done = (s->t - s->t0) / (s->t1 - s->t0), all = done > 0 ? s->evaluations / done : s->estimate;
    if (all < s->evaluations + 6) all = s->evaluations + 6;
    if (all > s->spec.max_evaluations) all = s->spec.max_evaluations;
    if (s->phase >= PHASE_DENOISE) all = s->evaluations;
    s->estimate = (int)ceil(all) + (s->phase < PHASE_DONE && solver_denoises(&s->spec, &s->model));
}

static int family_next(struct sampler *s, const double *norms, struct sampler_step *out, struct err *err) {
    if (solver_discrete(&s->spec, &s->model)) return discrete_next(s, out);
    if (solver_exponential(&s->spec, &s->model)) return exponential_next(s, out);
    if (s->spec.type == SAMPLER_EDM) return edm_next(s, out);
    if (solver_adaptive(&s->spec)) return dopri5_next(s, norms, out, err);
    return s->spec.type == SAMPLER_ODE ? ode_next(s, out) : sde_next(s, out);
}

int sampler_next(struct sampler *s, const double *norms, struct sampler_step *out, struct err *err) {
    memset(out, 0, sizeof *out);
    out->guidance = 1;
    if (s->phase == PHASE_START) return begin(s, out);
    if (s->phase == PHASE_DONE) return 0;
    int rc = s->phase == PHASE_LEAD ? lead(s, out) : s->phase == PHASE_DENOISE ? denoise(s, out) : family_next(s, norms, out, err);
    if (rc == 0 && solver_denoises(&s->spec, &s->model)) rc = denoise(s, out);
    if (rc == 0) s->phase = PHASE_DONE;
    if (rc <= 0) return rc;
    rc = check_step(out, err);
    if (rc) return rc;
    s->evaluations += out->evaluate;
    if (solver_adaptive(&s->spec)) estimate_again(s);
    return 1;
}

int sampler_left(const struct sampler *s) {
    int left = s->estimate - s->evaluations;
    return left > 0 ? left : 0;
}

double sampler_progress(const struct sampler *s) {
    if (s->phase == PHASE_DONE) return 1;
    if (solver_adaptive(&s->spec)) return (s->t - s->t0) / (s->t1 - s->t0);
    return s->estimate > 0 ? (double)s->evaluations / s->estimate : 1;
}
