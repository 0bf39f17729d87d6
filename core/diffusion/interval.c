// SPDX-License-Identifier: MIT
/*
 * Where a run begins and ends.
 *
 * On the model's own path these are the official ranges (SiT transport.check_interval with sample_eps 1e-3, or 0 for a velocity
 * model on linear and GVP). The daemon moves an end further only where the official code divides by zero:
 *   - the diffusion coefficient V(t) of "sbdm" is infinite at t = 0 of linear and GVP: a velocity model starts at 1e-3;
 *   - the second drift of SDE Heun without a last step would be evaluated at t = 1, where the score is infinite: it ends at
 *     1 - 1e-3;
 *   - a last step of size 0 (or below 1e-16, which is the same to 1 - size) would be evaluated at t = 1 too: the same end.
 * A replay follows the recorder and moves none of these.
 *
 * On another path than the model's: VP as the sampling path ends at 1 - 1e-3 (its sigma' is infinite at 1); a noise or score
 * model on linear or GVP keeps its official ends (1/alpha at 0; it never saw t beyond 0.999); a VP model starts where the
 * sampling path has the ratio alpha/sigma = 0.0066 that VP begins with, its noise scaled so that the network sees exactly what it
 * would see on VP, and ends at 1 (everything is finite there).
 *
 * A discrete-time model knows alpha/sigma from 0.0064 to 99.99, an EDM model from 1/80 to 500. A path is sampled from where it has
 * the first (the noise scaled as at home) to where it has the second, and one more evaluation there then gives x1-hat, unless the
 * run's last step was to begin earlier anyway.
 *
 * VP itself begins with a little of the data, alpha/sigma = 0.0066, where a velocity model on linear or GVP begins with noise alone. An ODE that
 * started there from the noise would follow another trajectory than the model's own path gives (3e-2 of the picture on fashion-sit). One exponential
 * step leads there: x = alpha x1-hat + sigma x0, x1-hat the model's answer to x0 at its t = 0, exact to the square of 0.0066.
 *
 * Steps of x1-hat (exponential, dpmpp2m, ddim) use neither velocities nor scores. They go to t = 1 on every path, since the last one
 * returns x1-hat; only the network is not asked beyond what it knows.
 */
#include "core/diffusion/solver.h"

static const char *const texts[NOTE_COUNT] = {
    [NOTE_PREDICTION_ENDS] = "A noise or score model is sampled between t = 0.001 and t = 0.999, where its velocity is finite.",
    [NOTE_VP_END] = "Sampling on the vp path ends at t = 0.999.",
    [NOTE_VP_START_LINEAR] =
        "The model's vp path begins with alpha/sigma = 0.0066, so sampling on the linear path starts at t = 0.0065.",
    [NOTE_VP_START_GVP] =
        "The model's vp path begins with alpha/sigma = 0.0066, so sampling on the gvp path starts at t = 0.0042.",
    [NOTE_SBDM_START] = "The diffusion coefficient of w_t sbdm is infinite at t = 0, so sampling starts at t = 0.001.",
    [NOTE_HEUN_END] = "SDE heun without a last step ends at t = 0.999, since the score is infinite at t = 1.",
    [NOTE_ZERO_LAST] = "A last step of size 0 is taken at t = 0.999, since the score is infinite at t = 1.",
    [NOTE_DISCRETE_START + PATH_LINEAR] =
        "The model's schedule begins with alpha/sigma = 0.0064, so sampling on the linear path starts at t = 0.0063.",
    [NOTE_DISCRETE_START + PATH_GVP] =
        "The model's schedule begins with alpha/sigma = 0.0064, so sampling on the gvp path starts at t = 0.0040.",
    [NOTE_DISCRETE_END + PATH_LINEAR] = "The model's schedule ends with alpha/sigma = 100, at t = 0.9901 of the linear path.",
    [NOTE_DISCRETE_END + PATH_GVP] = "The model's schedule ends with alpha/sigma = 100, at t = 0.9936 of the gvp path.",
    [NOTE_EDM_START + PATH_LINEAR] = "The model knows sigma up to 80, so sampling on the linear path starts at t = 0.0123.",
    [NOTE_EDM_START + PATH_GVP] = "The model knows sigma up to 80, so sampling on the gvp path starts at t = 0.0080.",
    [NOTE_EDM_START + PATH_VP] = "The model knows sigma up to 80, so sampling on the vp path starts at t = 0.0665.",
    [NOTE_EDM_END + PATH_LINEAR] = "The model knows sigma down to 0.002, which is t = 0.9980 of the linear path.",
    [NOTE_EDM_END + PATH_GVP] = "The model knows sigma down to 0.002, which is t = 0.9987 of the gvp path.",
    [NOTE_DENOISE] = "The result is the model's estimate of the data at the last time, one evaluation more than the steps make.",
    [NOTE_VP_LEAD] = "The vp path begins with alpha/sigma = 0.0066; one evaluation more leads there from the model's pure noise.",
};

