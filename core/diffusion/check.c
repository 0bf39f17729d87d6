// SPDX-License-Identifier: MIT
/*
 * sampler_check: ranges and combinations. Whatever passes here runs to its end with finite coefficients (the tests sweep it);
 * what a model cannot do is refused with the field that asked for it and the reason, never replaced by something near.
 */
#include <math.h>

#include "core/diffusion/solver.h"

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
    if (!rc) rc = in_range(spec->atol, SAMPLER_MIN_ATOL, 1, "sampler.atol", err);
    return rc ? rc : in_range(spec->rtol, 0, 1, "sampler.rtol", err);
}

static int check_curve(const struct sampler_curve *c, double least, const char *param, struct err *err) {
    if (c->n < 1 || c->n > SAMPLER_KNOTS)
        return err_param(err, E_RANGE, param, "%s must be 1 to %d pairs [t, value], not %d", param, SAMPLER_KNOTS, c->n);
    for (int i = 0; i < c->n; i++) {
        if (!(c->t[i] >= 0 && c->t[i] <= 1) || (i > 0 && !(c->t[i] > c->t[i - 1])))
            return err_param(err, E_RANGE, param, "%s: the t of pair %d must be from 0 to 1 and above the one before", param, i);
        if (!(c->v[i] >= least && c->v[i] <= 1e6))
            return err_param(err, E_RANGE, param, "%s: the value of pair %d must be from %g to 1e+06", param, i, least);
    }
    return OK;
}

static int check_w_t(const struct sampler_spec *spec, const struct sampler_model *m, struct err *err) {
    int rc = one_of((int)spec->w_t, W_COUNT, "sampler.w_t", err);
    if (!rc) rc = above(spec->w_t_scale, 0, 1e6, "sampler.w_t_scale", err);
    if (rc) return rc;
    if (spec->w_t == W_KNOTS) return check_curve(&spec->knots, 0, "sampler.w_t", err);
    if (spec->w_t != W_KL_ETA) return OK;
    if (m->kind != MODEL_PATH || m->loss.n < 1)
        return err_param(
            err, E_RANGE, "sampler.w_t",
            "sampler.w_t kl-eta needs the measured loss of a model's velocity, which this model does not carry; kl does not");
    rc = check_curve(&m->loss, 1e-12, "model.loss", err);
    return rc ? rc : in_range(spec->w_t_eta, 0, 1e6, "sampler.w_t_eta", err);
}

