// SPDX-License-Identifier: MIT
/*
 * pt: checkpoints written by torch.save (PyTorch 1.6 and later: a zip of a pickle and raw storages). Thread: any (no globals).
 */
#ifndef SITD_PT_H
#define SITD_PT_H
#include "core/io/safetensors.h"

struct pt {
    struct tensor_table table; // in the dictionary's order; data points into the file's bytes or into copies
    struct meta_pair *meta;    // the file's "args" and counters, as text
    int n_meta;
    const char *chosen; // "ema", "model", "state_dict" or "" (the file is a bare state dict)
    char *text;         // PRIVATE: names, keys, values
    void **copies;      // PRIVATE: straightened tensors
    int n_copies;
};

// Rules on top of pt.c. The bytes must outlive the pt. On failure nothing is left to close. err.param is the tensor's name where
// one is to blame.
int pt_parse(struct pt *, const void *bytes, size_t n, struct err *);
// The same of one part of a training checkpoint: "model" or "ema" (E_CONFLICT: it has none), or "opt", the optimiser's state: its tensors
// are called by number, "12.exp_avg", and its plain numbers ("12.step") are in meta, in place of the file's args.
int pt_parse_part(struct pt *, const void *bytes, size_t n, const char *part, struct err *);
void pt_close(struct pt *);

#endif
