// SPDX-License-Identifier: MIT
/*
 * What the trainer's files share and nobody else includes.
 *
 *   trainer.c        the loop: a step, what follows it
 *   trainer_open.c   device, data, network, arrays; where the run begins
 */
#ifndef SITD_TRAINER_INT_H
#define SITD_TRAINER_INT_H
#include "core/train/feed.h"
#include "core/train/keeper.h"
#include "core/train/trainer.h"

struct trainer {
    const struct train_config *c;
    struct train_events on;
    struct parallel_spec ranks; // size 1: alone
    struct parallel *parallel;  // NULL: alone
    struct kern *k;
    const struct data *data;
    struct feed *feed;
    struct dit_train *net;
    int local, rows, micros; // images a step of this process, rows a microbatch, microbatches
    size_t numel, out_ld, n; // floats of an image, of a row of the output, of a flat array
    double flops;            // of a step of this process; peak: of the device a second, 0 unknown
    double peak;
    /* buffers */
    float *array[SNAPSHOT_ARRAYS]; // weights (the network's), moments, EMAs
    struct parallel_piece whole;   // of them all, for a process alone
    float *x1, *x0;                // [rows, numel] each
    double *norm2, *moved2;        // one each; the step's numbers lie in one buffer, that begins with norm2
    float *loss;                   // [local, 2]
    /* host */
    struct objective_row *row; // [local]
    struct kern_mix *mix;      // [rows], as the next three
    struct kern_loss *judge;
    float *time;
    int32_t *label;
    double *host; // the step's numbers: norm2, moved2, then loss
    struct snapshot snapshot;
    struct keeper keeper;
    bool held;   // the snapshot is that of `step`
    bool unread; // a step was not begun: its data cannot be read
    const volatile sig_atomic_t *stop;
    bool well;     // ended as every rank does
    bool stopping; // some rank was told to stop: all know it in the same step
    /* the run */
    int64_t step, saved, reported; // finished steps; of the last checkpoint; of the last line of the log
    struct objective_bins bins;
    double best;
    struct {
        double loss, mse, vb, grad, moved;
    } sum; // since the last report
    struct loss_window window;
    int64_t began_step; // of this process
    double began, reported_at;
};

int trainer_kern(struct trainer *, int rc, struct err *); // a kern status as ours
static inline size_t trainer_numbers(const struct trainer *t) { return 2 * sizeof(double) + (size_t)t->local * 2 * sizeof(float); } // bytes
// All arrays to the host; the writer must not be at work.
int trainer_fill(struct trainer *, struct err *);
void trainer_tell(struct trainer *, enum train_note, int64_t step, const char *text);

#endif
