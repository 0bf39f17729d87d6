// SPDX-License-Identifier: MIT
/*
 * dit_load: from a table of tensors to layers on the back end.
 *
 * Every weight is checked to be finite on its way: the exponent bits tell, whatever the type. Weights in float32, float16 and
 * bfloat16 go to linear_new as they lie; others, stacks of unlike types and negated ones go through float32.
 *
 * A network that learns has its weights in one flat array on the back end (struct dit_flat), over which layers and tables are
 * laid by the same names; the table of tensors is then empty.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/model/dit_train_int.h"

typedef char layer_name[96];

static int get(const struct tensor **out, const struct tensor_table *w, const char *name, struct err *e) {
    *out = tensor_find(w, name);
    if (!*out) return err_param(e, E_FORMAT, name, "tensor '%s' is missing", name);
    return OK;
}

// A tensor's values as finite float32 at dst.
static int values(float *dst, const struct tensor *t, struct err *e) {
    if (tensor_to_f32(dst, t, e)) return e->status;
    struct tensor view = {.name = t->name, .dtype = DT_F32, .data = dst, .count = t->count};
    return tensor_check_finite(&view, e);
}

// One tensor as float32, finite; caller frees.
static int floats(float **out, const struct tensor_table *w, const char *name, struct err *e) {
    const struct tensor *t;
    if (get(&t, w, name, e)) return e->status;
    *out = mem_array(t->count, sizeof **out);
    if (!*out) return err_set(e, E_NOMEM, "no memory for tensor '%s'", name);
    return values(*out, t, e);
}

/* ---- products ---- */

// Weights of one layer in one type that linear_new takes: in one host buffer, or in pieces as they lie in the table.
struct stack {
    void *data;          // NULL: pieces
    const void **piece;  // [n], owned
    size_t *count;       // [n], owned
    int n;
    enum kern_dtype type;
    bool owned;
};

// A layer made of several: the outputs of NAME.weight, NAME.bias of each name one after the other, then `ones` outputs that are
// always 1.
struct parts {
    const layer_name *names;
    int n, ones;
    bool negated; // the outputs change sign
};

static enum kern_dtype storage(enum dtype t) { return t == DT_F16 ? KERN_F16 : t == DT_BF16 ? KERN_BF16 : KERN_F32; }

static int stack_pieces(struct stack *s, const struct tensor **t, int n, struct err *e) {
    s->piece = mem_array((size_t)n, sizeof *s->piece);
    s->count = mem_array((size_t)n, sizeof *s->count);
    if (!s->piece || !s->count) return err_set(e, E_NOMEM, "no memory to list %d weights", n);
    for (s->n = 0; s->n < n; s->n++) s->piece[s->n] = t[s->n]->data, s->count[s->n] = t[s->n]->count;
    return OK;
}

static int stack_load(struct stack *s, const struct kern *k, const struct tensor **t, const struct parts *p, size_t in, struct err *e) {
    size_t count = (size_t)p->ones * in;
    bool same = !p->negated;
    for (int i = 0; i < p->n; i++) {
        count += t[i]->count;
        same = same && t[i]->dtype == t[0]->dtype;
    }
    bool direct = same && (t[0]->dtype == DT_F32 || t[0]->dtype == DT_F16 || t[0]->dtype == DT_BF16);
    for (int i = 0; direct && i < p->n; i++)
        if (tensor_check_finite(t[i], e)) return e->status;
    *s = (struct stack){.type = direct ? storage(t[0]->dtype) : KERN_F32};
    if (direct && p->n == 1 && !p->ones) return s->data = (void *)t[0]->data, OK;
    if (direct && !p->ones && k->linear_new_pieces) return stack_pieces(s, t, p->n, e);
    size_t size = kern_dtype_size(s->type), at = 0;
    s->owned = true;
    s->data = mem_array(count, size); // zeroed, as the weights of the constant outputs must be
    if (!s->data) return err_set(e, E_NOMEM, "no memory to gather %zu weights", count);
    for (int i = 0; i < p->n; at += t[i++]->count) {
        char *dst = (char *)s->data + at * size;
        if (direct) memcpy(dst, t[i]->data, t[i]->bytes);
        else if (values((float *)dst, t[i], e)) return e->status;
    }
    for (size_t i = 0; p->negated && i < count; i++) ((float *)s->data)[i] *= -1;
    return OK;
}

