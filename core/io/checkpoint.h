// SPDX-License-Identifier: MIT
/*
 * checkpoint: any weights file as one table of tensors.
 *
 * checkpoint_open looks at the first bytes: a PyTorch zip (.pt, .pth, .bin; restricted unpickler, core/io/pt.h), safetensors
 * (core/io/safetensors.h), a diffusers folder (core/io/folder.h), or the pre-1.6 torch layout, which is refused with a text that
 * says how to convert it. From a dictionary with "ema" and "model", and from a checkpoint of sitd train, the EMA is taken. Names and
 * cuts of other layouts (wrappers' prefixes, diffusers) become those of arch.c (core/io/layout.c). Bytes from outside are hostile:
 * every size is checked before it is used and every failure names the file and the tensor. Thread: any (no globals).
 */
#ifndef SITD_CHECKPOINT_H
#define SITD_CHECKPOINT_H
#include "core/io/model_dir.h"
#include "core/io/safetensors.h"

struct checkpoint {
    struct tensor_table table;    // names and data live as long as the checkpoint
    const struct meta_pair *meta; // safetensors __metadata__, .pt "args" or config.json, as text; keys unique
    int n_meta;
    const char *format; // "safetensors", "torch zip", "diffusers folder"
    const char *layout; // whose names the file has: "" the authors', "diffusers"
    const char *chosen; // which dictionary was taken: "ema", "model", "" (bare)
    void *bytes;        // PRIVATE: the file's bytes, when checkpoint_open read them
    void *priv;         // PRIVATE: the parser's own
};
int checkpoint_open(struct checkpoint *, const char *path, struct err *);
// The same from memory; takes nothing: bytes stay the caller's and must outlive the checkpoint. name is for messages.
int checkpoint_parse(struct checkpoint *, const void *bytes, size_t n, const char *name, struct err *);
void checkpoint_close(struct checkpoint *);
const char *checkpoint_meta(const struct checkpoint *, const char *key); // borrowed; NULL if absent

/*
 * What a checkpoint proves of its network, by names and shapes alone (models-and-math 1.10): conditioning design, width, depth,
 * patch, channels, classes, MLP ratio, input size, learn_sigma (output rows against patch and channels), decoder, one-hot labels.
 * Not proven: input_size is 0 when there is no pos_embed; num_heads is the published width's (384:6, 768:12, 1024:16, 1152:16,
 * 1280:16; a decoder's 512:16) or 0; class_dropout is taken as true, so num_classes is the label table's rows less one (a table
 * of one row: one class, no null). Missing, extra and misshapen tensors are errors that name the tensor; values are not looked
 * at.
 */
int arch_infer(struct arch *, const struct tensor_table *, struct err *);
// Checks the table against an arch: every tensor there with its shape and a float type, nothing else. Position tables and
// mask_token may be absent; tensors that sampling never uses (arch_unused) are ignored. E_CONFLICT, err.param names the tensor.
// Heads are not looked at.
int arch_match(const struct arch *, const struct tensor_table *, struct err *);
int arch_heads(int hidden_size); // of the published width, or 0
// Width, depth and heads of a published size, its name of n letters S, B, L, XL (DiT paper, table 1) or H (MaskDiT).
bool arch_size(struct arch *, const char *name, size_t n);
// The list itself: name and shape of the index-th tensor of this network (0, 1, ...). Returns its rank, 0 past the end. *fixed
// (may be NULL): the tensor may be absent from a file, since it is computed (position tables) or unused when sampling
// (mask_token).
int arch_tensor(const struct arch *, long index, char name[64], int64_t shape[TENSOR_MAX_DIMS], bool *fixed);
/*
 * Whether a tensor belongs to training only: REPA's "projectors."; an SD-DiT's teacher and heads, by the prefixes "teacher.",
 * "teacher_", "momentum_", "ema_encoder.", "head.", "student_head.", "dino_head.", "ibot_head.", "feat_norm." and the names
 * "center", "center2". No SD-DiT code or checkpoint is public: those are this program's guesses from its parents' names (DINO,
 * iBOT), not the paper's.
 */
bool arch_unused(const char *name);

struct arch_weights {
    struct tensor_table table;
    void *priv;
};
// Random float32 weights of that shape, N(0, 0.02^2) in every tensor but the fixed ones, which are left out: for benchmarks and
// tests of any size.
int arch_random(struct arch_weights *, const struct arch *, uint64_t seed, struct err *);
void arch_weights_free(struct arch_weights *);

#endif
