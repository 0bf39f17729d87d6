// SPDX-License-Identifier: MIT
/*
 * dit_back: the listing (listing.c) from its end to its beginning.
 *
 * Two gradients travel: dx, of the residual stream, in float32, and the one of what the current op read or wrote, in act, from
 * buffer to buffer: d_in (a part's normed input), d_out (what its gate took), d_wide. The vectors of norms and gates get theirs
 * where they lie: in d_mod at the places of modulation, or in the flat array. A block takes the rows in groups, whose gradients
 * caches hold; within one, ops run on all rows at once. Sums over rows have one order whatever the threads.
 *
 * A layer behind a norm owes its weights' gradients until that norm is passed, whose backward makes the layer's input again.
 * Biases' gradients are summed by the ops that make their layers' dy, where those can.
 */
#include "core/model/dit_train_int.h"

struct places { // of the gradients of a norm's vectors and a gate; gate NULL: there is none
    float *shift, *scale, *gate;
};

struct span { // a group of rows
    int first, n;
    bool last;
};

// Buffers of act [R, L, width] or the float32 stream, from a row on
static void *from_row(const struct dit_train *t, void *buffer, int row, size_t width) {
    return (char *)buffer + (size_t)row * (size_t)t->net->L * width * kern_dtype_size(t->k->act);
}
static void *d_in_at(const struct dit_train *t, int row) { return from_row(t, t->d_in, row, (size_t)t->net->encoder.C); }
static void *d_wide_at(const struct dit_train *t, int row) { return from_row(t, t->d_wide, row, t->wide); }
static float *dx_at(const struct dit_train *t, int row) { return t->dx + (size_t)row * (size_t)(t->net->L * t->net->encoder.C); }

// Whether a group's gradients are added to what is there
static bool adds(const struct dit_train *t, struct span rows) { return t->add || rows.first; }

static struct places places_at(const struct dit_train *t, int i, int part, int row) {
    const struct dit *m = t->net;
    const struct dit_stage *g = &m->encoder;
    if (m->affine) {
        const struct dit_affine *n = i < g->depth ? &g->blocks[i].norm[part] : &m->norm_final;
        return (struct places){t->flat.grads + n->b, t->flat.grads + n->w, NULL};
    }
    struct dit_vectors v = dit_vectors_at(m, g, i, part, row);
    float *shift = t->d_mod + (v.shift - m->modulation);
    bool gated = m->a.block == BLOCK_ADALN_ZERO;
    return (struct places){shift, shift + g->C, gated ? shift + 2 * (size_t)g->C : NULL};
}

// A layer's weights' gradients; bias: its own too
static int gradients(const struct dit_train *t, const struct dit_linear *l, bool bias, const void *dy, const void *x, int units,
                     bool add) {
    float *g = t->flat.grads;
    return t->k->linear_gradients(t->k, l->run, g + l->w, bias ? g + l->b : NULL, dy, x, units, 0, l->out, add);
}

// From a layer's dy to its dx. act, pre: as linear_backward's before and x_pre; maker: the layer whose output x was, or NULL
static int down(const struct dit_train *t, const struct dit_linear *l, void *dx, const struct dit_linear *maker, const void *dy,
                enum kern_act act, const void *pre, int units, bool add) {
    float *sum = maker ? t->flat.grads + maker->b : NULL;
    return t->k->linear_backward(t->k, l->run, dx, sum, dy, act, pre, units, add);
}

static void ready(const struct dit_train *t, size_t from, size_t to) {
    if (t->on_grads && to > from) t->on_grads(t->ctx, from, to - from);
}

static size_t after_block(const struct dit_train *t, int i) {
    return i < t->net->encoder.depth ? t->flat.blocks[i + 1] : t->flat.floats;
}

