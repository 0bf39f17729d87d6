// SPDX-License-Identifier: MIT
/*
 * in_context: the DiT paper's in-context conditioning (sec. 3.2): the vectors of timestep and label are two more tokens, behind
 * the image's, in a plain ViT with affine norms; both are dropped after the last block. The paper does not say where they stand;
 * attention does not care. A gate of one and vectors that all rows share (ld 0) make the adaLN ops serve here.
 */
#include "core/model/dit_int.h"

int in_context_rows(struct kern *k, void *ctx, int r0, int n, int s0) {
    const struct dit *m = ctx;
    struct dit_scratch s = dit_scratch_at(m, s0);
    const struct dit_stage *g = &m->encoder;
    int T = m->T, L = m->L, C = g->C, I = m->a.input_size, P = m->P, in = m->a.in_channels;
    size_t side2 = (size_t)I * (size_t)I, row = (size_t)L * (size_t)C, act = kern_dtype_size(k->act),
           element = kern_dtype_size(k->stream);
    const struct dit_affine *norm = &g->blocks[0].norm1;

    TRY(k->patchify(k, s.patches, m->x + (size_t)r0 * (size_t)in * side2, n, in, I, P));
    for (int r = 0; r < n; r++) { // rows lie L tokens apart, of which the first T are the image's
        char *stream = (char *)s.stream + (size_t)r * row * element;
        TRY(k->linear(k, m->patch, stream, s.patches + (size_t)r * (size_t)(T * in * P * P), 1, NULL));
        TRY(k->add_table(k, stream, m->pos, 1, T, C));
    }
    TRY(k->set_token(k, s.stream, k->stream, m->t_embed + (size_t)r0 * (size_t)C, n, L, C, T));
    TRY(k->set_token(k, s.stream, k->stream, m->y_embed + (size_t)r0 * (size_t)C, n, L, C, T + 1));
    TRY(k->norm_modulate(k, s.norm, s.stream, norm->shift, norm->scale, 0, n, L, C, DIT_EPS, NULL, NULL));
    for (int i = 0; i < g->depth; i++) {
        const struct dit_block *b = &g->blocks[i];
        norm = i + 1 < g->depth ? &b[1].norm1 : &m->norm_final;
        TRY(k->linear(k, b->qkv, s.qkv, s.norm, n, NULL));
        TRY(k->attention(k, s.attn, s.qkv, n, L, g->H, C / g->H, NULL));
        TRY(k->linear(k, b->proj, s.hidden, s.attn, n, NULL));
        TRY(k->gate_norm(k, s.norm, s.stream, s.hidden, m->ones, b->norm2.shift, b->norm2.scale, 0, n, L, C, DIT_EPS, NULL,
                         NULL));
        TRY(k->linear(k, b->fc1, s.mlp, s.norm, n, NULL));
        TRY(k->linear(k, b->fc2, s.hidden, s.mlp, n, NULL));
        TRY(k->gate_norm(k, s.norm, s.stream, s.hidden, m->ones, norm->shift, norm->scale, 0, n, L, C, DIT_EPS, NULL, NULL));
    }
    for (int r = 0; r < n; r++) {
        float *to = s.last_out + (size_t)r * (size_t)(T * m->out_channels * P * P);
        TRY(k->linear(k, m->last, to, (const char *)s.norm + (size_t)r * row * act, 1, NULL));
    }
    return k->unpatchify(k, m->out + (size_t)r0 * (size_t)m->keep * side2, s.last_out, n, m->out_channels, m->keep, I, P);
}