static void stack_drop(struct stack *s) {
    if (s->owned) mem_free(s->data);
    mem_free(s->piece), mem_free(s->count);
    *s = (struct stack){0};
}

static int bias_load(float **out, const struct tensor **t, const struct parts *p, int count, struct err *e) {
    float *b = *out = mem_array((size_t)count, sizeof *b);
    if (!b) return err_set(e, E_NOMEM, "no memory to load '%s'", p->names[0]);
    int at = 0;
    for (int i = 0; i < p->n; at += (int)t[i++]->count)
        if (values(b + at, t[i], e)) return e->status;
    for (int i = 0; i < p->ones; i++) b[at + i] = 1;
    for (int i = 0; p->negated && i < count; i++) b[i] *= -1;
    return OK;
}

static int own_layer(struct dit *m, struct kern_linear *layer, struct err *e) {
    struct kern_linear **grown = mem_resize(m->layers, (size_t)m->n_layers + 1, sizeof(struct kern_linear *));
    if (!grown) return m->k->linear_free(m->k, layer), err_set(e, E_NOMEM, "no memory for a list of layers");
    m->layers = grown;
    m->layers[m->n_layers++] = layer;
    return OK;
}

static int make_linear(struct dit *m, struct dit_linear *out, const struct kern_linear_spec *spec, const struct stack *w, const float *b,
                       struct err *e) {
    struct kern *k = m->k;
    struct kern_linear *layer;
    int rc = w->data ? k->linear_new(k, spec, w->data, b, &layer) : k->linear_new_pieces(k, spec, w->piece, w->count, w->n, b, &layer);
    if (rc) return dit_failed(m, rc, e);
    if (own_layer(m, layer, e)) return e->status;
    out->run = layer;
    m->bytes += (size_t)spec->out * (size_t)spec->in * kern_dtype_size(spec->x_f32 && spec->y_f32 ? KERN_F32 : m->k->act);
    return OK;
}

// Over the flat array, where the parts lie one after the other.
static int wrap_linear(struct dit *m, struct dit_linear *out, const struct parts *p, const struct kern_linear_spec *spec,
                       struct err *e) {
    char name[128];
    snprintf(name, sizeof name, "%s.weight", p->names[0]);
    const struct dit_param *w = dit_flat_find(m->flat, name);
    snprintf(name, sizeof name, "%s.bias", p->names[0]);
    const struct dit_param *b = dit_flat_find(m->flat, name);
    if (!w || !b) return err_param(e, E_INTERNAL, name, "tensor '%s' has no place in the flat array", name);
    int rc = m->k->linear_wrap(m->k, spec, m->flat->weights + w->offset, m->flat->weights + b->offset, &out->run);
    if (rc) return dit_failed(m, rc, e);
    out->w = w->offset, out->b = b->offset, out->out = spec->out;
    return own_layer(m, out->run, e);
}

static int linear_load(struct dit *m, struct dit_linear *out, const struct tensor_table *w, const struct parts *p,
                       struct kern_linear_spec spec, struct err *e) {
    if (m->flat) return wrap_linear(m, out, p, &spec, e);
    const struct tensor **t = mem_array((size_t)p->n * 2, sizeof(const struct tensor *));
    struct stack weight = {0};
    float *b = NULL;
    char name[128];
    int rc = t ? OK : err_set(e, E_NOMEM, "no memory to load '%s'", p->names[0]);
    for (int i = 0; i < p->n && rc == OK; i++) {
        snprintf(name, sizeof name, "%s.weight", p->names[i]);
        rc = get(&t[i], w, name, e);
        snprintf(name, sizeof name, "%s.bias", p->names[i]);
        if (rc == OK) rc = get(&t[p->n + i], w, name, e);
    }
    if (rc == OK) rc = stack_load(&weight, m->k, t, p, (size_t)spec.in, e);
    if (rc == OK) rc = bias_load(&b, t + p->n, p, spec.out, e);
    spec.w_store = weight.type;
    if (rc == OK) rc = make_linear(m, out, &spec, &weight, b, e);
    stack_drop(&weight);
    mem_free(b);
    mem_free(t);
    return rc;
}