static int check_sde(const struct sampler_spec *spec, const struct sampler_model *model, struct err *err) {
    if (spec->method != METHOD_EULER && spec->method != METHOD_HEUN)
        return err_param(err, E_RANGE, "sampler.method", "sampler.method of an sde is euler or heun, not %s",
                         sampler_method_name((int)spec->method));
    int rc = check_w_t(spec, model, err);
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

// ddpm, ddim and edm do not run along an interpolant unless ddim is asked of a model that has no steps of its own.
static int check_interpolant(const struct sampler_spec *spec, const struct sampler_model *m, struct err *err) {
    if (spec->path == sampler_home_path(m)) return OK;
    return err_param(err, E_RANGE, "interpolant",
                     "interpolant is not used by sampler.type %s with this model: it has a schedule of its own",
                     sampler_type_name((int)spec->type));
}

static int check_ddpm(const struct sampler_spec *spec, const struct sampler_model *m, struct err *err) {
    if (m->kind != MODEL_DISCRETE)
        return err_param(err, E_RANGE, "sampler.type",
                         "sampler.type ddpm needs a model of discrete times; for this one take sde, or ddim with eta 1");
    if (spec->eta != 0)
        return err_param(err, E_RANGE, "sampler.eta", "sampler.eta is ddim's; ddpm has its variance from the model");
    return OK;
}

static int check_ddim(const struct sampler_spec *spec, const struct sampler_model *m, struct err *err) {
    int rc = in_range(spec->eta, 0, 1, "sampler.eta", err);
    if (rc || m->kind == MODEL_DISCRETE) return rc;
    if (spec->spacing != SPACING_OPENAI)
        return err_param(err, E_RANGE, "sampler.spacing",
                         "sampler.spacing is for models of discrete times; this one takes even steps of the interpolant's t");
    return in_range(spec->steps, 1, SAMPLER_MAX_STEPS, "sampler.steps", err);
}

static int check_discrete(const struct sampler_spec *spec, const struct sampler_model *m, struct err *err) {
    int rc = one_of((int)spec->spacing, SPACING_COUNT, "sampler.spacing", err);
    if (!rc) rc = check_interpolant(spec, m, err);
    if (!rc) rc = in_range(spec->steps, 1, SCHEDULE_TIMES, "sampler.steps", err);
    if (rc || schedule_has(spec->spacing, spec->steps)) return rc;
    int n = spec->steps;
    while (n > 2 && !schedule_has(spec->spacing, n)) n--;
    if (n < 2) n = 2;
    return err_param(err, E_RANGE, "sampler.steps",
                     "sampler.steps %d is no whole stride of %d times, as sampler.spacing %s wants; %d is", spec->steps,
                     SCHEDULE_TIMES, spacing_name((int)spec->spacing), n);
}

// The largest sigma at which the network is asked: churn raises it.
static double edm_highest(const struct sampler_spec *spec) {
    double raised = spec->s_min <= spec->sigma_max ? fmin(spec->s_max, spec->sigma_max) : 0;
    return fmax(spec->sigma_max, raised * (1 + fmin(spec->churn / spec->steps, sqrt(2) - 1)));
}

static int check_sigmas(const struct sampler_spec *spec, const struct sampler_model *m, struct err *err) {
    double least = 0, most = INFINITY;
    int rc = above(spec->sigma_max, 0, 1e5, "sampler.sigma_max", err);
    if (!rc) rc = above(spec->sigma_min, 0, spec->sigma_max, "sampler.sigma_min", err);
    if (rc) return rc;
    if (m->kind != MODEL_EDM) convert_range(m, &least, &most);
    if (spec->sigma_min * most < 1 - 1e-9)
        return err_param(err, E_RANGE, "sampler.sigma_min",
                         "sampler.sigma_min must be at least %.6g: this model has not learned less", 1 / most);
    if (edm_highest(spec) * least > 1 + 1e-9)
        return err_param(err, E_RANGE, "sampler.sigma_max",
                         "sampler.sigma_max, after churn, must be at most %.6g: this model has not learned more", 1 / least);
    return OK;
}

static int check_edm(const struct sampler_spec *spec, const struct sampler_model *m, struct err *err) {
    if (spec->method != METHOD_EULER && spec->method != METHOD_HEUN)
        return err_param(err, E_RANGE, "sampler.method", "sampler.method of edm is heun or euler, not %s",
                         sampler_method_name((int)spec->method));
    int rc = check_interpolant(spec, m, err);
    if (!rc) rc = in_range(spec->steps, 1, SAMPLER_MAX_STEPS, "sampler.steps", err);
    if (!rc) rc = in_range(spec->churn, 0, 1e6, "sampler.churn", err);
    if (!rc) rc = in_range(spec->s_min, 0, INFINITY, "sampler.s_min", err);
    if (!rc) rc = in_range(spec->s_max, 0, INFINITY, "sampler.s_max", err);
    if (!rc) rc = in_range(spec->s_noise, 0, 100, "sampler.s_noise", err);
    if (!rc) rc = in_range(spec->rho, 0.1, 100, "sampler.rho", err);
    return rc ? rc : check_sigmas(spec, m, err);
}

static int check_type(const struct sampler_spec *spec, const struct sampler_model *model, struct err *err) {
    int rc = OK;
    switch (spec->type) {
    case SAMPLER_ODE:
        return check_ode(spec, err);
    case SAMPLER_SDE:
        return check_sde(spec, model, err);
    case SAMPLER_DDPM:
        rc = check_ddpm(spec, model, err);
        break;
    case SAMPLER_DDIM:
        rc = check_ddim(spec, model, err);
        break;
    default:
        return check_edm(spec, model, err);
    }
    return rc || model->kind != MODEL_DISCRETE ? rc : check_discrete(spec, model, err);
}

static int check_model(const struct sampler_model *m, struct err *err) {
    int rc = one_of((int)m->kind, MODEL_KIND_COUNT, "model.kind", err);
    if (!rc) rc = one_of((int)m->path, PATH_COUNT, "model.path", err);
    if (!rc) rc = one_of((int)m->prediction, PRED_COUNT, "model.prediction", err);
    return rc || m->kind != MODEL_EDM ? rc : above(m->sigma_data, 0, 1e3, "model.sigma_data", err);
}

int sampler_check(const struct sampler_spec *spec, const struct sampler_model *model, struct err *err) {
    int rc = one_of((int)spec->type, SAMPLER_TYPE_COUNT, "sampler.type", err);
    if (!rc) rc = one_of((int)spec->method, METHOD_COUNT, "sampler.method", err);
    if (!rc) rc = one_of((int)spec->path, PATH_COUNT, "interpolant", err);
    if (!rc) rc = check_model(model, err);
    if (!rc) rc = check_type(spec, model, err);
    return rc ? rc : check_guidance(spec, err);
}
