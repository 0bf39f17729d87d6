// SPDX-License-Identifier: MIT
/*
 * What the dit files share and nobody else includes: the network as loaded, and the scratch of a forward pass.
 *
 *   dit.c       the public calls, buffers, conditioning, dispatch by design
 *   dit_load.c  tensors to layers
 *   adaln.c, in_context.c, cross.c   the listings: one row's tokens through the network, a file a design
 */
#ifndef SITD_DIT_INT_H
#define SITD_DIT_INT_H
#include "core/model/dit.h"

#define DIT_FREQUENCIES 256 // of the timestep embedding (DiT models.py)
#define DIT_EPS 1e-6f
#define DIT_EPS_MLP_DIFFUSERS 1e-5f
#define DIT_CONTEXT 2 // tokens that stand for timestep and label where they are tokens

struct dit_embedder { // timestep and label to vectors [R, C]
    struct kern_linear *t1, *t2;
    float *labels; // [classes and null, C]
};
struct dit_affine { // [C] each: LN's bias, and its weight less one
    float *shift, *scale;
};
struct dit_block {
    struct kern_linear *qkv, *proj, *fc1, *fc2;
    struct kern_linear *cross_q, *cross_proj;   // cross-attention
    struct dit_affine norm1, norm_cross, norm2; // in-context, cross-attention
};
struct dit_stage { // blocks of one width: the network, or MaskDiT's encoder and decoder
    int C, H, MLP, depth;
    struct dit_block *blocks;
};

struct dit {
    struct kern *k;
    struct arch a;
    int T, L, P, out_channels, keep, max_rows; // L: lines a row inside the blocks, T or T + DIT_CONTEXT
    float eps_mlp;
    struct dit_stage encoder, decoder;
    struct kern_linear *patch, *to_decoder, *last;
    float *pos, *decoder_pos; // [T, C]
    struct dit_affine norm_final;
    float *ones, *zeros; // [C]; [lines, C]

    /* conditioning */
    struct dit_embedder *embedders; // one, or one a block
    int n_embedders;
    struct kern_linear **mod; // one for all blocks and the final layer; or, with an embedder a block, one each
    int n_mod;
    int mod_ld;             // from row to row of modulation
    size_t mod_step;        // from a block's vectors to the next block's, in the same row
    int mod_ones;           // where adaLN without gates finds ones, in a row
    struct kern_linear *kv; // cross-attention: all blocks' keys and values

    /* one line a row, a multiple of KERN_VEC of them ("lines"); host_t is host memory */
    float *x, *out, *t, *freq, *t_hidden, *t_embed, *y_embed, *silu_c, *modulation, *context, *context_kv;
    float *host_t;
    int32_t *y;
    /* scratch, one set a scratch row of the back end */
    float *patches, *last_out;
    char *stream, *decoder_stream;          // k->stream
    char *norm, *qkv, *attn, *hidden, *mlp; // act

    struct kern_graph **graphs; // one a size of batch (see graphs in dit.c), where the back end records; else NULL

    /* all that must be given back */
    struct kern_linear **layers;
    void **buffers;
    int n_layers, n_buffers;
    size_t bytes;
};

// Everything of scratch row s0, as the listings name it.
struct dit_scratch {
    float *patches, *last_out;
    void *stream, *decoder_stream, *norm, *qkv, *attn, *hidden, *mlp;
};
struct dit_scratch dit_scratch_at(const struct dit *, int s0);

#define TRY(call)                                                                                                                \
    do {                                                                                                                         \
        int rc_ = (call);                                                                                                        \
        if (rc_) return rc_;                                                                                                     \
    } while (0)

// Listings: kern_rows_fn, ctx is the struct dit. Rows [r0, r0+n) on scratch rows [s0, s0+n).
int adaln_rows(struct kern *, void *ctx, int r0, int n, int s0);
int in_context_rows(struct kern *, void *ctx, int r0, int n, int s0);
int cross_rows(struct kern *, void *ctx, int r0, int n, int s0);

int dit_load(struct dit *, const struct tensor_table *, struct err *);
int dit_failed(const struct dit *, int kern_rc, struct err *);       // a kern status as ours, with its text
int dit_buffer(struct dit *, void *out, size_t bytes, struct err *); // allocates, owns and counts; out is a pointer's address
int dit_buffer_from(struct dit *, float **out, const float *host, size_t count, struct err *);

#endif
