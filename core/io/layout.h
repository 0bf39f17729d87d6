// SPDX-License-Identifier: MIT
/*
 * layout: other people's tensor names and cuts, turned into those of arch.c. Used by checkpoint.c alone.
 */
#ifndef SITD_LAYOUT_H
#define SITD_LAYOUT_H
#include "core/base/err.h"
#include "core/tensor/tensor.h"

struct layout { // what the table needs beside the file's own bytes; zero is valid
    void **owned;
    int n_owned;
    const char *name; // "" for the authors' names, "diffusers"
};
// Renames (in place) and, for diffusers, merges and drops tensors. Names stay borrowed where they can. On failure layout_free all
// the same.
int layout_settle(struct layout *, struct tensor_table *, struct err *);
void layout_free(struct layout *);

#endif
