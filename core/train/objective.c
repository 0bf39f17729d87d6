// SPDX-License-Identifier: MIT
#include "core/train/objective.h"

#include <math.h>
#include <string.h>
#include <strings.h>

#include "core/diffusion/schedule.h"
#include "kernels/philox.h"

#define ENDS_MOVED 1e-3 // SiT's train_eps of noise and score on linear and GVP
#define VP_END 1e-5     // and on VP
#define FADING 10000.0

static const char *const weightings[WEIGHTING_COUNT] = {"none", "velocity", "likelihood"};
static const char *const densities[DENSITY_COUNT] = {"uniform", "logit-normal"};

static int index_of(const char *const *names, int n, const char *s) {
    for (int i = 0; s && i < n; i++)
        if (strcasecmp(names[i], s) == 0) return i;
    return -1;
}

const char *weighting_name(enum weighting w) { return weightings[w]; }
const char *density_name(enum density d) { return densities[d]; }
int weighting_parse(const char *s) { return index_of(weightings, WEIGHTING_COUNT, s); }
int density_parse(const char *s) { return index_of(densities, DENSITY_COUNT, s); }

int objective_check(const struct objective *o, struct err *e) {
    if (!(o->drop >= 0 && o->drop <= 1)) return err_param(e, E_RANGE, "drop", "the label drop is %g, not a probability", o->drop);
    if (o->drop > 0 && o->null_label < 0)
        return err_param(e, E_CONFLICT, "drop", "labels are to be dropped, but the network has no null class");
    if (o->density == DENSITY_LOGIT_NORMAL && !(fabs(o->mean) <= 10))
        return err_param(e, E_RANGE, "mean", "the logit-normal's mean is %g, not -10 to 10", o->mean);
    if (o->density == DENSITY_LOGIT_NORMAL && !(o->std > 0 && o->std <= 10))
        return err_param(e, E_RANGE, "std", "the logit-normal's deviation is %g, not above 0 up to 10", o->std);
    if (o->weighting != WEIGHTING_NONE && (o->discrete || o->prediction == PRED_VELOCITY))
        return err_param(e, E_CONFLICT, "weighting", "only losses of noise and score on a path are weighted");
    if (o->learned_range && !o->discrete)
        return err_param(e, E_CONFLICT, "learned_range", "a variance is only learned in discrete time");
    return OK;
}

/* ---- at a time ---- */

static void discrete_at(const struct objective *o, int k, struct objective_row *row) {
    double abar = schedule_abar(k), before = schedule_abar(k - 1), beta = 1 - abar / before;
    // the posterior's variance is 0 at time 0: there time 1's stands in (gaussian_diffusion.py, posterior_log_variance_clipped)
    double abar1 = k > 0 ? abar : schedule_abar(1), before1 = k > 0 ? before : schedule_abar(0);
    double lo = log((1 - abar1 / before1) * (1 - before1) / (1 - abar1));
    row->mix.a1 = (float)sqrt(abar), row->mix.a0 = (float)sqrt(1 - abar);
    row->loss.c_out = 1, row->loss.c0 = -1, row->loss.weight = 1;
    row->place = (k + 0.5) / SCHEDULE_TIMES;
    if (!o->learned_range) return;
    row->loss.hybrid = true, row->loss.first = k == 0;
    row->loss.log_lo = row->loss.lv_true = (float)lo, row->loss.log_span = (float)(log(beta) - lo);
    row->loss.recip = (float)sqrt(1 / abar), row->loss.recip_m1 = (float)sqrt(1 / abar - 1);
    row->loss.posterior = (float)(beta * sqrt(before) / (1 - abar));
}

static void path_at_time(const struct objective *o, double t, struct objective_row *row) {
    struct path_at at;
    path_eval(o->path, t, &at);
    row->mix.a1 = (float)at.alpha, row->mix.a0 = (float)at.sigma;
    row->place = t;
    if (o->prediction == PRED_VELOCITY) {
        row->loss.c_out = 1, row->loss.c1 = (float)-at.d_alpha, row->loss.c0 = (float)-at.d_sigma;
        row->loss.weight = 1, row->velocity = 1;
        return;
    }
    bool noise = o->prediction == PRED_NOISE;
    row->loss.c_out = noise ? 1 : (float)at.sigma, row->loss.c0 = noise ? -1 : 1;
    double over = path_var_over_sigma(&at); // an error of the noise, or of sigma times the score, times this is the velocity's
    double w = o->weighting == WEIGHTING_VELOCITY ? over * over : o->weighting == WEIGHTING_LIKELIHOOD ? over / at.sigma : 1;
    row->loss.weight = (float)w;
    row->velocity = over * over / w;
}

void objective_row_at(const struct objective *o, double t, int32_t y, double grad, struct objective_row *row) {
    *row = (struct objective_row){.t = (float)t, .y = y, .loss.grad = (float)grad};
    if (o->discrete) discrete_at(o, (int)t, row);
    else path_at_time(o, (double)row->t, row); // the time that the network is told
}

/* ---- drawn ---- */

static double time_of(const struct objective *o, double place) {
    if (o->discrete) return fmin(floor(place * SCHEDULE_TIMES), SCHEDULE_TIMES - 1);
    if (o->path == PATH_VP) return place * (1 - VP_END);
    double eps = o->prediction == PRED_VELOCITY ? 0 : ENDS_MOVED;
    return eps + place * (1 - 2 * eps);
}

void objective_row(const struct objective *o, uint32_t step, uint32_t index, int32_t y, double grad, struct objective_row *row) {
    uint32_t x[4] = {0, step, index, 1};
    philox_rounds(x, (uint32_t)o->seed, (uint32_t)(o->seed >> 32));
    double u = ((double)x[0] + 0.5) * 0x1p-32, place = u;
    if (o->density == DENSITY_LOGIT_NORMAL) {
        float c, s;
        philox_cos_sin(x[1], &c, &s);
        place = 1 / (1 + exp(-(o->mean + o->std * (double)(philox_sqrt(philox_minus2_log(x[0])) * c))));
    }
    if (((double)x[2] + 0.5) * 0x1p-32 < o->drop) y = o->null_label;
    objective_row_at(o, time_of(o, place), y, grad, row);
    row->mix.seed = o->seed, row->mix.image = index, row->mix.draw = step;
}

/* ---- by time ---- */

void objective_bins_add(struct objective_bins *b, double place, double loss) {
    int i = (int)fmin(fmax(place * OBJECTIVE_BINS, 0), OBJECTIVE_BINS - 1);
    if (b->count[i] < FADING) b->count[i]++;
    b->loss[i] += (loss - b->loss[i]) / b->count[i];
}

int objective_bins_curve(const struct objective_bins *b, struct loss_knot out[OBJECTIVE_BINS]) {
    int n = 0;
    for (int i = 0; i < OBJECTIVE_BINS; i++)
        if (b->count[i] > 0) out[n++] = (struct loss_knot){(i + 0.5) / OBJECTIVE_BINS, b->loss[i]};
    return n;
}
