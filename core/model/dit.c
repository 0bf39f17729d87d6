// SPDX-License-Identifier: MIT
/*
 * dit: one forward pass of DiT/SiT with adaLN-Zero, on any back end.
 *
 * Two phases. The conditioning of all rows comes first, as a handful of wide products: timestep -> MLP, plus the label's vector, SiLU, then ONE
 * product that gives every block's six modulation vectors and the final layer's two (mod: [R, 6*C*N + 2*C]). Then k->rows walks the
 * tokens: each lane takes some rows through the whole network, so that on the CPU one row's activations stay in one core's cache and no
 * thread waits for another inside a forward pass.
 *
 * The residual stream is float32; what products read and write between (norm, qkv, attention, MLP) is in k->act. Each block's gate is fused with
 * the norm that follows it: attention's gate with the MLP's norm, the MLP's gate with the next block's norm, the last with the final layer's.
 */
#include "core/model/dit.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"

#define FREQUENCIES 256 // of the timestep embedding (DiT models.py)
#define LN_EPS 1e-6f

struct block { struct kern_linear *qkv, *proj, *fc1, *fc2; };

struct dit {
    struct kern *k;
    struct arch a;
    int T, C, H, P, MLP, out_channels, keep, max_rows;
    int mod_width;                                 // 6*C*depth + 2*C
    struct kern_linear *patch, *t1, *t2, *mod, *last;
    struct block *blocks;
    float *pos, *labels;                           // [T, C], [classes + null, C]
    /* one line a row, a multiple of KERN_VEC of them */
    float *x, *out, *t, *freq, *t_hidden, *t_embed, *silu_c, *modulation;
    int32_t *y;
    /* scratch, one set a scratch row of the back end */
    float *patches, *stream, *last_out;
    char *norm, *qkv, *attn, *hidden, *mlp;        // act
    struct kern_graph **graphs;                    // one a size of batch (see graphs below), where the back end records; else NULL
    size_t bytes;
};

static int record(struct dit *, struct err *);

/* ---- loading ---- */

static int kern_failed(const struct kern *k, int rc, struct err *e) {
    return err_set(e, rc == KERN_ENOMEM ? E_NOMEM : rc == KERN_EUNSUPPORTED ? E_UNSUPPORTED : E_DEVICE, "%s: %s", k->name, k->why);
}

// Every weight finite? The exponent bits tell, whatever the type.
static int check_finite(const struct tensor *t, struct err *e) {
    for (size_t i = 0; i < t->count; i++) {
        uint16_t h = 0;
        uint32_t w = 0;
        bool bad;
        if (t->dtype == DT_F32) {
            memcpy(&w, (const char *)t->data + 4 * i, 4);
            bad = (w & 0x7f800000u) == 0x7f800000u;
        } else {
            uint16_t exponent = t->dtype == DT_BF16 ? 0x7f80 : 0x7c00;
            memcpy(&h, (const char *)t->data + 2 * i, 2);
            bad = (h & exponent) == exponent;
        }
        if (bad) return err_param(e, E_NONFINITE, t->name, "tensor '%s' holds NaN or infinity at element %zu", t->name, i);
    }
    return OK;
}

// A weight matrix or several of one width, stacked, in one host buffer of one type that kern_linear takes.
struct stack { void *data; enum kern_dtype type; bool owned; };

static enum kern_dtype storage(enum dtype t) { return t == DT_F16 ? KERN_F16 : t == DT_BF16 ? KERN_BF16 : KERN_F32; }

static int get(const struct tensor **out, const struct tensor_table *w, const char *name, struct err *e) {
    *out = tensor_find(w, name);
    if (!*out) return err_param(e, E_FORMAT, name, "tensor '%s' is missing", name);
    return OK;
}

