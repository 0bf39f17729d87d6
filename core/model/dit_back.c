// SPDX-License-Identifier: MIT
/*
 * dit_back: the listing (listing.c) from its end to its beginning.
 *
 * Two gradients travel: dx, of the residual stream, in float32, and the one of what the current op read or wrote, in act, from
 * buffer to buffer: d_in (a part's normed input), d_out (what its gate took), d_attn, d_wide. The vectors of norms and gates get
 * theirs where they lie: in d_mod at the places of modulation, or in the flat array. Ops run on all rows at once, so sums over
 * rows have one order whatever the threads.
 */
#include "core/model/dit_train_int.h"

struct places { // of the gradients of a norm's vectors and a gate; gate NULL: there is none
    float *shift, *scale, *gate;
};

static struct places places_at(const struct dit_train *t, int i, int part) {
    const struct dit *m = t->net;
    const struct dit_stage *g = &m->encoder;
    if (m->affine) {
        const struct dit_affine *n = i < g->depth ? &g->blocks[i].norm[part] : &m->norm_final;
        return (struct places){t->flat.grads + n->b, t->flat.grads + n->w, NULL};
    }
    struct dit_vectors v = dit_vectors_at(m, g, i, part, 0);
    float *shift = t->d_mod + (v.shift - m->modulation);
    bool gated = m->a.block == BLOCK_ADALN_ZERO;
    return (struct places){shift, shift + g->C, gated ? shift + 2 * (size_t)g->C : NULL};
}

// dx of a layer from dy, and its weights' gradients. act, pre: as linear_backward's before and x_pre
static int linear(const struct dit_train *t, const struct dit_linear *l, void *dx, const void *dy, const void *x,
                  enum kern_act act, const void *pre, int units) {
    float *g = t->flat.grads;
    return t->k->linear_backward(t->k, l->run, dx, g + l->w, g + l->b, dy, x, act, pre, units);
}

static void ready(const struct dit_train *t, size_t from, size_t to) {
    if (t->on_grads) t->on_grads(t->ctx, from, to - from);
}

static size_t after_block(const struct dit_train *t, int i) {
    return i < t->net->encoder.depth ? t->flat.blocks[i + 1] : t->flat.floats;
}

/* ---- blocks ---- */

// From d_in, of what comes after the gate and norm behind part p of block i (`to` holds that norm), to d_out and dx.
static int gate_norm(struct dit_train *t, int i, int part, int follows, const struct dit_set *s, const struct dit_part *to,
                     int R) {
    const struct dit *m = t->net;
    const struct dit_stage *g = &m->encoder;
    bool last = follows == PARTS;
    int next = last ? i + 1 : i, norm = last ? PART_SELF : follows;
    struct dit_vectors v = dit_vectors_at(m, g, i, part, 0), u = dit_vectors_at(m, g, next, norm, 0);
    struct places dv = places_at(t, i, part), du = places_at(t, next, norm);
    return t->k->gate_norm_backward(t->k, t->dx, t->d_out, du.shift, du.scale, dv.gate, t->d_in, to->xhat, to->rstd,
                                    s->part[part].out, v.gate, u.scale, m->mod_ld, R, m->L, g->C);
}

// From d_out to d_in.
static int work(struct dit_train *t, int i, int part, const struct dit_set *s, int R) {
    struct kern *k = t->k;
    const struct dit *m = t->net;
    const struct dit_stage *g = &m->encoder;
    const struct dit_block *b = &g->blocks[i];
    const void *in = s->part[part].in;
    int D = g->C / g->H, ld = 2 * g->C * g->depth;
    size_t kv = (size_t)i * 2 * (size_t)g->C;
    if (part == PART_SELF) {
        TRY(linear(t, &b->proj, t->d_attn, t->d_out, s->attn, KERN_NONE, NULL, R));
        TRY(k->attention_backward(k, t->d_wide, t->d_attn, s->qkv, s->attn, s->lse, R, m->L, g->H, D));
        return linear(t, &b->qkv, t->d_in, t->d_wide, in, KERN_NONE, NULL, R);
    }
    if (part == PART_CROSS) {
        TRY(linear(t, &b->cross_proj, t->d_attn, t->d_out, s->cross, KERN_NONE, NULL, R));
        TRY(k->cross_attention_backward(k, t->d_wide, t->d_kv + kv, t->d_attn, s->q, m->context_kv + kv, ld, R, m->L, DIT_CONTEXT,
                                        g->H, D));
        return linear(t, &b->cross_q, t->d_in, t->d_wide, in, KERN_NONE, NULL, R);
    }
    TRY(linear(t, &b->fc2, t->d_wide, t->d_out, s->mlp, KERN_GELU_TANH, s->pre, R));
    return linear(t, &b->fc1, t->d_in, t->d_wide, in, KERN_NONE, NULL, R);
}

static int block(struct dit_train *t, int i, int R) {
    struct dit *m = t->net;
    int depth = m->encoder.depth;
    if (m->inputs) TRY(dit_again(m, i, R));
    struct dit_set s = dit_set_at(m, i, 0), next = dit_set_at(m, m->inputs ? depth : i + 1, 0);
    for (int part = PART_MLP, follows = PARTS; part >= PART_SELF; part--) {
        if (!dit_has_part(m, part)) continue;
        TRY(gate_norm(t, i, part, follows, &s, &(follows == PARTS ? &next : &s)->part[follows % PARTS], R));
        TRY(work(t, i, part, &s, R));
        follows = part;
    }
    ready(t, t->flat.blocks[i], after_block(t, i));
    return KERN_OK;
}

