// SPDX-License-Identifier: MIT
/*
 * cross: the DiT paper's cross-attention blocks (sec. 3.2): after self-attention, every token attends to a sequence of two, the
 * vectors of timestep and label. Norms are affine, one before each of the three parts. The keys and values of all blocks are one
 * product, made with the rest of the conditioning (dit.c): token j of row r at context_kv + (2r + j)*ld, block i's at 2*C*i.
 * Gates of one as in in_context.c.
 */
#include "core/model/dit_int.h"

int cross_rows(struct kern *k, void *ctx, int r0, int n, int s0) {
    const struct dit *m = ctx;
    struct dit_scratch s = dit_scratch_at(m, s0);
    const struct dit_stage *g = &m->encoder;
    int T = m->T, C = g->C, H = g->H, I = m->a.input_size, P = m->P, in = m->a.in_channels, ld = 2 * C * g->depth;
    size_t side2 = (size_t)I * (size_t)I;
    const struct dit_affine *norm = &g->blocks[0].norm1;
    const float *kv = m->context_kv + (size_t)r0 * DIT_CONTEXT * (size_t)ld;

    TRY(k->patchify(k, s.patches, m->x + (size_t)r0 * (size_t)in * side2, n, in, I, P));
    TRY(k->linear(k, m->patch, s.stream, s.patches, n, NULL));
    TRY(k->add_table(k, s.stream, m->pos, n, T, C));
    TRY(k->norm_modulate(k, s.norm, s.stream, norm->shift, norm->scale, 0, n, T, C, DIT_EPS, NULL, NULL));
    for (int i = 0; i < g->depth; i++, kv += 2 * (size_t)C) {
        const struct dit_block *b = &g->blocks[i];
        norm = i + 1 < g->depth ? &b[1].norm1 : &m->norm_final;
        TRY(k->linear(k, b->qkv, s.qkv, s.norm, n, NULL));
        TRY(k->attention(k, s.attn, s.qkv, n, T, H, C / H, NULL));
        TRY(k->linear(k, b->proj, s.hidden, s.attn, n, NULL));
        TRY(k->gate_norm(k, s.norm, s.stream, s.hidden, m->ones, b->norm_cross.shift, b->norm_cross.scale, 0, n, T, C, DIT_EPS,
                         NULL, NULL));
        TRY(k->linear(k, b->cross_q, s.qkv, s.norm, n, NULL));
        TRY(k->cross_attention(k, s.attn, s.qkv, kv, ld, n, T, DIT_CONTEXT, H, C / H));
        TRY(k->linear(k, b->cross_proj, s.hidden, s.attn, n, NULL));
        TRY(k->gate_norm(k, s.norm, s.stream, s.hidden, m->ones, b->norm2.shift, b->norm2.scale, 0, n, T, C, DIT_EPS, NULL,
                         NULL));
        TRY(k->linear(k, b->fc1, s.mlp, s.norm, n, NULL));
        TRY(k->linear(k, b->fc2, s.hidden, s.mlp, n, NULL));
        TRY(k->gate_norm(k, s.norm, s.stream, s.hidden, m->ones, norm->shift, norm->scale, 0, n, T, C, DIT_EPS, NULL, NULL));
    }
    TRY(k->linear(k, m->last, s.last_out, s.norm, n, NULL));
    return k->unpatchify(k, m->out + (size_t)r0 * (size_t)m->keep * side2, s.last_out, n, m->out_channels, m->keep, I, P);
}
