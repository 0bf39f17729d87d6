// SPDX-License-Identifier: MIT
/*
 * listing: one row's tokens through the network, in all four designs of the DiT paper (sec. 3.2), and MaskDiT's decoder
 * (models-and-math 1.6, 1.7, 1.11, 5).
 *
 * A block is a chain of parts: self-attention, in cross-attention's design attention to the two vectors of timestep and label,
 * MLP. Each part's gate is fused with the norm of the part that follows, the last part's with the next block's first norm, the
 * last block's with the final layer's. What differs between designs is where the vectors of norms and gates come from:
 *
 *   - adaLN: a row's modulation vectors lie one after the other in the order of use: each block's, then the final layer's shift
 * and scale (with a decoder: the decoder layer's, the decoder's blocks', the final layer's). Without gates there are ones for
 * them.
 *   - in-context, cross-attention: affine norms are vectors that all rows share (a leading dimension of 0), gates are ones.
 *
 * In-context conditioning has timestep and label as two more tokens, behind the image's; both are dropped after the last block.
 * The paper does not say where they stand; attention does not care. Cross-attention's keys and values are one product for all
 * blocks, made with the rest of the conditioning (dit.c): token j of row r at context_kv + (2r + j)*ld, block i's at 2*C*i.
 */
#include "core/model/dit_int.h"

static int larger(int a, int b) { return a > b ? a : b; }

bool dit_has_part(const struct dit *m, int part) { return part != PART_CROSS || m->a.block == BLOCK_CROSS_ATTENTION; }

struct dit_vectors dit_vectors_at(const struct dit *m, const struct dit_stage *g, int i, int part, int r0) {
    if (m->affine) {
        const struct dit_affine *n = i < g->depth ? &g->blocks[i].norm[part] : &m->norm_final;
        return (struct dit_vectors){n->shift, n->scale, m->ones};
    }
    bool gated = m->a.block == BLOCK_ADALN_ZERO;
    size_t C = (size_t)g->C, at = g->mod_first + (size_t)i * g->mod_step + (part == PART_MLP ? (gated ? 3 : 2) * C : 0);
    const float *v = m->modulation + (size_t)r0 * (size_t)m->mod_ld + at;
    return (struct dit_vectors){v, v + C, gated ? v + 2 * C : m->ones};
}

static void *past(void *p, size_t bytes) { return p ? (char *)p + bytes : NULL; }

struct dit_set dit_set_at(const struct dit *m, int i, int row) {
    struct dit_set s = m->sets[i == m->encoder.depth ? m->n_sets : m->n_sets > 1 ? i : 0];
    size_t line = (size_t)row * (size_t)m->L, act = kern_dtype_size(m->k->act);
    size_t C = line * (size_t)larger(m->encoder.C, m->decoder.C) * act,
           MLP = line * (size_t)larger(m->encoder.MLP, m->decoder.MLP) * act;
    for (int p = 0; p < PARTS; p++) {
        struct dit_part *part = &s.part[p];
        part->in = past(part->in, C), part->out = past(part->out, C), part->xhat = past(part->xhat, C);
        part->rstd = past(part->rstd, line * sizeof(float));
    }
    s.q = past(s.q, s.q == s.qkv ? 3 * C : C); // sampling keeps q in qkv's place, whose rows are three times as long
    s.qkv = past(s.qkv, 3 * C), s.attn = past(s.attn, C), s.cross = past(s.cross, C);
    s.pre = past(s.pre, MLP), s.mlp = past(s.mlp, MLP), s.lse = past(s.lse, line * (size_t)m->encoder.H * sizeof(float));
    return s;
}

/* ---- blocks ---- */

// From the part's normed input to what its gate takes.
static int work(struct kern *k, const struct dit *m, const struct dit_stage *g, int i, int part, const struct dit_set *s, int r0,
                int n) {
    const struct dit_block *b = &g->blocks[i];
    const struct dit_part *p = &s->part[part];
    int D = g->C / g->H, ld = 2 * g->C * g->depth;
    if (part == PART_SELF) {
        TRY(k->linear(k, b->qkv.run, s->qkv, p->in, n, NULL));
        if (g->attention_fp8) TRY(k->attention_fp8(k, s->attn, s->qkv, n, m->L, g->H, D, b->proj.run));
        else TRY(k->attention(k, s->attn, s->qkv, n, m->L, g->H, D, s->lse));
        return k->linear(k, b->proj.run, p->out, s->attn, n, NULL);
    }
    if (part == PART_CROSS) {
        const float *kv = m->context_kv + (size_t)r0 * DIT_CONTEXT * (size_t)ld + (size_t)i * 2 * (size_t)g->C;
        TRY(k->linear(k, b->cross_q.run, s->q, p->in, n, NULL));
        TRY(k->cross_attention(k, s->cross, s->q, kv, ld, n, m->L, DIT_CONTEXT, g->H, D));
        return k->linear(k, b->cross_proj.run, p->out, s->cross, n, NULL);
    }
    TRY(k->linear(k, b->fc1.run, s->mlp, p->in, n, s->pre));
    return k->linear(k, b->fc2.run, p->out, s->mlp, n, NULL);
}