/* ---- both ends ---- */

// From the output's gradient to d_in, the final norm's; dx is 0.
static int from_pixels(struct dit_train *t, int R) {
    struct kern *k = t->k;
    const struct dit *m = t->net;
    size_t act = kern_dtype_size(k->act), line = (size_t)m->encoder.C, row = (size_t)m->L * line;
    int T = m->T, P = m->P, patch = m->out_channels * P * P, depth = m->encoder.depth;
    char *in = dit_set_at(m, depth, 0).part[PART_SELF].in, *d_in = t->d_in;
    TRY(k->zero(k, t->dx, (size_t)R * row * sizeof(float)));
    TRY(k->unpatchify_backward(k, t->dtok, t->dout, R, m->out_channels, m->keep, m->a.input_size, P));
    if (m->L == T) TRY(linear(t, &m->last, d_in, t->dtok, in, KERN_NONE, NULL, R));
    else TRY(k->zero(k, d_in, (size_t)R * row * act)); // the tokens of timestep and label were dropped
    for (int r = 0; m->L != T && r < R; r++) {
        size_t at = (size_t)r * row * act;
        TRY(linear(t, &m->last, d_in + at, t->dtok + (size_t)r * (size_t)(T * patch), in + at, KERN_NONE, NULL, 1));
    }
    ready(t, t->flat.blocks[depth], after_block(t, depth));
    return KERN_OK;
}

// From d_in, the first block's, to the patch embedding.
static int to_tokens(struct dit_train *t, int R) {
    struct kern *k = t->k;
    const struct dit *m = t->net;
    int L = m->L, T = m->T, C = m->encoder.C, patch = m->a.in_channels * m->P * m->P;
    struct dit_set s = dit_set_at(m, 0, 0);
    struct places d = places_at(t, 0, PART_SELF);
    struct dit_vectors v = dit_vectors_at(m, &m->encoder, 0, PART_SELF, 0);
    TRY(k->gate_norm_backward(k, t->dx, NULL, d.shift, d.scale, NULL, t->d_in, s.part[PART_SELF].xhat, s.part[PART_SELF].rstd,
                              NULL, NULL, v.scale, m->mod_ld, R, L, C));
    if (L == T) return linear(t, &m->patch, NULL, t->dx, m->patches, KERN_NONE, NULL, R);
    for (int r = 0; r < R; r++)
        TRY(linear(t, &m->patch, NULL, t->dx + (size_t)r * (size_t)(L * C), m->patches + (size_t)r * (size_t)(T * patch),
                   KERN_NONE, NULL, 1));
    TRY(k->take_token(k, t->d_t, t->dx, R, L, C, T));
    return k->take_token(k, t->d_y, t->dx, R, L, C, T + 1);
}

/* ---- conditioning ---- */

// What a larger batch left behind lines up to whole units.
static int clear_padding(const struct dit_train *t, float *lines, int n, int ld) {
    int padding = dit_units(n) * KERN_VEC - n;
    return padding ? t->k->zero(t->k, lines + (size_t)n * (size_t)ld, (size_t)padding * (size_t)ld * sizeof *lines) : KERN_OK;
}

// To d_t and d_y.
static int conditioning(struct dit_train *t, int R) {
    struct kern *k = t->k;
    const struct dit *m = t->net;
    int C = m->encoder.C, kv_ld = 2 * C * m->encoder.depth, tokens = R * DIT_CONTEXT;
    if (m->n_mod) { // of their sum; d_y is the same memory
        TRY(clear_padding(t, t->d_mod, R, m->mod_ld));
        return linear(t, &m->mod[0], t->d_t, t->d_mod, m->silu_c, KERN_SILU, m->c, dit_units(R));
    }
    if (m->kv.run) {
        TRY(clear_padding(t, t->d_kv, tokens, kv_ld));
        TRY(linear(t, &m->kv, t->d_context, t->d_kv, m->context, KERN_NONE, NULL, dit_units(tokens)));
        TRY(k->take_token(k, t->d_t, t->d_context, R, DIT_CONTEXT, C, 0));
        TRY(k->take_token(k, t->d_y, t->d_context, R, DIT_CONTEXT, C, 1));
    }
    return clear_padding(t, t->d_t, R, C);
}

static int embedders(struct dit_train *t, int R) {
    const struct dit *m = t->net;
    const struct dit_embedder *em = m->embedders;
    TRY(t->k->condition_backward(t->k, t->flat.grads + em->at, t->d_y, m->y, R, m->encoder.C));
    TRY(linear(t, &em->t2, t->d_hidden, t->d_t, m->t_hidden, KERN_SILU, m->t_pre, dit_units(R)));
    return linear(t, &em->t1, NULL, t->d_hidden, m->freq, KERN_NONE, NULL, dit_units(R));
}

int dit_back(struct dit_train *t, int R) {
    TRY(from_pixels(t, R));
    for (int i = t->net->encoder.depth - 1; i >= 0; i--) TRY(block(t, i, R));
    TRY(to_tokens(t, R));
    TRY(conditioning(t, R));
    TRY(embedders(t, R));
    ready(t, 0, t->flat.blocks[0]);
    return KERN_OK;
}