static int one_linear(struct dit *m, struct dit_linear *out, const struct tensor_table *w, const char *prefix, const char *name,
                      struct kern_linear_spec spec, struct err *e) {
    layer_name whole[1];
    snprintf(whole[0], sizeof whole[0], "%s%s", prefix, name);
    return linear_load(m, out, w, &(struct parts){.names = (const layer_name *)whole, .n = 1}, spec, e);
}

/* ---- tables ---- */

// The fixed 2-D sin-cos table for checkpoints that do not store it: the first half encodes the column, the second the row.
static void position_table(float *pos, int side, int C) {
    size_t quarter = (size_t)C / 4;
    for (int n = 0; n < side * side; n++)
        for (size_t k = 0; k < quarter; k++) {
            int in_row = n % side, in_column = n / side;
            double omega = pow(10000.0, -(double)k / (double)quarter), col = in_row * omega, row = in_column * omega;
            float *p = pos + (size_t)n * (size_t)C + k;
            p[0] = (float)sin(col), p[quarter] = (float)cos(col);
            p[2 * quarter] = (float)sin(row), p[3 * quarter] = (float)cos(row);
        }
}

static int load_positions(struct dit *m, float **out, const struct tensor_table *w, const char *name, int C, struct err *e) {
    size_t count = (size_t)m->T * (size_t)C;
    float *host = NULL;
    int rc = OK;
    if (tensor_find(w, name)) rc = floats(&host, w, name, e);
    else if (!(host = mem_array(count, sizeof *host))) rc = err_set(e, E_NOMEM, "no memory for the position table");
    else position_table(host, m->a.input_size / m->P, C);
    if (rc == OK) rc = dit_buffer_from(m, out, host, count, e);
    mem_free(host);
    return rc;
}

// MaskDiT's labels are a layer on one-hot rows: its weight [C, classes] is a table lying on its side, and its null class a row of
// zeros.
static int labels_upright(float **table, int C, int classes, struct err *e) {
    float *lying = *table, *t = mem_array((size_t)(classes + 1) * (size_t)C, sizeof *t);
    if (!t) return err_set(e, E_NOMEM, "no memory for the label table");
    for (size_t i = 0; i < (size_t)C; i++)
        for (size_t c = 0; c < (size_t)classes; c++) t[c * (size_t)C + i] = lying[i * (size_t)classes + c];
    mem_free(lying);
    *table = t;
    return OK;
}

static int load_labels(struct dit *m, struct dit_embedder *em, const struct tensor_table *w, const char *prefix, struct err *e) {
    char name[128];
    float *host = NULL;
    int C = m->encoder.C, classes = m->a.num_classes;
    snprintf(name, sizeof name, "%sy_embedder.embedding_table.weight", prefix);
    if (m->flat) {
        em->at = dit_flat_find(m->flat, name)->offset;
        return em->labels = m->flat->weights + em->at, OK;
    }
    int rc = floats(&host, w, name, e);
    if (rc == OK && m->a.one_hot) rc = labels_upright(&host, C, classes, e);
    size_t rows = (size_t)classes + (m->a.one_hot || m->a.class_dropout ? 1 : 0);
    if (rc == OK) rc = dit_buffer_from(m, &em->labels, host, rows * (size_t)C, e);
    mem_free(host);
    return rc;
}