// The first layer of a part, which reads what the norm before it writes
static const struct kern_linear *reader(const struct dit_stage *g, int i, int part) {
    const struct dit_block *b = &g->blocks[i];
    return part == PART_SELF ? b->qkv.run : part == PART_CROSS ? b->cross_q.run : b->fc1.run;
}

int dit_run_block(struct kern *k, const struct dit *m, const struct dit_stage *g, int i, const struct dit_set *s,
                  const struct dit_part *next, void *stream, int r0, int n) {
    for (int part = PART_SELF, follows; part < PARTS; part = follows) {
        for (follows = part + 1; follows < PARTS && !dit_has_part(m, follows);) follows++;
        bool last = follows == PARTS;
        // What a block's products read may be e4m3; what follows the last block may not.
        bool fp8 = k->gate_norm_fp8 && !(last && i + 1 == g->depth);
        const struct dit_part *to = last ? next : &s->part[follows];
        struct dit_vectors v = dit_vectors_at(m, g, i, part, r0),
                           u = dit_vectors_at(m, g, last ? i + 1 : i, last ? PART_SELF : follows, r0);
        TRY(work(k, m, g, i, part, s, r0, n));
        float eps = follows == PART_MLP ? m->eps_mlp : DIT_EPS;
        if (fp8)
            TRY(k->gate_norm_fp8(k, to->in, stream, s->part[part].out, v.gate, u.shift, u.scale, m->mod_ld, n, m->L, g->C, eps,
                                 last ? reader(g, i + 1, PART_SELF) : reader(g, i, follows)));
        else
            TRY(k->gate_norm(k, to->in, stream, s->part[part].out, v.gate, u.shift, u.scale, m->mod_ld, n, m->L, g->C, eps,
                             to->xhat, to->rstd));
    }
    return KERN_OK;
}

static void *input_at(const struct dit *m, int i, int row) {
    size_t line = (size_t)m->L * (size_t)m->encoder.C * kern_dtype_size(m->k->stream);
    return m->inputs + ((size_t)i * (size_t)m->max_rows + (size_t)row) * line;
}

// The norm in front of a stage's first block.
static int first_norm(struct kern *k, const struct dit *m, const struct dit_stage *g, int i, const struct dit_part *to,
                      const void *stream, int r0, int n) {
    struct dit_vectors v = dit_vectors_at(m, g, i, PART_SELF, r0);
    if (k->norm_modulate_fp8)
        return k->norm_modulate_fp8(k, to->in, stream, v.shift, v.scale, m->mod_ld, n, m->L, g->C, DIT_EPS,
                                    reader(g, i, PART_SELF));
    return k->norm_modulate(k, to->in, stream, v.shift, v.scale, m->mod_ld, n, m->L, g->C, DIT_EPS, to->xhat, to->rstd);
}

// Block i's set in a pass: without what backward would read, where backward will make it again.
static struct dit_set pass_set(const struct dit *m, int i, int row) {
    struct dit_set s = dit_set_at(m, i, row);
    if (!m->inputs || i == m->encoder.depth) return s;
    for (int p = 0; p < PARTS; p++) s.part[p].xhat = NULL, s.part[p].rstd = NULL;
    s.pre = NULL, s.lse = NULL;
    return s;
}

static int stage_blocks(struct kern *k, const struct dit *m, const struct dit_stage *g, void *stream, int r0, int n, int row) {
    struct dit_set s = pass_set(m, 0, row);
    TRY(first_norm(k, m, g, 0, &s.part[PART_SELF], stream, r0, n));
    for (int i = 0; i < g->depth; i++) {
        struct dit_set next = pass_set(m, i + 1 < g->depth ? i + 1 : m->encoder.depth, row);
        if (m->inputs)
            TRY(k->copy(k, input_at(m, i, row), stream, (size_t)n * (size_t)m->L * (size_t)g->C * kern_dtype_size(k->stream)));
        TRY(dit_run_block(k, m, g, i, &s, &next.part[PART_SELF], stream, r0, n));
        s = next;
    }
    return KERN_OK;
}

/* ---- the pass ---- */

