// SPDX-License-Identifier: MIT
/*
 * What the dit files share and nobody else includes: the network as loaded, and the activations of a pass through it.
 *
 *   dit.c         the public calls, buffers, conditioning
 *   dit_load.c    tensors to layers
 *   dit_calibrate.c  scales of numbers in e4m3
 *   listing.c     forward: one row's tokens through the network, in all designs
 *   dit_train.c   a network that learns: flat arrays, backward (dit_back.c), initial values (dit_init.c)
 */
#ifndef SITD_DIT_INT_H
#define SITD_DIT_INT_H
#include "core/model/dit.h"

#define DIT_FREQUENCIES 256 // of the timestep embedding (DiT models.py)
#define DIT_EPS 1e-6f
#define DIT_EPS_MLP_DIFFUSERS 1e-5f
#define DIT_CONTEXT 2 // tokens that stand for timestep and label where they are tokens

struct dit_linear { // of a network that learns: where weight and bias lie in the flat array, how many outputs there are
    struct kern_linear *run;
    size_t w, b;
    int out;
};
struct dit_affine { // [C] each: LN's bias, and its weight less one; w, b as above
    float *shift, *scale;
    size_t w, b;
};
struct dit_embedder { // timestep and label to vectors [R, C]
    struct dit_linear t1, t2;
    float *labels; // [classes and null, C]
    size_t at;     // of labels in the flat array
};

// A block is a chain of parts. Each is a norm with modulation, the part's own work, and a gate onto the residual stream.
enum { PART_SELF, PART_CROSS, PART_MLP, PARTS };
struct dit_block {
    struct dit_linear qkv, proj, fc1, fc2;
    struct dit_linear cross_q, cross_proj; // cross-attention
    struct dit_affine norm[PARTS];         // in-context, cross-attention
};
struct dit_stage { // blocks of one width: the network, or MaskDiT's encoder and decoder
    int C, H, MLP, depth;
    bool attention_fp8; // its proj reads what the op of that name writes
    size_t mod_first, mod_step; // in a row of modulation: the first block's vectors, from a block's to the next one's
    struct dit_block *blocks;
};

/*
 * Activations of one block, for some rows. When sampling there is one set for all blocks, most of it the same memory under
 * several names, without what is marked *. A network that learns keeps a set a block, or makes them again (enum dit_recompute).
 */
struct dit_part {
    void *in;    // act [C]: normed and modulated; one buffer for all but the final layer
    void *out;   // act [C]: before the gate
    void *xhat;  // act [C] *: normed
    float *rstd; // [1] *
};
struct dit_set {
    struct dit_part part[PARTS];
    void *qkv, *attn; // act [3*C], [C]
    void *q, *cross;  // act [C]
    void *pre, *mlp;  // act [MLP]: before * and after the activation
    float *lse;       // [H] *
};

// The vectors of the norm before a part and of the gate behind it.
struct dit_vectors {
    const float *shift, *scale, *gate;
};

struct dit_flat; // dit_train_int.h

struct dit {
    struct kern *k;
    struct arch a;
    int T, L, P, out_channels, keep, max_rows; // L: lines a row inside the blocks, T or T + DIT_CONTEXT
    float eps_mlp;
    bool affine; // norms with weights of their own, shared by all rows
    struct dit_stage encoder, decoder;
    struct dit_linear patch, to_decoder, last;
    float *pos, *decoder_pos; // [T, C]
    struct dit_affine norm_final;
    float *ones, *zeros; // gates of networks without: [C] where vectors are shared, else [max_rows, mod_ld]; [lines, C]

    /* conditioning */
    struct dit_embedder *embedders; // one, or one a block
    int n_embedders;
    struct dit_linear *mod; // one for all blocks and the final layer; or, with an embedder a block, one each
    int n_mod;
    int mod_ld;           // from row to row of modulation; 0 with affine norms
    struct dit_linear kv; // cross-attention: all blocks' keys and values

    /* one line a row, a multiple of KERN_VEC of them ("lines"); host_t is host memory; t_pre and c are kept by networks that
     * learn */
    float *x, *out, *t, *freq, *t_pre, *t_hidden, *t_embed, *y_embed, *c, *silu_c, *modulation, *context, *context_kv;
    float *host_t;
    int32_t *y;
    /* one row's tokens a scratch row of the back end, or a row where the network learns */
    float *patches, *last_out;
    char *stream, *decoder_stream; // k->stream
    struct dit_set *sets;          // [n_sets + 1], the last for the final layer: its norm is a part with neither work nor gate
    int n_sets;                    // one, or one a block
    char *inputs;                  // the stream as each block found it [depth, max_rows, L, C]: where sets are made again

    struct kern_graph **graphs; // one a size of batch (see graphs in dit.c), where the back end records; else NULL

    const struct dit_flat *flat; // where the network learns: its weights; else NULL

    /* all that must be given back */
    struct kern_linear **layers;
    void **buffers;
    int n_layers, n_buffers;
    size_t bytes;
};

#define TRY(call)                                                                                                                \
    do {                                                                                                                         \
        int rc_ = (call);                                                                                                        \
        if (rc_) return rc_;                                                                                                     \
    } while (0)

// dit.c. A network without layers and activations; they are added by dit_load and dit_reserve. keep as dit_new's.
int dit_begin(struct dit **, struct kern *, const struct arch *, int keep, int max_rows, struct err *);
int dit_reserve(struct dit *, bool recompute, struct err *);
int dit_failed(const struct dit *, int kern_rc, struct err *);       // a kern status as ours, with its text
int dit_buffer(struct dit *, void *out, size_t bytes, struct err *); // allocates, owns and counts; out is a pointer's address
int dit_buffer_from(struct dit *, float **out, const float *host, size_t count, struct err *);
int dit_units(int lines); // of KERN_VEC

// dit_calibrate.c. Passes over noise from which a back end with fixed scales (kern.h, calibrate) finds them
int dit_calibrate(struct dit *, struct err *);

// dit_load.c. The layers, from a table or, where the network learns, over its flat array
int dit_load(struct dit *, const struct tensor_table *, struct err *);

// listing.c
int dit_rows(struct kern *, void *ctx, int r0, int n, int s0); // kern_rows_fn of a pass; ctx is the struct dit
bool dit_has_part(const struct dit *, int part);
// Part `part` of block i of a stage, of rows from r0 on; block number depth: the final layer.
struct dit_vectors dit_vectors_at(const struct dit *, const struct dit_stage *, int i, int part, int r0);
struct dit_set dit_set_at(const struct dit *, int i, int row); // block i's (depth: the final layer's) activations from a row on
// Block i on n rows from r0 on: s->part[PART_SELF].in holds its input, normed; so will next->in the next layer's.
int dit_run_block(struct kern *, const struct dit *, const struct dit_stage *, int i, const struct dit_set *s,
                  const struct dit_part *next, void *stream, int r0, int n);
// Recomputes block i's set from its kept input, for backward; the next layer's norm goes to the final layer's set.
int dit_again(struct dit *, int i, int R);

#endif
