// SPDX-License-Identifier: MIT
/*
 * dit_train: a network of the DiT kind that learns: forward with what backward needs kept, and backward (DiT paper sec. 3; all
 * four conditioning designs).
 *
 * All parameters lie in one flat array of float32, gradients in another of the same layout, so that an optimiser, a norm, an EMA,
 * a checkpoint or an all-reduce is one pass over memory. Tensors have the names and shapes of arch_tensor (the authors'), fixed
 * ones (position tables) excepted: those do not learn and are computed. Gaps between tensors are zeros in every array and stay
 * so.
 *
 * The step: fill dit_train_x, dit_train_forward, turn dit_train_out into dit_train_dout (kern loss op), dit_train_backward, which
 * writes the gradients or adds to them: several microbatches before one step of the optimiser are an accumulation. Activations
 * for `rows` rows are reserved once; normed inputs of layers are not among them, backward makes them again.
 *
 * Thread: belongs to the thread that owns its kern. No call after dit_train_new allocates.
 */
#ifndef SITD_DIT_TRAIN_H
#define SITD_DIT_TRAIN_H
#include "core/io/model_dir.h"
#include "kernels/kern.h"

struct dit_train;

struct dit_param {
    char name[64];
    int ndim;
    int64_t shape[TENSOR_MAX_DIMS];
    size_t offset, count; // floats
};

enum dit_recompute { RECOMPUTE_NONE, RECOMPUTE_BLOCK }; // block: keep each block's input only, run its forward again in backward

// E_UNSUPPORTED for what cannot learn here (MaskDiT's decoder, diffusers' and reversed layouts), with param naming the field.
int dit_train_new(struct dit_train **, struct kern *, const struct arch *, int rows, enum dit_recompute, struct err *);
void dit_train_free(struct dit_train *); // NULL is fine

int dit_train_params(const struct dit_train *, const struct dit_param **); // how many; the list is borrowed
size_t dit_train_floats(const struct dit_train *);                         // of a flat array, gaps included
float *dit_train_weights(struct dit_train *);                              // buffers, flat
float *dit_train_grads(struct dit_train *);
int dit_train_refresh(struct dit_train *, struct err *); // the weights changed
// The authors' initial values (models-and-math 1.9) into a flat host array: Xavier, normal tables, zero modulation and last
// layer.
void dit_train_init(const struct dit_train *, float *flat, uint64_t seed);
// Between a table of tensors (checkpoint, host) and a flat host array. Import: arch_match has passed. Export lends views into
// flat.
int dit_train_import(const struct dit_train *, float *flat, const struct tensor_table *, struct err *);
int dit_train_export(const struct dit_train *, struct tensor_table *, const float *flat,
                     struct err *); // caller frees table->tensors with mem_free

float *dit_train_x(struct dit_train *);    // [rows, Cin, I, I]
float *dit_train_out(struct dit_train *);  // [rows, channels, I, I], channels = dit_channels(arch)
float *dit_train_dout(struct dit_train *); // the same
int dit_train_forward(struct dit_train *, int R, const float *t, const int32_t *y, struct err *); // as dit_forward
int dit_train_backward(struct dit_train *, int R, bool add, struct err *);
// Called during backward, in its order, when the gradients of flat floats [offset, offset + count) have been queued for good: for
// reductions that overlap. Each float is told once; ranges of blocks and of modulation alternate, each kind descending.
void dit_train_on_grads(struct dit_train *, void (*fn)(void *ctx, size_t offset, size_t count), void *ctx);

size_t dit_train_bytes(const struct dit_train *); // of its buffers; copies that a back end keeps of weights come on top
#endif