static int stack_load(struct stack *s, const struct tensor **t, int n, struct err *e) {
    size_t count = 0;
    bool same = true;
    for (int i = 0; i < n; i++) {
        count += t[i]->count;
        same = same && t[i]->dtype == t[0]->dtype;
    }
    bool direct = same && (t[0]->dtype == DT_F32 || t[0]->dtype == DT_F16 || t[0]->dtype == DT_BF16);
    for (int i = 0; direct && i < n; i++)
        if (check_finite(t[i], e)) return e->status;
    *s = (struct stack){.type = direct ? storage(t[0]->dtype) : KERN_F32};
    if (direct && n == 1) return s->data = (void *)t[0]->data, OK;
    size_t size = kern_dtype_size(s->type), at = 0;
    s->owned = true;
    s->data = mem_array(count, size);
    if (!s->data) return err_set(e, E_NOMEM, "no memory to gather %zu weights", count);
    for (int i = 0; i < n; at += t[i++]->count) {
        char *dst = (char *)s->data + at * size;
        if (direct) {
            memcpy(dst, t[i]->data, t[i]->bytes);
            continue;
        }
        if (tensor_to_f32((float *)dst, t[i], e)) return e->status;
        struct tensor view = {.name = t[i]->name, .dtype = DT_F32, .data = dst, .count = t[i]->count};
        if (check_finite(&view, e)) return e->status;
    }
    return OK;
}

static void stack_drop(struct stack *s) {
    if (s->owned) mem_free(s->data);
    *s = (struct stack){0};
}

// One tensor as float32, finite; caller frees.
static int floats(float **out, const struct tensor_table *w, const char *name, struct err *e) {
    const struct tensor *t;
    if (get(&t, w, name, e)) return e->status;
    *out = mem_array(t->count, sizeof **out);
    if (!*out) return err_set(e, E_NOMEM, "no memory for tensor '%s'", name);
    if (tensor_to_f32(*out, t, e)) return e->status;
    struct tensor view = {.name = t->name, .dtype = DT_F32, .data = *out, .count = t->count};
    return check_finite(&view, e);
}

// Makes the layer from the tensors NAME.weight and NAME.bias of each of n names, stacked along the outputs.
static int linear_load(struct dit *m, struct kern_linear **out, const struct tensor_table *w, const char (*names)[96], int n,
                       struct kern_linear_spec spec, struct err *e) {
    const struct tensor **t = mem_array((size_t)n * 2, sizeof *t);
    struct stack weight = {0};
    float *b = NULL;
    char name[128];
    int rc = t ? OK : err_set(e, E_NOMEM, "no memory to load '%s'", names[0]);
    for (int i = 0; i < n && rc == OK; i++) {
        snprintf(name, sizeof name, "%s.weight", names[i]);
        rc = get(&t[i], w, name, e);
        snprintf(name, sizeof name, "%s.bias", names[i]);
        if (rc == OK) rc = get(&t[n + i], w, name, e);
    }
    if (rc == OK) rc = stack_load(&weight, t, n, e);
    if (rc == OK) b = mem_array((size_t)spec.out, sizeof *b);
    if (rc == OK && !b) rc = err_set(e, E_NOMEM, "no memory to load '%s'", names[0]);
    for (int i = 0, at = 0; i < n && rc == OK; at += (int)t[n + i++]->count) {
        rc = tensor_to_f32(b + at, t[n + i], e);
        struct tensor view = {.name = t[n + i]->name, .dtype = DT_F32, .data = b + at, .count = t[n + i]->count};
        if (rc == OK) rc = check_finite(&view, e);
    }
    spec.w_store = weight.type;
    if (rc == OK) {
        int k_rc = m->k->linear_new(m->k, &spec, weight.data, b, out);
        if (k_rc) rc = kern_failed(m->k, k_rc, e);
        m->bytes += (size_t)spec.out * (size_t)spec.in * kern_dtype_size(spec.x_f32 && spec.y_f32 ? KERN_F32 : m->k->act);
    }
    stack_drop(&weight);
    mem_free(b);
    mem_free(t);
    return rc;
}

static int one_linear(struct dit *m, struct kern_linear **out, const struct tensor_table *w, const char *name, struct kern_linear_spec spec,
                      struct err *e) {
    char names[1][96];
    snprintf(names[0], sizeof names[0], "%s", name);
    return linear_load(m, out, w, names, 1, spec, e);
}

