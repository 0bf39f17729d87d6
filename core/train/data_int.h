// SPDX-License-Identifier: MIT
// What the data_*.c files share and nobody else includes: a kind of data set is an opener, a reader of one example and a closer.
#ifndef SITD_TRAIN_DATA_INT_H
#define SITD_TRAIN_DATA_INT_H
#include "core/train/data.h"

struct data {
    struct data_spec spec;
    struct data_info info;
    // Example `index` as the file has it, `draw` for what is drawn anew each time. x [C, I, I]
    int (*read)(const struct data *, int64_t index, uint64_t draw, float *x, int32_t *label, struct err *);
    void (*close)(void *set); // NULL is fine
    void *set;                // the kind's own
};

int data_idx_open(struct data *, const char *images, struct err *);      // path of the file of images
int data_pictures_open(struct data *, struct err *);                     // spec.path is a folder of folders
int data_latents_open(struct data *, char **files, int n, struct err *); // the shards

// All names in a folder that pass, sorted by bytes; the caller's (data_names_free). E_NOTFOUND, E_IO, E_NOMEM.
struct data_names {
    char **at; // full paths
    int n;
};
int data_list(struct data_names *, const char *folder, bool (*pass)(const char *path), struct err *);
void data_names_free(struct data_names *);
bool data_ends_with(const char *path, const char *ending); // any letter case

// 8-bit pixels [h, w, from] to planes [channels, h, w] in -1..1; grey becomes equal planes, colour the mean of them only where
// channels is 1.
void data_planes(float *x, const uint8_t *pixels, int w, int h, int from, int channels);

#endif
