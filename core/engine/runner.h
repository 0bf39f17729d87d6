// SPDX-License-Identifier: MIT
/*
 * runner: one network and its slots; executes sampler steps over rows.
 *
 * What the worker, `sitd sample` and `sitd replay` share: slots of columns on the back end, and runner_step, which makes one network evaluation
 * for all given slots at once and then moves their columns. Nothing here schedules, waits or knows of jobs. Thread: the one that owns the kern.
 * runner_step and runner_plan allocate nothing (noise that the kernels do not make excepted, once).
 */
#ifndef SITD_RUNNER_H
#define SITD_RUNNER_H
#include "core/diffusion/stream.h"
#include "core/io/model_dir.h"
#include "kernels/kern.h"

struct runner;

struct runner_slot { // one image in the making; the caller owns the array and keeps it from step to step
    int slot;             // 0 .. slots-1
    int32_t label;        // class id (null class allowed: num_classes)
    uint64_t seed;
    uint32_t image;       // Philox stream: (seed, image)
    struct sampler sampler;
    double norms[2];      // filled by runner_step when the step asked for norms
    bool has_norms;
    struct sampler_step next; // the step to be executed; planned by runner_plan
    int null_of;          // -1; replay only: this slot is the null half of guidance pair `null_of` (a place in the array given to runner_step): it
                          // shares that slot's network rows and keeps the null row's values in the unguided channels, as the authors' code does
    const float *noise;   // NULL: Philox; replay only: host memory, draw d of this slot at noise + d*numel (draw 0 is x0), noise_draws of them
    uint32_t noise_draws;
    struct stream *stream; // NULL: as above; else this image's noise comes from here, the caller's, started
    bool done;            // sampler finished: X is the sample
    struct err err;       // this image alone failed (dopri5 gave up); done is set too
};

// slots columns sets and buffers for max_rows network rows are reserved. arch, weights: as dit_new. All output channels are kept.
int runner_new(struct runner **, struct kern *, const struct arch *, const struct tensor_table *, int slots, int max_rows, struct err *);
void runner_free(struct runner *);
size_t runner_numel(const struct runner *);  // floats of an image: in_channels * input_size^2
size_t runner_bytes(const struct runner *);
int runner_max_rows(const struct runner *);

// Starts a slot (its slot, label, seed, image, null_of and noise are set) and plans its first step.
int runner_start(struct runner *, struct runner_slot *, const struct sampler_spec *, const struct sampler_model *, struct err *);
// One network evaluation of every given slot, its column moves and norms. No slot may be done. *rows: network rows used.
// Fails as a whole only if the back end fails.
int runner_step(struct runner *, struct runner_slot **, int n, int *rows, struct err *);
// Plans what comes next for each slot (and executes moves that need no network); sets done, and err where that image alone failed.
int runner_plan(struct runner *, struct runner_slot **, int n, struct err *);
// Column X of a slot to host memory [numel].
int runner_read(struct runner *, int slot, float *x, struct err *);

#endif