static int load_embedder(struct dit *m, struct dit_embedder *em, const struct tensor_table *w, const char *prefix,
                         struct err *e) {
    int C = m->encoder.C;
    struct kern_linear_spec t1 = {
        .out = C, .in = DIT_FREQUENCIES, .unit = KERN_VEC, .act = KERN_SILU, .x_f32 = true, .y_f32 = true};
    struct kern_linear_spec t2 = {.out = C, .in = C, .unit = KERN_VEC, .x_f32 = true, .y_f32 = true};
    if (one_linear(m, &em->t1, w, prefix, "t_embedder.mlp.0", t1, e)) return e->status;
    if (one_linear(m, &em->t2, w, prefix, "t_embedder.mlp.2", t2, e)) return e->status;
    return load_labels(m, em, w, prefix, e);
}

static int load_embedders(struct dit *m, const struct tensor_table *w, struct err *e) {
    m->n_embedders = m->a.block_embedders ? m->a.depth : 1;
    m->embedders = mem_array((size_t)m->n_embedders, sizeof *m->embedders);
    if (!m->embedders) return err_set(e, E_NOMEM, "no memory for %d embedders", m->n_embedders);
    for (int i = 0; i < m->n_embedders; i++) {
        char prefix[32] = "";
        if (m->a.block_embedders) snprintf(prefix, sizeof prefix, "blocks.%d.", i);
        if (load_embedder(m, &m->embedders[i], w, prefix, e)) return e->status;
    }
    return OK;
}

/* ---- conditioning ---- */

// Every block's and the final layer's modulation as one product.
static int load_modulation(struct dit *m, const struct tensor_table *w, struct err *e) {
    int C = m->encoder.C, D = m->decoder.C, per_block = (m->a.block == BLOCK_ADALN ? 4 : 6) * C, n = 0;
    layer_name *names = mem_array((size_t)(m->encoder.depth + m->decoder.depth) + 2, sizeof *names);
    if (!names) return err_set(e, E_NOMEM, "no memory to load the modulation");
    for (int i = 0; i < m->encoder.depth; i++) snprintf(names[n++], sizeof *names, "blocks.%d.adaLN_modulation.1", i);
    if (m->decoder.depth) snprintf(names[n++], sizeof *names, "decoder_layer.adaLN_modulation.1");
    for (int i = 0; i < m->decoder.depth; i++) snprintf(names[n++], sizeof *names, "decoder_blocks.%d.adaLN_modulation.1", i);
    snprintf(names[n++], sizeof *names, "final_layer.adaLN_modulation.1");
    struct parts p = {.names = (const layer_name *)names, .n = n};
    m->encoder.mod_step = (size_t)per_block;
    m->mod_ld = per_block * m->encoder.depth + 2 * C;
    m->decoder.mod_first = (size_t)m->mod_ld, m->decoder.mod_step = 6 * (size_t)D;
    if (m->decoder.depth) m->mod_ld += 6 * D * m->decoder.depth + 2 * D;
    struct kern_linear_spec spec = {.out = m->mod_ld, .in = C, .unit = KERN_VEC, .x_f32 = true, .y_f32 = true};
    int rc = linear_load(m, &m->mod[0], w, &p, spec, e);
    mem_free(names);
    return rc;
}

// With an embedder a block there is a product a block, [lines, 6*C] each, and the final layer's, of which the first 2*C are used.
static int load_block_modulations(struct dit *m, const struct tensor_table *w, struct err *e) {
    int C = m->encoder.C, lines = KERN_ROUND_UP(m->max_rows, KERN_VEC);
    m->mod_ld = 6 * C;
    m->encoder.mod_step = (size_t)lines * 6 * (size_t)C;
    for (int i = 0; i < m->n_mod; i++) {
        layer_name name[1];
        bool final = i == m->n_mod - 1;
        if (final) snprintf(name[0], sizeof name[0], "final_layer.adaLN_modulation.1");
        else snprintf(name[0], sizeof name[0], "blocks.%d.adaLN_modulation.1", i);
        struct parts p = {.names = (const layer_name *)name, .n = 1, .ones = final ? 4 * C : 0};
        struct kern_linear_spec spec = {.out = 6 * C, .in = C, .unit = KERN_VEC, .x_f32 = true, .y_f32 = true};
        if (linear_load(m, &m->mod[i], w, &p, spec, e)) return e->status;
    }
    return OK;
}

