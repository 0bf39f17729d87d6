// SPDX-License-Identifier: MIT
/*
 * folder: a diffusers model folder, as one table of tensors and what its config.json says. Used by checkpoint.c alone.
 *
 * DIR or DIR/transformer holds config.json and diffusion_pytorch_model.safetensors, or .bin, or either one's .index.json and the
 * shards that it names. Names of shards are hostile: plain names in the same folder. config.json is given in the words of the
 * authors' arguments (num_heads, input_size, depth, patch_size, in_channels, num_classes, learn_sigma).
 */
#ifndef SITD_FOLDER_H
#define SITD_FOLDER_H
#include "core/io/checkpoint.h"

struct folder {
    struct tensor_table table; // of all shards together, under diffusers' names
    struct meta_pair *meta;
    int n_meta;
    struct checkpoint *shards; // PRIVATE
    int n_shards;
};
int folder_open(struct folder *, const char *dir, struct err *); // folder_close also after a failure
// Holds what config.json said against the settled table. E_CONFLICT names the tensor that it contradicts.
int folder_check(const struct folder *, const struct tensor_table *settled, struct err *);
void folder_close(struct folder *);

int checkpoint_open_raw(struct checkpoint *, const char *path, struct err *); // a file, its names as they are (checkpoint.c)

#endif
