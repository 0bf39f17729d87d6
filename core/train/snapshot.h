// SPDX-License-Identifier: MIT
/*
 * snapshot: the whole state of a training run in host memory, and the files that hold it.
 *
 * A file is safetensors. Tensors, for each parameter NAME (the authors' names): model.NAME, exp_avg.NAME and exp_avg_sq.NAME
 * (AdamW's moments), ema.NAME and, with several decays, ema1.NAME and so on; loss_by_time [2, bins]. __metadata__: kind
 * "sitd-train", step (finished steps: it is the random numbers' and the data's position too), best, window_loss and window_steps
 * (what --publish-when improved compares; older files lack the window), checksum (of the parameters' tensors; older files lack it), and what a run that continues it must have in common with
 * it (config.h's facts). Written under a temporary name, synced, renamed: a file of that name is
 * whole.
 *
 * The authors' training checkpoints (.pt of DiT and SiT: model, ema, opt) are read too. Thread: one at a time; several may read
 * one.
 */
#ifndef SITD_TRAIN_SNAPSHOT_H
#define SITD_TRAIN_SNAPSHOT_H
#include "core/train/config.h"

enum { SNAPSHOT_WEIGHTS, SNAPSHOT_MOMENT1, SNAPSHOT_MOMENT2, SNAPSHOT_EMA, SNAPSHOT_ARRAYS = SNAPSHOT_EMA + KERN_MAX_EMA };

struct loss_window { // the steps since a publication was last due
    double loss;     // summed over them
    int64_t steps;
};

struct snapshot {
    const struct dit_train *net; // names, shapes and places
    size_t n;                    // floats of an array
    int n_arrays;
    float *array[SNAPSHOT_ARRAYS];
    int64_t step;
    double best; // lowest mean loss at a publication; infinite before the first
    struct loss_window window;
    struct objective_bins bins;
};

int snapshot_new(struct snapshot *, const struct dit_train *, int n_ema, struct err *);
void snapshot_free(struct snapshot *);
int snapshot_write(const struct snapshot *, const char *path, const struct train_config *, struct err *);
// A run continues: fills everything. E_CONFLICT names the option (param) in which the file and the configuration differ;
// E_FORMAT, E_NONFINITE.
int snapshot_read(struct snapshot *, const char *path, const struct train_config *, struct err *);
// A run begins from a file's weights (its EMA where it has one), any that checkpoint_open reads or one of ours: weights and EMAs
// are set, the rest stays as it is. A label table of another number of classes is left out: its rows keep the values that
// array[SNAPSHOT_WEIGHTS] has.
int snapshot_init(struct snapshot *, const char *path, const struct train_config *, struct err *);

#endif