// What can be had when the gradients of all vectors of block i (depth: of the final layer) are there.
static int block_done(struct dit_train *t, int i, int R) {
    const struct dit *m = t->net;
    const struct dit_stage *g = &m->encoder;
    size_t C = (size_t)g->C, first = (size_t)i * g->mod_step, count = i < g->depth ? g->mod_step : 2 * C;
    ready(t, t->flat.blocks[i], after_block(t, i));
    if (!m->n_mod) return KERN_OK;
    float *dw = t->flat.grads + m->mod[0].w + first * C, *db = t->flat.grads + m->mod[0].b + first;
    TRY(t->k->linear_gradients(t->k, m->mod[0].run, dw, db, t->d_mod, m->silu_c, dit_units(R), (int)first, (int)count, t->add));
    return ready(t, m->mod[0].w + first * C, m->mod[0].w + (first + count) * C), KERN_OK;
}

/* ---- blocks ---- */

static int owe(struct dit_train *t, const struct dit_linear *l, bool bias) { return t->owed = l, t->owed_bias = bias, KERN_OK; }

// x: the input of the layer that owes, where one does
static int pay(struct dit_train *t, const void *x, struct span rows) {
    const struct dit_linear *l = t->owed;
    t->owed = NULL;
    return l ? gradients(t, l, t->owed_bias, d_wide_at(t, rows.first), x, rows.n, adds(t, rows)) : KERN_OK;
}

static const struct dit_linear *last_layer(const struct dit_block *b, int part) { // of a part
    return part == PART_SELF ? &b->proj : part == PART_CROSS ? &b->cross_proj : &b->fc2;
}

// From d_in, of what comes after the gate and norm behind part p of block i (`to` holds that norm), to d_out and dx.
static int gate_norm(struct dit_train *t, int i, int part, int follows, const struct dit_set *s, const struct dit_part *to,
                     struct span rows) {
    const struct dit *m = t->net;
    const struct dit_stage *g = &m->encoder;
    bool last = follows == PARTS;
    int next = last ? i + 1 : i, norm = last ? PART_SELF : follows, row = rows.first;
    struct dit_vectors v = dit_vectors_at(m, g, i, part, row), u = dit_vectors_at(m, g, next, norm, row);
    struct places dv = places_at(t, i, part, row), du = places_at(t, next, norm, row);
    struct kern_norm_back a = {.dx = dx_at(t, row),
                               .dh = t->d_out,
                               .dh_sum = t->flat.grads + last_layer(&g->blocks[i], part)->b,
                               .dshift = du.shift,
                               .dscale = du.scale,
                               .dgate = dv.gate,
                               .dy = d_in_at(t, row),
                               .xhat = to->xhat,
                               .rstd = to->rstd,
                               .h = s->part[part].out,
                               .gate = v.gate,
                               .shift = u.shift,
                               .scale = u.scale,
                               .ld = m->mod_ld,
                               .R = rows.n,
                               .T = m->L,
                               .C = g->C,
                               .add = adds(t, rows)};
    if (t->owed) a.y = to->in;
    TRY(t->k->gate_norm_backward(t->k, &a));
    TRY(pay(t, to->in, rows));
    return last && rows.last ? block_done(t, next, row + rows.n) : KERN_OK;
}