static int load_keys_values(struct dit *m, const struct tensor_table *w, struct err *e) {
    int C = m->encoder.C, n = m->encoder.depth;
    layer_name *names = mem_array((size_t)n, sizeof *names);
    if (!names) return err_set(e, E_NOMEM, "no memory to load the cross-attention");
    for (int i = 0; i < n; i++) snprintf(names[i], sizeof *names, "blocks.%d.cross_attn.kv", i);
    struct kern_linear_spec spec = {.out = 2 * C * n, .in = C, .unit = KERN_VEC, .x_f32 = true, .y_f32 = true};
    int rc = linear_load(m, &m->kv, w, &(struct parts){.names = (const layer_name *)names, .n = n}, spec, e);
    mem_free(names);
    return rc;
}

static int load_conditioning(struct dit *m, const struct tensor_table *w, struct err *e) {
    if (load_embedders(m, w, e)) return e->status;
    if (m->a.block == BLOCK_CROSS_ATTENTION) return load_keys_values(m, w, e);
    if (m->affine) return OK;
    m->n_mod = m->a.block_embedders ? m->a.depth + 1 : 1;
    m->mod = mem_array((size_t)m->n_mod, sizeof *m->mod);
    if (!m->mod) return err_set(e, E_NOMEM, "no memory to load the modulation");
    return m->a.block_embedders ? load_block_modulations(m, w, e) : load_modulation(m, w, e);
}

/* ---- blocks ---- */

static void lay_affine(const struct dit *m, struct dit_affine *n, const char *prefix, const char *name) {
    char whole[128];
    snprintf(whole, sizeof whole, "%s%s.weight", prefix, name);
    n->w = dit_flat_find(m->flat, whole)->offset;
    snprintf(whole, sizeof whole, "%s%s.bias", prefix, name);
    n->b = dit_flat_find(m->flat, whole)->offset;
    n->scale = m->flat->norm_scale + (n->w - m->flat->norms);
    n->shift = m->flat->weights + n->b;
}

static int load_affine(struct dit *m, struct dit_affine *n, const struct tensor_table *w, const char *prefix, const char *name,
                       struct err *e) {
    char whole[128];
    float *host = NULL;
    size_t C = (size_t)m->encoder.C;
    snprintf(whole, sizeof whole, "%s%s.weight", prefix, name);
    if (m->flat) return lay_affine(m, n, prefix, name), OK;
    int rc = floats(&host, w, whole, e);
    for (size_t i = 0; rc == OK && i < C; i++) host[i] -= 1; // the ops multiply by 1 + scale
    if (rc == OK) rc = dit_buffer_from(m, &n->scale, host, C, e);
    mem_free(host);
    host = NULL;
    snprintf(whole, sizeof whole, "%s%s.bias", prefix, name);
    if (rc == OK) rc = floats(&host, w, whole, e);
    if (rc == OK) rc = dit_buffer_from(m, &n->shift, host, C, e);
    mem_free(host);
    return rc;
}

