// SPDX-License-Identifier: MIT
/*
 * data: what a network learns from, as numbered examples, whatever they are kept as.
 *
 *   IDX       a folder with train-images-idx3-ubyte and train-labels-idx1-ubyte (.gz or plain), or such a file of images: MNIST
 * and its kin pictures  a folder of folders, one a class in the order of their names, of PNG and JPEG files in the order of
 * theirs (sitd encode's order) latents   a safetensors file, or a folder of them (shards, in the order of their names): mean and
 * logvar of a VAE's posterior, as sitd encode writes them
 *
 * An example is [C, I, I] floats and a label. Pixels become -1..1. IDX pictures smaller than the wanted side are put in the
 * middle of black; other pictures are made smaller by ADM's centre crop. Of latents a fresh sample of the posterior is drawn each
 * time, times the scale.
 *
 * The order: example `place` of epoch e is a bijection of 0..n-1 keyed by (seed, e), computed, not stored (data_order). So a run
 * continues exactly where it stood, whatever it was cut into. What is drawn for an example (flip, posterior) depends on (seed,
 * position in the whole run).
 *
 * Sizes, counts and labels are checked at open; IDX is read whole then, pictures and latents when they are wanted. Every failure
 * names the file. Thread: data_open and data_close the owner's; data_example any, at once.
 */
#ifndef SITD_TRAIN_DATA_H
#define SITD_TRAIN_DATA_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/err.h"

struct data;

struct data_spec {
    const char *path;
    int size, channels; // wanted; 0: as the data has it (pictures: size must be given, channels 0 is 3)
    bool flip;          // left and right, half of the time
    uint64_t seed;
};

struct data_info {
    int64_t n;
    int channels, size, classes;
    char **names; // [classes] or NULL: the data does not say
    bool latents;
    double scale, shift; // of latents: (z - shift)*scale
    const char *vae;     // the VAE that made the latents, or NULL
    const char *listing; // of latents: the classes' names as JSON, or NULL. Not checked
    const char *kind;    // "IDX", "pictures", "latents": for messages
};

// E_NOTFOUND, E_FORMAT, E_CONFLICT (mixed sizes, counts or channels that do not fit), E_RANGE (labels), E_NOMEM, and as the
// readers. param: "data".
int data_open(struct data **, const struct data_spec *, struct err *);
void data_close(struct data *);                         // NULL is fine
const struct data_info *data_info(const struct data *); // borrowed

// Example number `position` of the whole run (epochs follow each other): x [C, I, I].
int data_example(const struct data *, uint64_t position, float *x, int32_t *label, struct err *);
// The bijection: which of n examples is at `place` of an epoch.
uint64_t data_order(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t place);

#endif
