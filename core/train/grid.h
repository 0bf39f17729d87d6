// SPDX-License-Identifier: MIT
// grid: pictures of what a network has learned so far, always from the same noise, as one PNG. Thread: the one that owns the
// kern.
#ifndef SITD_TRAIN_GRID_H
#define SITD_TRAIN_GRID_H
#include <signal.h>

#include "core/train/config.h"

// Samples config->sample_each pictures of each class (at most 10 classes, a column each) with the weights in the table and writes
// the PNG. Latents are decoded by the VAE at `vae`; without one (NULL) their first channels are shown. E_TIMEOUT: *stop was set
// meanwhile, nothing is written. E_NONFINITE, E_NOMEM, E_DEVICE, E_IO.
int grid_write(const char *path, const struct train_config *, struct kern *, const struct tensor_table *, const char *vae,
               const volatile sig_atomic_t *stop, struct err *);

#endif