// Patches to tokens. In context, rows lie L lines apart, of which the first T are the image's.
static int tokens(struct kern *k, const struct dit *m, float *patches, char *stream, int r0, int n) {
    int T = m->T, L = m->L, C = m->encoder.C, P = m->P, I = m->a.input_size, in = m->a.in_channels;
    TRY(k->patchify(k, patches, m->x + (size_t)r0 * (size_t)in * (size_t)I * (size_t)I, n, in, I, P));
    if (L == T) {
        TRY(k->linear(k, m->patch.run, stream, patches, n, NULL));
        return k->add_table(k, stream, m->pos, n, T, C);
    }
    for (int r = 0; r < n; r++) {
        char *to = stream + (size_t)r * (size_t)L * (size_t)C * kern_dtype_size(k->stream);
        TRY(k->linear(k, m->patch.run, to, patches + (size_t)r * (size_t)(T * in * P * P), 1, NULL));
        TRY(k->add_table(k, to, m->pos, 1, T, C));
    }
    TRY(k->set_token(k, stream, k->stream, m->t_embed + (size_t)r0 * (size_t)C, n, L, C, T));
    return k->set_token(k, stream, k->stream, m->y_embed + (size_t)r0 * (size_t)C, n, L, C, T + 1);
}

static int pixels(struct kern *k, const struct dit *m, const char *in, float *last_out, int r0, int n) {
    int T = m->T, I = m->a.input_size, P = m->P;
    if (m->L == T) TRY(k->linear(k, m->last.run, last_out, in, n, NULL));
    for (int r = 0; m->L != T && r < n; r++) {
        float *to = last_out + (size_t)r * (size_t)(T * m->out_channels * P * P);
        TRY(k->linear(k, m->last.run, to, in + (size_t)r * (size_t)m->L * (size_t)m->encoder.C * kern_dtype_size(k->act), 1,
                      NULL));
    }
    float *out = m->out + (size_t)r0 * (size_t)m->keep * (size_t)I * (size_t)I;
    return k->unpatchify(k, out, last_out, n, m->out_channels, m->keep, I, P);
}

// From the encoder's normed output: the decoder's stream, its own positions, its blocks (MaskDiT sec. 3; at sampling no token is
// masked).
static int decode(struct kern *k, const struct dit *m, const void *in, int r0, int n, int row) {
    const struct dit_stage *g = &m->decoder;
    void *stream = m->decoder_stream + (size_t)row * (size_t)m->L * (size_t)g->C * kern_dtype_size(k->stream);
    TRY(k->linear(k, m->to_decoder.run, stream, in, n, NULL));
    TRY(k->add_table(k, stream, m->decoder_pos, n, m->T, g->C));
    return stage_blocks(k, m, g, stream, r0, n, row);
}

int dit_rows(struct kern *k, void *ctx, int r0, int n, int s0) {
    const struct dit *m = ctx;
    int row = m->flat ? r0 : s0;
    size_t token = (size_t)row * (size_t)m->T, patch2 = (size_t)m->P * (size_t)m->P;
    float *patches = m->patches + token * (size_t)m->a.in_channels * patch2,
          *last_out = m->last_out + token * (size_t)m->out_channels * patch2;
    char *stream = m->stream + (size_t)row * (size_t)m->L * (size_t)m->encoder.C * kern_dtype_size(k->stream);
    struct dit_set final = dit_set_at(m, m->encoder.depth, row);

    TRY(tokens(k, m, patches, stream, r0, n));
    TRY(stage_blocks(k, m, &m->encoder, stream, r0, n, row));
    if (m->decoder.depth) TRY(decode(k, m, final.part[PART_SELF].in, r0, n, row));
    return pixels(k, m, final.part[PART_SELF].in, last_out, r0, n);
}

/* ---- again ---- */

struct again {
    const struct dit *m;
    int i;
};

static int again_rows(struct kern *k, void *ctx, int r0, int n, int s0) {
    const struct again *a = ctx;
    const struct dit *m = a->m;
    const struct dit_stage *g = &m->encoder;
    (void)s0;
    size_t row = (size_t)m->L * (size_t)g->C * kern_dtype_size(k->stream);
    char *stream = m->stream + (size_t)r0 * row;
    struct dit_set s = dit_set_at(m, a->i, r0), final = dit_set_at(m, g->depth, r0);
    TRY(k->copy(k, stream, input_at(m, a->i, r0), (size_t)n * row));
    TRY(first_norm(k, m, g, a->i, &s.part[PART_SELF], stream, r0, n));
    return dit_run_block(k, m, g, a->i, &s, &final.part[PART_SELF], stream, r0, n);
}

int dit_again(struct dit *m, int i, int R) { return m->k->rows(m->k, R, m->L, again_rows, &(struct again){m, i}); }