const char *interval_note(enum note n) { return texts[n]; }

static void note(struct interval *iv, enum note n) { iv->notes |= 1u << n; }

static void start_of(const struct sampler_spec *spec, const struct sampler_model *m, struct interval *iv) {
    iv->t0 = 0;
    if (m->kind != MODEL_PATH) {
        iv->t0 = convert_start(spec->path, m);
        if (iv->t0 > 0) note(iv, (enum note)((m->kind == MODEL_EDM ? NOTE_EDM_START : NOTE_DISCRETE_START) + (int)spec->path));
        return;
    }
    if (spec->path == PATH_VP) return;
    if (m->path == PATH_VP) {
        iv->t0 = convert_start(spec->path, m);
        note(iv, spec->path == PATH_LINEAR ? NOTE_VP_START_LINEAR : NOTE_VP_START_GVP);
    } else if (m->prediction != PRED_VELOCITY) {
        iv->t0 = SOLVER_EPS;
        note(iv, NOTE_PREDICTION_ENDS);
    } else if (spec->type == SAMPLER_SDE && w_t_infinite_at_0(spec) && !spec->replay) {
        iv->t0 = SOLVER_EPS;
        note(iv, NOTE_SBDM_START);
    }
}

// What a model kind that ends before the path does makes of t1.
static void end_at_range(const struct sampler_spec *spec, const struct sampler_model *m, struct interval *iv) {
    double end = convert_end(spec->path, m);
    if (m->kind == MODEL_PATH || end >= iv->t1) return;
    iv->t1 = end;
    note(iv, (enum note)((m->kind == MODEL_EDM ? NOTE_EDM_END : NOTE_DISCRETE_END) + (int)spec->path));
}

static void end_of(const struct sampler_spec *spec, const struct sampler_model *m, struct interval *iv) {
    bool last = spec->type == SAMPLER_SDE && spec->last != LAST_NONE, path = m->kind == MODEL_PATH;
    if (last && 1 - spec->last_size < 1) { // what a double cannot tell from 0 is 0
        iv->t1 = 1 - spec->last_size;
        return;
    }
    iv->t1 = 1 - SOLVER_EPS;
    if (spec->path == PATH_VP) note(iv, NOTE_VP_END);
    else if (path && m->path != PATH_VP && m->prediction != PRED_VELOCITY) note(iv, NOTE_PREDICTION_ENDS);
    else if (path && last && !spec->replay) note(iv, NOTE_ZERO_LAST);
    else if (path && spec->type == SAMPLER_SDE && spec->method == METHOD_HEUN && !spec->replay) note(iv, NOTE_HEUN_END);
    else iv->t1 = 1;
}

void interval_of(const struct sampler_spec *spec, const struct sampler_model *m, struct interval *iv) {
    *iv = (struct interval){.t1 = 1, .asked = 1};
    if (spec->type == SAMPLER_EDM || solver_discrete(spec, m)) return; // they do not run along a path
    start_of(spec, m, iv);
    if (solver_exponential(spec, m)) {
        iv->asked = convert_end(spec->path, m);
    } else {
        end_of(spec, m, iv);
        end_at_range(spec, m, iv);
    }
    if (solver_leads(spec, m)) note(iv, NOTE_VP_LEAD);
    if (solver_denoises(spec, m)) note(iv, NOTE_DENOISE);
}
