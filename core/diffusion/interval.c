// SPDX-License-Identifier: MIT
/*
 * Where a run begins and ends.
 *
 * On the model's own path these are the official ranges (SiT transport.check_interval with sample_eps 1e-3, or 0 for a velocity
 * model on linear and GVP). The daemon moves an end further only where the official code divides by zero:
 *   - the diffusion coefficient V(t) of "sbdm" is infinite at t = 0 of linear and GVP: a velocity model starts at 1e-3;
 *   - the second drift of SDE Heun without a last step would be evaluated at t = 1, where the score is infinite: it ends at
 *     1 - 1e-3;
 *   - a last step of size 0 would be evaluated at t = 1 too: the same end.
 * A replay follows the recorder and moves none of these.
 *
 * On another path than the model's: VP as the sampling path ends at 1 - 1e-3 (its sigma' is infinite at 1); a noise or score
 * model on linear or GVP keeps its official ends (1/alpha at 0; it never saw t beyond 0.999); a VP model starts where the
 * sampling path has the ratio alpha/sigma = 0.0066 that VP begins with, its noise scaled so that the network sees exactly what it
 * would see on VP, and ends at 1 (everything is finite there).
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
};

const char *interval_note(enum note n) { return texts[n]; }

static void note(struct interval *iv, enum note n) { iv->notes |= 1u << n; }

static void start_of(const struct sampler_spec *spec, const struct sampler_model *m, struct interval *iv) {
    iv->t0 = 0;
    if (spec->path == PATH_VP) return;
    if (m->path == PATH_VP) {
        iv->t0 = convert_start(spec->path, m->path);
        note(iv, spec->path == PATH_LINEAR ? NOTE_VP_START_LINEAR : NOTE_VP_START_GVP);
    } else if (m->prediction != PRED_VELOCITY) {
        iv->t0 = SOLVER_EPS;
        note(iv, NOTE_PREDICTION_ENDS);
    } else if (spec->type == SAMPLER_SDE && spec->w_t == W_SBDM && !spec->replay) {
        iv->t0 = SOLVER_EPS;
        note(iv, NOTE_SBDM_START);
    }
}

static void end_of(const struct sampler_spec *spec, const struct sampler_model *m, struct interval *iv) {
    bool last = spec->type == SAMPLER_SDE && spec->last != LAST_NONE;
    if (last && spec->last_size > 0) {
        iv->t1 = 1 - spec->last_size;
        return;
    }
    iv->t1 = 1 - SOLVER_EPS;
    if (spec->path == PATH_VP) note(iv, NOTE_VP_END);
    else if (m->path != PATH_VP && m->prediction != PRED_VELOCITY) note(iv, NOTE_PREDICTION_ENDS);
    else if (last && !spec->replay) note(iv, NOTE_ZERO_LAST);
    else if (spec->type == SAMPLER_SDE && spec->method == METHOD_HEUN && !spec->replay) note(iv, NOTE_HEUN_END);
    else iv->t1 = 1;
}

void interval_of(const struct sampler_spec *spec, const struct sampler_model *m, struct interval *iv) {
    iv->notes = 0;
    start_of(spec, m, iv);
    end_of(spec, m, iv);
}