// From d_out to d_in.
static int work(struct dit_train *t, int i, int part, const struct dit_set *s, struct span rows) {
    struct kern *k = t->k;
    const struct dit *m = t->net;
    const struct dit_stage *g = &m->encoder;
    const struct dit_block *b = &g->blocks[i];
    int D = g->C / g->H, ld = 2 * g->C * g->depth, R = rows.n;
    size_t kv = (size_t)rows.first * DIT_CONTEXT * (size_t)ld + (size_t)i * 2 * (size_t)g->C;
    void *d_in = d_in_at(t, rows.first), *d_wide = d_wide_at(t, rows.first);
    bool add = adds(t, rows);
    if (part == PART_SELF) {
        TRY(gradients(t, &b->proj, false, t->d_out, s->attn, R, add));
        TRY(down(t, &b->proj, d_in, NULL, t->d_out, KERN_NONE, NULL, R, add));
        TRY(k->attention_backward(k, d_wide, t->flat.grads + b->qkv.b, d_in, s->qkv, s->attn, s->lse, R, m->L, g->H, D, add));
        TRY(down(t, &b->qkv, d_in, NULL, d_wide, KERN_NONE, NULL, R, add));
        return owe(t, &b->qkv, false);
    }
    if (part == PART_CROSS) {
        TRY(gradients(t, &b->cross_proj, false, t->d_out, s->cross, R, add));
        TRY(down(t, &b->cross_proj, d_in, NULL, t->d_out, KERN_NONE, NULL, R, add));
        TRY(k->cross_attention_backward(k, d_wide, t->d_kv + kv, d_in, s->q, m->context_kv + kv, ld, R, m->L, DIT_CONTEXT, g->H,
                                        D));
        TRY(down(t, &b->cross_q, d_in, NULL, d_wide, KERN_NONE, NULL, R, add));
        return owe(t, &b->cross_q, true);
    }
    TRY(gradients(t, &b->fc2, false, t->d_out, s->mlp, R, add));
    TRY(down(t, &b->fc2, d_wide, &b->fc1, t->d_out, KERN_GELU_TANH, s->pre, R, add));
    TRY(down(t, &b->fc1, d_in, NULL, d_wide, KERN_NONE, NULL, R, add));
    return owe(t, &b->fc1, false);
}

static int block_group(struct dit_train *t, int i, struct span rows) {
    const struct dit *m = t->net;
    struct dit_set s = dit_set_at(m, i, rows.first), next = dit_set_at(m, m->inputs ? m->encoder.depth : i + 1, rows.first);
    for (int part = PART_MLP, follows = PARTS; part >= PART_SELF; part--) {
        if (!dit_has_part(m, part)) continue;
        TRY(gate_norm(t, i, part, follows, &s, &(follows == PARTS ? &next : &s)->part[follows % PARTS], rows));
        TRY(work(t, i, part, &s, rows));
        follows = part;
    }
    return KERN_OK;
}

typedef int group_fn(struct dit_train *, int i, struct span);

// Every group owes what the block behind left.
static int groups(struct dit_train *t, int i, int R, group_fn *fn) {
    const struct dit_linear *owed = t->owed;
    bool owed_bias = t->owed_bias;
    for (int first = 0; first < R; first += t->group) {
        bool last = R - first <= t->group;
        t->owed = owed, t->owed_bias = owed_bias;
        TRY(fn(t, i, (struct span){first, last ? R - first : t->group, last}));
    }
    return KERN_OK;
}

static int block(struct dit_train *t, int i, int R) {
    if (t->net->inputs) TRY(dit_again(t->net, i, R));
    return groups(t, i, R, block_group);
}

/* ---- both ends ---- */

// From the output's gradient to d_in, the final norm's; dx is 0.
static int from_pixels(struct dit_train *t, int R) {
    struct kern *k = t->k;
    const struct dit *m = t->net;
    size_t act = kern_dtype_size(k->act), line = (size_t)m->encoder.C, row = (size_t)m->L * line;
    int T = m->T, P = m->P, patch = m->out_channels * P * P, depth = m->encoder.depth, calls = m->L == T ? 1 : R;
    char *in = dit_set_at(m, depth, 0).part[PART_SELF].in, *d_in = t->d_in;
    TRY(k->zero(k, t->dx, (size_t)R * row * sizeof(float)));
    TRY(k->unpatchify_backward(k, t->dtok, t->dout, R, m->out_channels, m->keep, m->a.input_size, P));
    if (m->L != T) TRY(k->zero(k, d_in, (size_t)R * row * act)); // the tokens of timestep and label were dropped
    for (int r = 0; r < calls; r++) {
        size_t at = (size_t)r * row * act;
        const float *dy = t->dtok + (size_t)r * (size_t)(T * patch);
        TRY(gradients(t, &m->last, true, dy, in + at, R / calls, t->add || r));
        TRY(down(t, &m->last, d_in + at, NULL, dy, KERN_NONE, NULL, R / calls, t->add));
    }
    return KERN_OK;
}

static int pay_first(struct dit_train *t, int i, struct span rows) {
    return pay(t, dit_set_at(t->net, i, rows.first).part[PART_SELF].in, rows);
}

