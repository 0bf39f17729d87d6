// SPDX-License-Identifier: MIT
// What the dit_train files share and nobody else includes.
#ifndef SITD_DIT_TRAIN_INT_H
#define SITD_DIT_TRAIN_INT_H
#include "core/model/dit_int.h"
#include "core/model/dit_train.h"

/*
 * Where a network's tensors lie in a flat array, from 0 on: what learns by way of sums over the whole backward pass (patch and
 * label embedding, timestep, norms, modulation or cross-attention's keys and values), then block by block, then the last layer.
 * So gradients become final from the end on. The weights of all norms, all norms' biases, all modulation (keys and values)
 * weights and all their biases are runs without gaps, blocks in order and the final layer last; other tensors begin at multiples
 * of 64.
 */
struct dit_flat {
    struct dit_param *params;
    int n;
    size_t floats;
    size_t norms, norms_count; // the run of norm weights
    size_t wide, wide_count;   // the run of modulation (keys and values) weights
    size_t *blocks;            // [depth + 1]: where blocks, and the last layer, begin
    float *weights, *grads;    // buffers
    float *norm_scale;         // [norms_count]: norm weights less one, as the ops want them
};
int dit_flat_lay(struct dit_flat *, const struct arch *, struct err *);
void dit_flat_deinit(struct dit_flat *);
const struct dit_param *dit_flat_find(const struct dit_flat *, const char *name); // NULL if absent

struct dit_train {
    struct kern *k;
    struct dit *net;
    struct dit_flat flat;
    float *minus_one; // [C]
    int group;        // rows that backward takes through a block at once
    /* gradients of activations: of all rows, of a group's, or one line a row */
    float *dx, *dout, *dtok;         // of the stream [R, L, C], of the output, of its patches
    void *d_in;                      // act [R, L, C]: of a part's input; before that, of what attention gave
    void *d_out;                     // act [group, L, C]: of a part's output
    void *d_wide;                    // act [R, L, wide]
    size_t wide;                     // max(3*C, MLP)
    float *d_mod, *d_kv, *d_context; // as modulation, context_kv, context
    float *d_t, *d_y, *d_hidden; // [lines, C]: of timestep and label vectors (adaLN: of their sum), of the timestep MLP's middle
    void (*on_grads)(void *ctx, size_t offset, size_t count);
    void *ctx;
    bool add; // backward adds to the gradients
    // The layer whose weights' gradients wait for its input to be made again; dy is d_wide
    const struct dit_linear *owed;
    bool owed_bias; // its bias's too
};
int dit_back(struct dit_train *, int R); // a kern status

#endif