static int load_block(struct dit *m, int i, const struct tensor_table *w, struct err *e) {
    struct block *b = &m->blocks[i];
    struct { struct kern_linear **out; const char *name; int rows, cols; enum kern_act act; } layers[] = {
        {&b->qkv, "attn.qkv", 3 * m->C, m->C, KERN_NONE},
        {&b->proj, "attn.proj", m->C, m->C, KERN_NONE},
        {&b->fc1, "mlp.fc1", m->MLP, m->C, KERN_GELU_TANH},
        {&b->fc2, "mlp.fc2", m->C, m->MLP, KERN_NONE},
    };
    for (size_t j = 0; j < sizeof layers / sizeof *layers; j++) {
        char name[96];
        snprintf(name, sizeof name, "blocks.%d.%s", i, layers[j].name);
        struct kern_linear_spec spec = {.out = layers[j].rows, .in = layers[j].cols, .unit = m->T, .act = layers[j].act};
        if (one_linear(m, layers[j].out, w, name, spec, e)) return e->status;
    }
    return OK;
}

static int load_modulation(struct dit *m, const struct tensor_table *w, struct err *e) {
    int n = m->a.depth + 1;
    char(*names)[96] = mem_array((size_t)n, sizeof *names);
    if (!names) return err_set(e, E_NOMEM, "no memory to load the modulation");
    for (int i = 0; i < m->a.depth; i++) snprintf(names[i], sizeof names[i], "blocks.%d.adaLN_modulation.1", i);
    snprintf(names[n - 1], sizeof names[0], "final_layer.adaLN_modulation.1");
    struct kern_linear_spec spec = {.out = m->mod_width, .in = m->C, .unit = KERN_VEC, .x_f32 = true, .y_f32 = true};
    int rc = linear_load(m, &m->mod, w, (const char(*)[96])names, n, spec, e);
    mem_free(names);
    return rc;
}

// The fixed 2-D sin-cos table for checkpoints that do not store it: the first half encodes the column, the second the row.
static void position_table(float *pos, int side, int C) {
    int quarter = C / 4;
    for (int n = 0; n < side * side; n++)
        for (int k = 0; k < quarter; k++) {
            double omega = pow(10000.0, -(double)k / quarter), col = n % side * omega, row = n / side * omega;
            float *p = pos + (size_t)n * (size_t)C + k;
            p[0] = (float)sin(col), p[quarter] = (float)cos(col);
            p[2 * quarter] = (float)sin(row), p[3 * quarter] = (float)cos(row);
        }
}

static int buffer(struct dit *m, void *out, size_t bytes, struct err *e) {
    void *p;
    int rc = m->k->alloc(m->k, bytes, &p);
    if (rc) return kern_failed(m->k, rc, e);
    memcpy(out, &p, sizeof p);
    m->bytes += bytes;
    return OK;
}

static int upload_floats(struct dit *m, float **device, const float *host, size_t count, struct err *e) {
    if (buffer(m, device, count * sizeof(float), e)) return e->status;
    int rc = m->k->upload(m->k, *device, host, count * sizeof(float));
    return rc ? kern_failed(m->k, rc, e) : OK;
}

static int load_tables(struct dit *m, const struct tensor_table *w, struct err *e) {
    size_t count = (size_t)m->T * (size_t)m->C;
    float *host = NULL;
    int rc;
    if (tensor_find(w, "pos_embed")) {
        rc = floats(&host, w, "pos_embed", e);
    } else {
        host = mem_array(count, sizeof *host);
        rc = host ? OK : err_set(e, E_NOMEM, "no memory for the position table");
        if (host) position_table(host, m->a.input_size / m->P, m->C);
    }
    if (rc == OK) rc = upload_floats(m, &m->pos, host, count, e);
    mem_free(host);
    host = NULL;
    if (rc == OK) rc = floats(&host, w, "y_embedder.embedding_table.weight", e);
    size_t classes = (size_t)m->a.num_classes + (m->a.class_dropout ? 1 : 0);
    if (rc == OK) rc = upload_floats(m, &m->labels, host, classes * (size_t)m->C, e);
    mem_free(host);
    return rc;
}