// From d_in, the first block's, to the patch embedding.
static int to_tokens(struct dit_train *t, int R) {
    struct kern *k = t->k;
    const struct dit *m = t->net;
    int L = m->L, T = m->T, C = m->encoder.C, patch = m->a.in_channels * m->P * m->P, calls = L == T ? 1 : R;
    struct dit_part first = dit_set_at(m, 0, 0).part[PART_SELF];
    struct places d = places_at(t, 0, PART_SELF, 0);
    struct dit_vectors v = dit_vectors_at(m, &m->encoder, 0, PART_SELF, 0);
    struct kern_norm_back a = {.dx = t->dx,
                               .y = first.in,
                               .dshift = d.shift,
                               .dscale = d.scale,
                               .dy = t->d_in,
                               .xhat = first.xhat,
                               .rstd = first.rstd,
                               .shift = v.shift,
                               .scale = v.scale,
                               .ld = m->mod_ld,
                               .R = R,
                               .T = L,
                               .C = C};
    TRY(k->gate_norm_backward(k, &a));
    TRY(groups(t, 0, R, pay_first));
    TRY(block_done(t, 0, R));
    for (int r = 0; r < calls; r++)
        TRY(gradients(t, &m->patch, true, t->dx + (size_t)r * (size_t)(L * C), m->patches + (size_t)r * (size_t)(T * patch),
                      R / calls, t->add || r));
    if (L == T) return KERN_OK;
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
    if (m->n_mod) // of their sum; d_y is the same memory
        return down(t, &m->mod[0], t->d_t, NULL, t->d_mod, KERN_SILU, m->c, dit_units(R), t->add);
    if (m->kv.run) {
        TRY(clear_padding(t, t->d_kv, tokens, kv_ld));
        TRY(gradients(t, &m->kv, true, t->d_kv, m->context, dit_units(tokens), t->add));
        TRY(down(t, &m->kv, t->d_context, NULL, t->d_kv, KERN_NONE, NULL, dit_units(tokens), t->add));
        TRY(k->take_token(k, t->d_t, t->d_context, R, DIT_CONTEXT, C, 0));
        TRY(k->take_token(k, t->d_y, t->d_context, R, DIT_CONTEXT, C, 1));
    }
    return clear_padding(t, t->d_t, R, C);
}

static int embedders(struct dit_train *t, int R) {
    const struct dit *m = t->net;
    const struct dit_embedder *em = m->embedders;
    int units = dit_units(R);
    TRY(t->k->condition_backward(t->k, t->flat.grads + em->at, t->d_y, m->y, R, m->encoder.C));
    TRY(gradients(t, &em->t2, true, t->d_t, m->t_hidden, units, t->add));
    TRY(down(t, &em->t2, t->d_hidden, NULL, t->d_t, KERN_SILU, m->t_pre, units, t->add));
    return gradients(t, &em->t1, true, t->d_hidden, m->freq, units, t->add);
}

// What lies in front of modulation (keys and values) is added to, whatever t->add: tables, norms; and lines of padding are not
// read
static int begin(const struct dit_train *t, int R) {
    const struct dit_flat *f = &t->flat;
    if (t->net->n_mod) TRY(clear_padding(t, t->d_mod, R, t->net->mod_ld));
    return t->add ? KERN_OK : t->k->zero(t->k, f->grads, (f->wide_count ? f->wide : f->blocks[0]) * sizeof(float));
}

int dit_back(struct dit_train *t, int R) {
    const struct dit_flat *f = &t->flat;
    t->owed = NULL;
    TRY(begin(t, R));
    TRY(from_pixels(t, R));
    for (int i = t->net->encoder.depth - 1; i >= 0; i--) TRY(block(t, i, R));
    TRY(to_tokens(t, R));
    TRY(conditioning(t, R));
    TRY(embedders(t, R));
    if (!t->net->n_mod) return ready(t, 0, f->blocks[0]), KERN_OK;
    ready(t, f->wide + f->wide_count, f->blocks[0]);
    return ready(t, 0, f->wide), KERN_OK;
}
