// SPDX-License-Identifier: MIT
// A run of seconds for tests: a tiny SiT on 8 x 8 pictures of three classes. What a test is about it sets itself.
#ifndef SITD_TESTS_TINY_TRAIN_H
#define SITD_TESTS_TINY_TRAIN_H
#include <stdlib.h>

#include "core/io/file.h"
#include "core/train/config.h"
#include "core/train/data.h"
#include "tests/test.h"

static inline struct train_config tiny_train(const char *out) {
    return (struct train_config){.desc = {.family = "sit",
                                          .path = "linear",
                                          .prediction = "velocity",
                                          .guide_channels = -1,
                                          .arch = {.input_size = 8,
                                                   .patch_size = 4,
                                                   .in_channels = 1,
                                                   .hidden_size = 16,
                                                   .depth = 1,
                                                   .num_heads = 2,
                                                   .num_classes = 3,
                                                   .mlp_ratio = 2,
                                                   .class_dropout = true}},
                                 .objective = {.null_label = 3, .std = 1},
                                 .steps = 1,
                                 .batch = 2,
                                 .lr = 1e-2,
                                 .beta1 = 0.9,
                                 .beta2 = 0.99,
                                 .eps = 1e-8,
                                 .n_ema = 1,
                                 .ema = {0.9},
                                 .out = out,
                                 .keep = 1,
                                 .log_every = 1,
                                 .kern = {.backend = "cpu", .threads = 1},
                                 .data_threads = 1};
}

static inline void tiny_idx(const char *dir, const char *name, int rank, const unsigned *dims, size_t n, int classes) {
    unsigned char b[8192] = {0, 0, 8, (unsigned char)rank}, *p = b + 4;
    char path[128];
    struct err e = {0};
    for (int i = 0; i < rank; i++) *p++ = 0, *p++ = 0, *p++ = (unsigned char)(dims[i] >> 8), *p++ = (unsigned char)dims[i];
    for (size_t i = 0; i < n; i++) *p++ = (unsigned char)(classes ? i % (size_t)classes : i * i / 7);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    CHECK_OK(file_write(path, b, (size_t)(p - b), &e), &e);
}

// Thirteen pictures of noise in dir, a fresh folder whose name is written there.
static inline struct data *tiny_data(char dir[64], bool flip) {
    enum { N = 13, SIDE = 8 };
    struct err e = {0};
    struct data *data;
    snprintf(dir, 64, "/tmp/sitd-train-XXXXXX");
    CHECK(mkdtemp(dir));
    tiny_idx(dir, "train-images-idx3-ubyte", 3, (unsigned[]){N, SIDE, SIDE}, N * SIDE * SIDE, 0);
    tiny_idx(dir, "train-labels-idx1-ubyte", 1, (unsigned[]){N}, N, 3);
    CHECK_OK(data_open(&data, &(struct data_spec){.path = dir, .flip = flip, .seed = 5}, &e), &e);
    return data;
}

#endif