static int load_weights(struct dit *m, const struct tensor_table *w, struct err *e) {
    int C = m->C, in = m->a.in_channels * m->P * m->P, out = m->out_channels * m->P * m->P;
    struct { struct kern_linear **layer; const char *name; struct kern_linear_spec spec; } layers[] = {
        {&m->patch, "x_embedder.proj", {.out = C, .in = in, .unit = m->T, .x_f32 = true, .y_f32 = true}},
        {&m->t1, "t_embedder.mlp.0", {.out = C, .in = FREQUENCIES, .unit = KERN_VEC, .act = KERN_SILU, .x_f32 = true, .y_f32 = true}},
        {&m->t2, "t_embedder.mlp.2", {.out = C, .in = C, .unit = KERN_VEC, .x_f32 = true, .y_f32 = true}},
        {&m->last, "final_layer.linear", {.out = out, .in = C, .unit = m->T, .y_f32 = true}},
    };
    for (size_t i = 0; i < sizeof layers / sizeof *layers; i++)
        if (one_linear(m, layers[i].layer, w, layers[i].name, layers[i].spec, e)) return e->status;
    for (int i = 0; i < m->a.depth; i++)
        if (load_block(m, i, w, e)) return e->status;
    if (load_modulation(m, w, e)) return e->status;
    return load_tables(m, w, e);
}

