// SPDX-License-Identifier: MIT
// A run of seconds for tests: a tiny SiT on 8 x 8 pictures of three classes. What a test is about it sets itself.
#ifndef SITD_TESTS_TINY_TRAIN_H
#define SITD_TESTS_TINY_TRAIN_H
#include "core/train/config.h"

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

#endif