static int load_block(struct dit *m, const struct dit_stage *g, struct dit_block *b, const struct tensor_table *w,
                      const char *prefix, struct err *e) {
    struct {
        struct dit_linear *out;
        const char *name;
        int rows, cols;
        enum kern_act act;
    } layers[] = {
        {&b->qkv, "attn.qkv", 3 * g->C, g->C, KERN_NONE},     {&b->proj, "attn.proj", g->C, g->C, KERN_NONE},
        {&b->fc2, "mlp.fc2", g->C, g->MLP, KERN_NONE},        {&b->fc1, "mlp.fc1", g->MLP, g->C, KERN_GELU_TANH},
        {&b->cross_q, "cross_attn.q", g->C, g->C, KERN_NONE}, {&b->cross_proj, "cross_attn.proj", g->C, g->C, KERN_NONE},
    };
    bool cross = m->a.block == BLOCK_CROSS_ATTENTION;
    for (size_t i = 0; i < (cross ? 6 : 4); i++) {
        struct kern_linear_spec spec = {.out = layers[i].rows, .in = layers[i].cols, .unit = m->L, .act = layers[i].act};
        // those behind a norm or in the MLP, and proj where attention writes e4m3
        spec.x_fp8 = layers[i].out == &b->proj ? g->attention_fp8 : layers[i].out != &b->cross_proj;
        if (layers[i].out == &b->fc1) spec.y_for = b->fc2.run;
        if (one_linear(m, layers[i].out, w, prefix, layers[i].name, spec, e)) return e->status;
    }
    static const char *const norms[PARTS] = {[PART_SELF] = "norm1", [PART_CROSS] = "norm_cross", [PART_MLP] = "norm2"};
    for (int p = 0; m->affine && p < PARTS; p++)
        if (dit_has_part(m, p) && load_affine(m, &b->norm[p], w, prefix, norms[p], e)) return e->status;
    return OK;
}

static int load_stage(struct dit *m, struct dit_stage *g, const struct tensor_table *w, const char *blocks, struct err *e) {
    g->blocks = mem_array((size_t)g->depth, sizeof *g->blocks);
    if (!g->blocks) return err_set(e, E_NOMEM, "no memory for %d blocks", g->depth);
    g->attention_fp8 = m->k->attention_fp8 && m->k->attention_fp8(m->k, NULL, NULL, 0, m->L, g->H, g->C / g->H, NULL) == KERN_OK;
    for (int i = 0; i < g->depth; i++) {
        char prefix[64];
        snprintf(prefix, sizeof prefix, "%s%d.", blocks, i);
        if (load_block(m, g, &g->blocks[i], w, prefix, e)) return e->status;
    }
    return OK;
}

static int load_ends(struct dit *m, const struct tensor_table *w, struct err *e) {
    int C = m->encoder.C, patch2 = m->P * m->P, last_in = m->decoder.depth ? m->decoder.C : C;
    struct kern_linear_spec patch = {
        .out = C, .in = m->a.in_channels * patch2, .unit = m->T, .x_f32 = true, .y_f32 = true, .y_stream = true};
    struct kern_linear_spec last = {.out = m->out_channels * patch2, .in = last_in, .unit = m->T, .y_f32 = true};
    static const layer_name last_name[1] = {"final_layer.linear"};
    if (one_linear(m, &m->patch, w, "", "x_embedder.proj", patch, e)) return e->status;
    if (linear_load(m, &m->last, w, &(struct parts){.names = last_name, .n = 1, .negated = m->a.negated}, last, e))
        return e->status;
    if (load_positions(m, &m->pos, w, "pos_embed", C, e)) return e->status;
    return m->affine ? load_affine(m, &m->norm_final, w, "", "final_layer.norm_final", e) : OK;
}

static int load_decoder(struct dit *m, const struct tensor_table *w, struct err *e) {
    int D = m->decoder.C;
    struct kern_linear_spec spec = {.out = D, .in = m->encoder.C, .unit = m->T, .y_f32 = true, .y_stream = true};
    if (one_linear(m, &m->to_decoder, w, "", "decoder_layer.linear", spec, e)) return e->status;
    if (load_positions(m, &m->decoder_pos, w, "decoder_pos_embed", D, e)) return e->status;
    return load_stage(m, &m->decoder, w, "decoder_blocks.", e);
}

int dit_load(struct dit *m, const struct tensor_table *w, struct err *e) {
    if (load_ends(m, w, e) || load_stage(m, &m->encoder, w, "blocks.", e)) return e->status;
    if (m->decoder.depth && load_decoder(m, w, e)) return e->status;
    return load_conditioning(m, w, e);
}