static int reserve(struct dit *m, struct err *e) {
    size_t lines = KERN_ROUND_UP((size_t)m->max_rows, KERN_VEC), scratch = (size_t)m->k->rows_scratch(m->k, m->max_rows);
    size_t side2 = (size_t)m->a.input_size * (size_t)m->a.input_size, C = (size_t)m->C, f = sizeof(float), act = kern_dtype_size(m->k->act);
    size_t tokens = scratch * (size_t)m->T, patch2 = (size_t)m->P * (size_t)m->P;
    struct { void *out; size_t bytes; } wanted[] = {
        {&m->x, lines * (size_t)m->a.in_channels * side2 * f},
        {&m->out, lines * (size_t)m->keep * side2 * f},
        {&m->t, lines * f},
        {&m->y, lines * sizeof *m->y},
        {&m->freq, lines * FREQUENCIES * f},
        {&m->t_hidden, lines * C * f},
        {&m->t_embed, lines * C * f},
        {&m->silu_c, lines * C * f},
        {&m->modulation, lines * (size_t)m->mod_width * f},
        {&m->patches, tokens * (size_t)m->a.in_channels * patch2 * f},
        {&m->stream, tokens * C * f},
        {&m->last_out, tokens * patch2 * (size_t)m->out_channels * f},
        {&m->norm, tokens * C * act},
        {&m->qkv, tokens * 3 * C * act},
        {&m->attn, tokens * C * act},
        {&m->hidden, tokens * C * act},
        {&m->mlp, tokens * (size_t)m->MLP * act},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if (buffer(m, wanted[i].out, wanted[i].bytes, e)) return e->status;
    return OK;
}

int dit_new(struct dit **out, struct kern *k, const struct arch *a, const struct tensor_table *w, int keep, int max_rows, struct err *e) {
    *out = NULL;
    struct err local = {0};
    if (!e) e = &local;
    struct dit *m = mem_alloc(sizeof *m);
    if (!m) return err_set(e, E_NOMEM, "no memory for a model");
    int side = a->input_size / a->patch_size;
    *m = (struct dit){.k = k, .a = *a, .T = side * side, .C = a->hidden_size, .H = a->num_heads, .P = a->patch_size, .keep = keep, .max_rows = max_rows};
    m->MLP = (int)(a->hidden_size * a->mlp_ratio);
    m->out_channels = a->in_channels * (a->learn_sigma ? 2 : 1);
    m->mod_width = 6 * m->C * a->depth + 2 * m->C;
    m->blocks = mem_array((size_t)a->depth, sizeof *m->blocks);
    int rc = m->blocks ? OK : err_set(e, E_NOMEM, "no memory for a model");
    if (rc == OK) rc = load_weights(m, w, e);
    if (rc == OK) rc = reserve(m, e);
    if (rc == OK && k->graph_begin) rc = record(m, e);
    if (rc != OK) return dit_free(m), rc;
    *out = m;
    return OK;
}

void dit_free(struct dit *m) {
    if (!m) return;
    struct kern *k = m->k;
    for (int i = 0; m->graphs && i < m->max_rows; i++)
        if (m->graphs[i]) k->graph_free(k, m->graphs[i]);
    mem_free(m->graphs);
    struct kern_linear *layers[] = {m->patch, m->t1, m->t2, m->mod, m->last};
    for (size_t i = 0; i < sizeof layers / sizeof *layers; i++)
        if (layers[i]) k->linear_free(k, layers[i]);
    for (int i = 0; m->blocks && i < m->a.depth; i++) {
        struct kern_linear *b[] = {m->blocks[i].qkv, m->blocks[i].proj, m->blocks[i].fc1, m->blocks[i].fc2};
        for (int j = 0; j < 4; j++)
            if (b[j]) k->linear_free(k, b[j]);
    }
    void *buffers[] = {m->pos, m->labels, m->x, m->out, m->t, m->y, m->freq, m->t_hidden, m->t_embed, m->silu_c, m->modulation,
                       m->patches, m->stream, m->last_out, m->norm, m->qkv, m->attn, m->hidden, m->mlp};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (buffers[i]) k->free(k, buffers[i]);
    mem_free(m->blocks);
    mem_free(m);
}

/* ---- forward ---- */

#define TRY(call) do { int rc_ = (call); if (rc_) return rc_; } while (0)

// Timestep and label of all R rows -> every modulation vector.
static int conditioning(struct dit *m, int R) {
    struct kern *k = m->k;
    int units = KERN_ROUND_UP(R, KERN_VEC) / KERN_VEC;
    TRY(k->timestep_embed(k, m->freq, m->t, R, FREQUENCIES));
    TRY(k->linear(k, m->t1, m->t_hidden, m->freq, units, NULL));
    TRY(k->linear(k, m->t2, m->t_embed, m->t_hidden, units, NULL));
    TRY(k->condition(k, m->silu_c, m->t_embed, m->labels, m->y, R, m->C, NULL));
    return k->linear(k, m->mod, m->modulation, m->silu_c, units, NULL);
}

// Rows [r0, r0+n) through the network, on scratch rows [s0, s0+n).
static int network(struct kern *k, void *ctx, int r0, int n, int s0) {
    struct dit *m = ctx;
    int T = m->T, C = m->C, I = m->a.input_size, P = m->P, in = m->a.in_channels, ld = m->mod_width;
    size_t token0 = (size_t)s0 * (size_t)T, c = (size_t)C, side2 = (size_t)I * (size_t)I, act = kern_dtype_size(k->act);
    float *patches = m->patches + token0 * (size_t)(in * P * P), *stream = m->stream + token0 * c;
    float *last_out = m->last_out + token0 * (size_t)(m->out_channels * P * P);
    char *norm = m->norm + token0 * c * act, *qkv = m->qkv + token0 * 3 * c * act, *attn = m->attn + token0 * c * act;
    char *hidden = m->hidden + token0 * c * act, *mlp = m->mlp + token0 * (size_t)m->MLP * act;
    const float *mod = m->modulation + (size_t)r0 * (size_t)ld; // this block's: shift, scale, gate of attention, then of the MLP

    TRY(k->patchify(k, patches, m->x + (size_t)r0 * (size_t)in * side2, n, in, I, P));
    TRY(k->linear(k, m->patch, stream, patches, n, NULL));
    TRY(k->add_table(k, stream, m->pos, n, T, C));
    TRY(k->norm_modulate(k, norm, stream, mod, mod + C, ld, n, T, C, LN_EPS, NULL, NULL));
    for (int i = 0; i < m->a.depth; i++, mod += 6 * C) {
        const struct block *b = &m->blocks[i];
        TRY(k->linear(k, b->qkv, qkv, norm, n, NULL));
        TRY(k->attention(k, attn, qkv, n, T, m->H, C / m->H, NULL));
        TRY(k->linear(k, b->proj, hidden, attn, n, NULL));
        TRY(k->gate_norm(k, norm, stream, hidden, mod + 2 * C, mod + 3 * C, mod + 4 * C, ld, n, T, C, LN_EPS, NULL, NULL));
        TRY(k->linear(k, b->fc1, mlp, norm, n, NULL));
        TRY(k->linear(k, b->fc2, hidden, mlp, n, NULL));
        // mod + 6C: the next block's shift and scale, or the final layer's, which lie in the same two places
        TRY(k->gate_norm(k, norm, stream, hidden, mod + 5 * C, mod + 6 * C, mod + 7 * C, ld, n, T, C, LN_EPS, NULL, NULL));
    }
    TRY(k->linear(k, m->last, last_out, norm, n, NULL));
    return k->unpatchify(k, m->out + (size_t)r0 * (size_t)m->keep * side2, last_out, n, m->out_channels, m->keep, I, P);
}

static int evaluate(struct dit *m, int R) {
    TRY(conditioning(m, R));
    return m->k->rows(m->k, R, network, m);
}

/* ---- graphs ----
 *
 * On a back end that records (a GPU), a forward pass is replayed as one piece: its few hundred launches would cost more than two rows' arithmetic.
 * Sizes 1, 2, 3, 4, 6, 8, 12, 16, 24, ... are recorded at load; a batch runs as the next size up. The rows that fill it hold whatever an earlier
 * batch left there: rows do not depend on each other, and theirs are not read.
 */
static int graph_rows(int R) {
    int below = 1;
    if (R <= 2) return R;
    while (2 * below < R) below *= 2; // below < R <= 2*below
    return R <= below + below / 2 ? below + below / 2 : 2 * below;
}

static int record_one(struct dit *m, int R) {
    struct kern *k = m->k;
    TRY(evaluate(m, R)); // what is recorded must have run once
    TRY(k->graph_begin(k));
    int rc = evaluate(m, R), end = k->graph_end(k, &m->graphs[R - 1]);
    return rc ? rc : end;
}

static int record(struct dit *m, struct err *e) {
    m->graphs = mem_array((size_t)m->max_rows, sizeof *m->graphs);
    if (!m->graphs) return err_set(e, E_NOMEM, "no memory for the graphs of a model");
    for (int R = 0; R < m->max_rows;) {
        R = graph_rows(R + 1) < m->max_rows ? graph_rows(R + 1) : m->max_rows;
        int rc = record_one(m, R);
        if (rc) return kern_failed(m->k, rc, e);
    }
    return OK;
}

int dit_forward(struct dit *m, int R, const float *t, const int32_t *y, struct err *e) {
    struct kern *k = m->k;
    if (R < 1 || R > m->max_rows) return err_set(e, E_INTERNAL, "a forward pass of %d rows, reserved are %d", R, m->max_rows);
    int rc = k->upload(k, m->t, t, (size_t)R * sizeof *t);
    if (!rc) rc = k->upload(k, m->y, y, (size_t)R * sizeof *y);
    int size = m->graphs ? graph_rows(R) < m->max_rows ? graph_rows(R) : m->max_rows : 0;
    if (!rc) rc = size ? k->graph_launch(k, m->graphs[size - 1]) : evaluate(m, R);
    return rc ? kern_failed(k, rc, e) : OK;
}

float *dit_x(struct dit *m) { return m->x; }
float *dit_out(struct dit *m) { return m->out; }
size_t dit_bytes(const struct dit *m) { return m->bytes; }

double dit_flops(const struct arch *a) {
    double side = a->input_size / a->patch_size, T = side * side, C = a->hidden_size, patch2 = (double)a->patch_size * a->patch_size;
    double block = T * C * C * (4 + 2 * a->mlp_ratio) + 2 * T * T * C + 6 * C * C;
    double ends = T * C * patch2 * a->in_channels * (a->learn_sigma ? 3 : 2) + 2 * C * C + C * FREQUENCIES + C * C;
    return 2 * (a->depth * block + ends);
}
