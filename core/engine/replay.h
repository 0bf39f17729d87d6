// SPDX-License-Identifier: MIT
/*
 * replay: re-runs a recorded case of another implementation and measures the difference.
 *
 * A case is one safetensors file: inputs and outputs as tensors, settings as __metadata__ (kind, family, config, then the sampler's own; the
 * recorder's names: "heun2", "SBDM", N points of an ODE are N-1 steps). The case says what the weights cannot (heads, path, prediction).
 * dopri5 is replayed by the recorder's conventions: one error norm over the whole batch, both guidance halves included, and the end read from
 * the interpolant. A case of kind "train" is one forward and backward pass: losses and gradients. An unknown kind of case is an error, not a skip. Thread: the one that owns the kern.
 */
#ifndef SITD_REPLAY_H
#define SITD_REPLAY_H
#include <stdbool.h>

#include "core/io/checkpoint.h"
#include "kernels/kern.h"

struct replay;
struct replay_result {
    double rel_l2, max_abs; // |ours - recorded| / |recorded| over all outputs of the case; largest difference
    double tolerance;       // what a float32 implementation of that kind of case meets: forward 1e-5, fixed steps and gradients 1e-4, dopri5 1e-3
    double loss;            // train: relative L2 of the losses, to be held against a tenth of the tolerance; rel_l2 and max_abs are those of the
    char worst[64];         // gradient that is farthest off, and this is its tensor; else 0 and ""
    bool finite;            // ours has no NaN or infinity
};

// model: a model directory or a bare checkpoint. heads > 0 overrides the case's. The kern is borrowed.
int replay_open(struct replay **, struct kern *, const char *model, int heads, struct err *);
void replay_close(struct replay *);
// E_UNSUPPORTED for a kind, family or setting that is not known here; E_CONFLICT where the case does not fit the weights.
int replay_case(struct replay *, const char *path, struct replay_result *, struct err *);

#endif
