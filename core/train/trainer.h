// SPDX-License-Identifier: MIT
/*
 * trainer: a training run, from data to checkpoints.
 *
 * One step: the batch in microbatches (noise mixed in, forward, loss, backward: gradients add up), gradients summed over
 * processes, their norm, AdamW and EMA in one pass (each process for its share, parallel.h), the network's copies refreshed.
 * Then, by the step's number: a line of the log, a picture of samples, a checkpoint, a publication. What a step draws depends on
 * (seed, step) alone; so a run that is cut and continued from a checkpoint does on the CPU bit for bit what one that was never cut
 * does.
 *
 * Numbers that are not finite stop the run before they reach a checkpoint: E_NONFINITE with the step, the first tensor whose
 * gradient is bad (param), and the last good checkpoint. Thread: one; the callbacks run on it.
 */
#ifndef SITD_TRAIN_TRAINER_H
#define SITD_TRAIN_TRAINER_H
#include <signal.h>

#include "core/train/config.h"
#include "core/train/data.h"
#include "core/train/parallel.h"

struct trainer;

struct train_stats { // means since the last ones
    int64_t step;    // finished
    double epoch, loss, mse, vb, grad_norm, update_norm, lr;
    double images_per_second, mfu; // mfu: of the device's peak, 0 where it is not known
    double seconds_left;
    const double *loss_by_time; // [OBJECTIVE_BINS] running, velocity's where time is continuous; borrowed
};
enum train_note { NOTE_SAVED, NOTE_PUBLISHED, NOTE_PICTURES, NOTE_TROUBLE }; // TROUBLE: something failed, the run goes on
struct train_events {
    void *ctx;
    void (*stats)(void *ctx, const struct train_stats *);                    // every log_every steps
    void (*step)(void *ctx, int64_t step, double loss, double seconds_left); // every step, for a line on a terminal
    void (*note)(void *ctx, enum train_note, int64_t step, const char *text);
};

// Opens the device, makes the network, meets the other ranks, begins or continues. Config and data must outlive the trainer; ranks
// NULL or of size 1: alone. Ranks share a batch and keep equal weights; rank 0 alone writes. Errors as of its parts; a microbatch
// that does not fit is E_NOMEM with one that does; a checkpoint beyond the last step is E_CONFLICT, one of the last step a run that
// is done.
int trainer_new(struct trainer **, const struct train_config *, const struct data *, const struct parallel_spec *ranks,
                const struct train_events *, struct err *);
void trainer_free(struct trainer *); // NULL is fine; waits for the writer
// To the last step, or until *stop is set; saves a checkpoint either way. OK, E_NONFINITE, E_DEVICE, E_IO (the last checkpoint
// failed), ...
int trainer_run(struct trainer *, const volatile sig_atomic_t *stop, struct err *);

int64_t trainer_step(const struct trainer *); // finished steps
const char *trainer_device(const struct trainer *);
size_t trainer_params(const struct trainer *); // learned numbers
const float *trainer_weights(struct trainer *, int array,
                             struct err *); // a snapshot's array (snapshot.h), for tests; NULL: failed

#endif
