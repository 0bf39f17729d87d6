// SPDX-License-Identifier: MIT
/*
 * objective: what a network is trained for, as one row of numbers an image: its time, its label, how it is noised, how its output
 * is judged.
 *
 * Continuous (SiT paper sec. 3, transport/transport.py): t in [0, 1], 1 is data; linear, GVP or VP. By what the network says,
 * with the mean over an image's numbers:
 *
 *   - velocity  |F - (alpha' x1 + sigma' x0)|^2
 *   - noise     w |F - x0|^2
 *   - score     w |sigma F + x0|^2
 *
 * w = 1 (none), (V/sigma)^2 ("velocity") or V/sigma^2 ("likelihood"), V as in path.h. t is drawn from [0, 1] for velocity on
 * linear and GVP, from [0.001, 0.999] for noise and score there, from [0, 0.99999] on VP.
 *
 * Discrete (DiT, diffusion/gaussian_diffusion.py): k of 1000 times, 0 is data; the network says the noise: |F - x0|^2, and with a
 * learned range the variational bound in bits beside it (Nichol and Dhariwal 2021), whose gradient reaches the range only.
 *
 * Everything drawn for an image depends on (seed, step, index of the image in the step's whole batch) only, by Philox: neither on
 * how a step is cut into microbatches or devices, nor on what was drawn before. Noise is Z(seed, index, step) (kern_mix); time
 * and label drop come from the block (0, step, index, 1). All in double; pure functions; any thread.
 */
#ifndef SITD_OBJECTIVE_H
#define SITD_OBJECTIVE_H
#include "core/base/err.h"
#include "core/diffusion/path.h"
#include "core/io/model_dir.h"
#include "kernels/kern.h"

enum weighting { WEIGHTING_NONE, WEIGHTING_VELOCITY, WEIGHTING_LIKELIHOOD, WEIGHTING_COUNT };
enum density { DENSITY_UNIFORM, DENSITY_LOGIT_NORMAL, DENSITY_COUNT }; // of the time
const char *weighting_name(enum weighting);                            // "none", "velocity", "likelihood"
int weighting_parse(const char *);                                     // or -1; any letter case
const char *density_name(enum density);                                // "uniform", "logit-normal"
int density_parse(const char *);

struct objective {
    bool discrete;       // DiT's 1000 times, else a path
    enum path_kind path; // these three: continuous only
    enum prediction prediction;
    enum weighting weighting; // of noise and score
    bool learned_range;       // discrete only: the second half of the output is the variance's, and learns
    enum density density;
    double mean, std; // logit-normal: 1/(1 + exp(-(mean + std*normal))) of the range of time, continuous or discrete
    double drop;      // probability that a label is replaced by null_label
    int32_t null_label;
    uint64_t seed;
};

struct objective_row {
    float t; // as the network takes it
    int32_t y;
    struct kern_mix mix;
    struct kern_loss loss;
    double place;    // of t in [0, 1], for bins
    double velocity; // continuous: times loss[0] is the velocity's loss (path.h turns one error into the other)
};

// E_RANGE or E_CONFLICT with the field in err.param ("weighting", "std", "drop", ...).
int objective_check(const struct objective *, struct err *);
// Image `index` of step `step`, whose label is y. grad: what the image counts in the loss, 1/(images a step).
void objective_row(const struct objective *, uint32_t step, uint32_t index, int32_t y, double grad, struct objective_row *);
// The same at a given time (discrete: a whole one), label and noise left to the caller: evaluation, replay.
void objective_row_at(const struct objective *, double t, int32_t y, double grad, struct objective_row *);

/*
 * The loss by time: a running mean a bin of equal width. Plain numbers, to be kept in checkpoints.
 */
#define OBJECTIVE_BINS 32
struct objective_bins {
    double loss[OBJECTIVE_BINS], count[OBJECTIVE_BINS];
};
// loss: of one image. Beyond 10,000 images in a bin old ones fade.
void objective_bins_add(struct objective_bins *, double place, double loss);
// The bins that have seen images, as knots at their middles: model.json's loss_curve, where `loss` was the velocity's. Returns
// how many.
int objective_bins_curve(const struct objective_bins *, struct loss_knot out[OBJECTIVE_BINS]);

#endif
