// SPDX-License-Identifier: MIT
/*
 * feed: worker threads that read examples ahead of the trainer, so that the device never waits for a decoder.
 *
 * A step takes `batch` examples in the order of the data; this process has `local` of them from `first` on (data parallel ranks
 * share a batch), in microbatches of `rows`. Microbatch q of the run holds positions that depend on q alone, so how many threads
 * there are and how far they run ahead changes nothing. Thread: all calls from one; the workers are its own.
 */
#ifndef SITD_TRAIN_FEED_H
#define SITD_TRAIN_FEED_H
#include "core/train/data.h"

struct feed;
struct feed_spec {
    uint64_t step;                 // the first step that will be asked for
    int batch, first, local, rows; // local is a multiple of rows
    int threads;                   // at least 1
};
struct feed_batch {       // borrowed until the next feed_next
    const float *x;       // [rows, C, I, I]
    const int32_t *label; // [rows]
    int first;            // place of its first example in the step's whole batch
};
// E_NOMEM, E_INTERNAL (no thread). The data must outlive the feed.
int feed_open(struct feed **, const struct data *, const struct feed_spec *, struct err *);
void feed_close(struct feed *); // NULL is fine
// The next microbatch; waits for it. A file that could not be read is an error here, when its turn has come.
int feed_next(struct feed *, struct feed_batch *, struct err *);

#endif
