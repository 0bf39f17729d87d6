// SPDX-License-Identifier: MIT
/*
 * adaln: DiT and SiT with adaLN-Zero or adaLN blocks, and MaskDiT's encoder and decoder (models-and-math 1.6, 1.7, 1.11, 5).
 *
 * A row's modulation vectors lie one after the other in the order of use: each block's, then the final layer's shift and scale
 * (with a decoder: the decoder layer's, the decoder's blocks', the final layer's). Each block's gate is fused with the norm that
 * follows it: attention's gate with the MLP's norm, the MLP's gate with the next block's norm, the last with the final layer's,
 * whose shift and scale lie where a next block's would.
 */
#include "core/model/dit_int.h"

struct vectors {
    const float *shift1, *scale1, *gate1, *shift2, *scale2, *gate2;
};

static struct vectors vectors_at(const struct dit *m, const float *mod, size_t C, const float *ones) {
    if (m->a.block == BLOCK_ADALN) return (struct vectors){mod, mod + C, ones, mod + 2 * C, mod + 3 * C, ones};
    return (struct vectors){mod, mod + C, mod + 2 * C, mod + 3 * C, mod + 4 * C, mod + 5 * C};
}

// norm holds the first block's modulated input and is left holding the next layer's. *mod moves to that layer's vectors.
static int stage_blocks(struct kern *k, const struct dit *m, const struct dit_stage *g, struct dit_scratch *s, void *stream,
                        const float **mod, size_t step, const float *ones, int n) {
    int T = m->T, C = g->C, ld = m->mod_ld;
    for (int i = 0; i < g->depth; i++) {
        const struct dit_block *b = &g->blocks[i];
        struct vectors v = vectors_at(m, *mod, (size_t)C, ones);
        const float *next = *mod += step;
        TRY(k->linear(k, b->qkv, s->qkv, s->norm, n, NULL));
        TRY(k->attention(k, s->attn, s->qkv, n, T, g->H, C / g->H, NULL));
        TRY(k->linear(k, b->proj, s->hidden, s->attn, n, NULL));
        TRY(k->gate_norm(k, s->norm, stream, s->hidden, v.gate1, v.shift2, v.scale2, ld, n, T, C, m->eps_mlp, NULL, NULL));
        TRY(k->linear(k, b->fc1, s->mlp, s->norm, n, NULL));
        TRY(k->linear(k, b->fc2, s->hidden, s->mlp, n, NULL));
        TRY(k->gate_norm(k, s->norm, stream, s->hidden, v.gate2, next, next + C, ld, n, T, C, DIT_EPS, NULL, NULL));
    }
    return KERN_OK;
}

// From the encoder's normed output: the decoder's stream, its own positions, its blocks (MaskDiT sec. 3; at sampling no token is
// masked).
static int decode(struct kern *k, const struct dit *m, struct dit_scratch *s, const float *mod, int n) {
    int D = m->decoder.C;
    TRY(k->linear(k, m->to_decoder, s->decoder_stream, s->norm, n, NULL));
    TRY(k->add_table(k, s->decoder_stream, m->decoder_pos, n, m->T, D));
    TRY(k->norm_modulate(k, s->norm, s->decoder_stream, mod, mod + D, m->mod_ld, n, m->T, D, DIT_EPS, NULL, NULL));
    return stage_blocks(k, m, &m->decoder, s, s->decoder_stream, &mod, 6 * (size_t)D, NULL, n);
}

int adaln_rows(struct kern *k, void *ctx, int r0, int n, int s0) {
    const struct dit *m = ctx;
    struct dit_scratch s = dit_scratch_at(m, s0);
    int T = m->T, C = m->encoder.C, I = m->a.input_size, P = m->P, in = m->a.in_channels;
    size_t side2 = (size_t)I * (size_t)I;
    const float *mod = m->modulation + (size_t)r0 * (size_t)m->mod_ld, *ones = mod + m->mod_ones;

    TRY(k->patchify(k, s.patches, m->x + (size_t)r0 * (size_t)in * side2, n, in, I, P));
    TRY(k->linear(k, m->patch, s.stream, s.patches, n, NULL));
    TRY(k->add_table(k, s.stream, m->pos, n, T, C));
    TRY(k->norm_modulate(k, s.norm, s.stream, mod, mod + C, m->mod_ld, n, T, C, DIT_EPS, NULL, NULL));
    TRY(stage_blocks(k, m, &m->encoder, &s, s.stream, &mod, m->mod_step, ones, n));
    if (m->decoder.depth) TRY(decode(k, m, &s, mod + 2 * (size_t)C, n));
    TRY(k->linear(k, m->last, s.last_out, s.norm, n, NULL));
    return k->unpatchify(k, m->out + (size_t)r0 * (size_t)m->keep * side2, s.last_out, n, m->out_channels, m->keep, I, P);
}
