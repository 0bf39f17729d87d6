// SPDX-License-Identifier: MIT
/*
 * dit: one forward pass of a network of the DiT kind, on any back end.
 *
 * Two phases. The conditioning of all rows comes first, as a handful of wide products: timestep -> MLP, plus the label's vector,
 * SiLU, then ONE product that gives every block's modulation vectors and the final layer's (adaLN); or, for cross-attention, one
 * that gives every block's keys and values. Then k->rows walks the tokens (listing.c): each lane takes some rows through the
 * whole network, so that on the CPU one row's activations stay in one core's cache and no thread waits for another inside a
 * forward pass.
 *
 * The residual stream is in k->stream (float32 but on GPUs); what products read and write between (norm, qkv, attention, MLP) is
 * in k->act.
 *
 * Time that runs from data to noise inside the network (REPA) is turned here, t -> 1 - t, and the velocity's sign with the last
 * layer's weights, so that nobody above knows of it. diffusers' timestep frequencies are computed on the host: 256 numbers a row,
 * for parity only.
 */
#include <math.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/model/dit_int.h"

/* ---- memory ---- */

int dit_failed(const struct dit *m, int rc, struct err *e) {
    const struct kern *k = m->k;
    return err_set(e,
                   rc == KERN_ENOMEM         ? E_NOMEM
                   : rc == KERN_EUNSUPPORTED ? E_UNSUPPORTED
                                             : E_DEVICE,
                   "%s: %s", k->name, k->why);
}

int dit_buffer(struct dit *m, void *out, size_t bytes, struct err *e) {
    void **grown = mem_resize(m->buffers, (size_t)m->n_buffers + 1, sizeof *grown), *p;
    if (!grown) return err_set(e, E_NOMEM, "no memory for a list of buffers");
    m->buffers = grown;
    int rc = m->k->alloc(m->k, bytes, &p);
    if (rc) return dit_failed(m, rc, e);
    m->buffers[m->n_buffers++] = p;
    memcpy(out, &p, sizeof p);
    m->bytes += bytes;
    return OK;
}

int dit_buffer_from(struct dit *m, float **out, const float *host, size_t count, struct err *e) {
    if (dit_buffer(m, out, count * sizeof(float), e)) return e->status;
    int rc = m->k->upload(m->k, *out, host, count * sizeof(float));
    return rc ? dit_failed(m, rc, e) : OK;
}

struct wanted {
    void *out;
    size_t bytes;
};

static int reserve_all(struct dit *m, const struct wanted *w, size_t n, struct err *e) {
    for (size_t i = 0; i < n; i++)
        if (w[i].bytes && dit_buffer(m, w[i].out, w[i].bytes, e)) return e->status;
    return OK;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

// One line a row.
static int reserve_lines(struct dit *m, struct err *e) {
    size_t lines = KERN_ROUND_UP((size_t)m->max_rows, KERN_VEC), f = sizeof(float), C = (size_t)m->encoder.C;
    size_t side2 = (size_t)m->a.input_size * (size_t)m->a.input_size;
    bool adaln = m->n_mod > 0, cross = m->a.block == BLOCK_CROSS_ATTENTION;
    size_t modulation = m->a.block_embedders ? m->encoder.mod_step * (size_t)m->n_mod : lines * (size_t)m->mod_ld;
    const struct wanted wanted[] = {
        {&m->x, lines * (size_t)m->a.in_channels * side2 * f},
        {&m->out, lines * (size_t)m->keep * side2 * f},
        {&m->t, lines * f},
        {&m->y, lines * sizeof *m->y},
        {&m->freq, lines * DIT_FREQUENCIES * f},
        {&m->t_pre, m->flat ? lines * C * f : 0},
        {&m->t_hidden, lines * C * f},
        {&m->t_embed, lines * C * f},
        {&m->c, m->flat && adaln ? lines * C * f : 0},
        {&m->silu_c, lines * C * f},
        {&m->modulation, adaln ? modulation * f : 0},
        {&m->zeros, adaln ? 0 : lines * C * f},
        {&m->y_embed, adaln ? 0 : lines * C * f},
        {&m->context, cross ? lines * DIT_CONTEXT * C * f : 0},
        {&m->context_kv, cross ? lines * DIT_CONTEXT * 2 * C * (size_t)m->encoder.depth * f : 0},
    };
    return reserve_all(m, wanted, sizeof wanted / sizeof *wanted, e);
}

// Sampling: all blocks and the final layer share what few buffers one needs at a time.
static int reserve_one_set(struct dit *m, size_t lines, struct err *e) {
    size_t C = lines * larger((size_t)m->encoder.C, (size_t)m->decoder.C) * kern_dtype_size(m->k->act),
           MLP = lines * larger((size_t)m->encoder.MLP, (size_t)m->decoder.MLP) * kern_dtype_size(m->k->act);
    struct dit_set *s = &m->sets[0];
    const struct wanted wanted[] = {
        {&s->part[0].in, C}, {&s->part[0].out, C}, {&s->qkv, 3 * C}, {&s->attn, C}, {&s->mlp, MLP}, {&s->pre, m->k->fp8_pre ? MLP : 0},
    };
    if (reserve_all(m, wanted, sizeof wanted / sizeof *wanted, e)) return e->status;
    for (int p = 1; p < PARTS; p++) s->part[p] = s->part[0];
    s->q = s->qkv, s->cross = s->attn;
    m->sets[1] = *s;
    return OK;
}

static int reserve_part(struct dit *m, struct dit_part *p, size_t lines, bool work, struct err *e) {
    size_t C = lines * (size_t)m->encoder.C * kern_dtype_size(m->k->act);
    const struct wanted wanted[] = {{&p->xhat, C}, {&p->rstd, lines * sizeof(float)}, {&p->out, work ? C : 0}};
    return reserve_all(m, wanted, sizeof wanted / sizeof *wanted, e);
}

// Learning: nothing is shared but the parts' inputs, which backward makes again from xhat.
static int reserve_sets(struct dit *m, size_t lines, struct err *e) {
    size_t C = lines * (size_t)m->encoder.C * kern_dtype_size(m->k->act),
           MLP = lines * (size_t)m->encoder.MLP * kern_dtype_size(m->k->act);
    struct dit_part *final = &m->sets[m->n_sets].part[PART_SELF];
    void *in;
    if (dit_buffer(m, &in, C, e) || dit_buffer(m, &final->in, C, e)) return e->status;
    for (int i = 0; i < m->n_sets; i++) {
        struct dit_set *s = &m->sets[i];
        bool cross = dit_has_part(m, PART_CROSS);
        const struct wanted wanted[] = {
            {&s->qkv, 3 * C},
            {&s->attn, C},
            {&s->lse, lines * (size_t)m->encoder.H * sizeof(float)},
            {&s->pre, MLP},
            {&s->mlp, MLP},
            {&s->q, cross ? C : 0},
            {&s->cross, cross ? C : 0},
        };
        if (reserve_all(m, wanted, sizeof wanted / sizeof *wanted, e)) return e->status;
        for (int p = 0; p < PARTS; p++) {
            s->part[p].in = in;
            if (dit_has_part(m, p) && reserve_part(m, &s->part[p], lines, true, e)) return e->status;
        }
    }
    return reserve_part(m, final, lines, false, e);
}

static int reserve_tokens(struct dit *m, bool recompute, struct err *e) {
    int rows = m->flat ? m->max_rows : m->k->rows_scratch(m->k, m->max_rows, m->L);
    size_t lines = (size_t)rows * (size_t)m->L, pixels = (size_t)rows * (size_t)(m->T * m->P * m->P) * sizeof(float);
    size_t stream = lines * kern_dtype_size(m->k->stream), C = (size_t)m->encoder.C;
    m->n_sets = m->flat && !recompute ? m->encoder.depth : 1;
    m->sets = mem_array((size_t)m->n_sets + 1, sizeof *m->sets);
    if (!m->sets) return err_set(e, E_NOMEM, "no memory for %d blocks' activations", m->n_sets);
    const struct wanted wanted[] = {
        {&m->patches, pixels * (size_t)m->a.in_channels},
        {&m->stream, stream * C},
        {&m->decoder_stream, stream * (size_t)m->decoder.C},
        {&m->last_out, pixels * (size_t)m->out_channels},
        {&m->inputs, recompute ? stream * C * (size_t)m->encoder.depth : 0},
    };
    if (reserve_all(m, wanted, sizeof wanted / sizeof *wanted, e)) return e->status;
    return m->flat ? reserve_sets(m, lines, e) : reserve_one_set(m, lines, e);
}

// The gates of networks without gates.
static int make_ones(struct dit *m, struct err *e) {
    size_t n = m->affine ? (size_t)m->encoder.C : (size_t)m->max_rows * (size_t)m->mod_ld;
    if (m->a.block == BLOCK_ADALN_ZERO) return OK;
    float *ones = mem_array(n, sizeof *ones);
    if (!ones) return err_set(e, E_NOMEM, "no memory for %zu ones", n);
    for (size_t i = 0; i < n; i++) ones[i] = 1;
    int rc = dit_buffer_from(m, &m->ones, ones, n, e);
    mem_free(ones);
    return rc;
}

int dit_reserve(struct dit *m, bool recompute, struct err *e) {
    m->host_t = mem_array((size_t)m->max_rows * (m->a.diffusers ? DIT_FREQUENCIES : 1), sizeof *m->host_t);
    if (!m->host_t) return err_set(e, E_NOMEM, "no memory for %d times", m->max_rows);
    if (reserve_lines(m, e) || reserve_tokens(m, recompute, e)) return e->status;
    return make_ones(m, e);
}

/* ---- new and free ---- */

static int record(struct dit *, struct err *);

int dit_channels(const struct arch *a) { return a->in_channels * (a->learn_sigma ? 2 : 1); }

static struct dit_stage stage(int width, int heads, int depth, double mlp_ratio) {
    return (struct dit_stage){.C = width, .H = heads, .depth = depth, .MLP = (int)llround(width * mlp_ratio)};
}

int dit_begin(struct dit **out, struct kern *k, const struct arch *a, int keep, int max_rows, struct err *e) {
    *out = NULL;
    if (keep < 1 || keep > dit_channels(a)) return err_set(e, E_INTERNAL, "%d channels to keep of %d", keep, dit_channels(a));
    struct dit *m = mem_alloc(sizeof *m);
    if (!m) return err_set(e, E_NOMEM, "no memory for a model");
    int side = a->input_size / a->patch_size;
    *m = (struct dit){.k = k,
                      .a = *a,
                      .T = side * side,
                      .P = a->patch_size,
                      .out_channels = dit_channels(a),
                      .keep = keep,
                      .max_rows = max_rows};
    m->L = m->T + (a->block == BLOCK_IN_CONTEXT ? DIT_CONTEXT : 0);
    m->affine = a->block == BLOCK_IN_CONTEXT || a->block == BLOCK_CROSS_ATTENTION;
    m->eps_mlp = a->diffusers ? DIT_EPS_MLP_DIFFUSERS : DIT_EPS;
    m->encoder = stage(a->hidden_size, a->num_heads, a->depth, a->mlp_ratio);
    if (a->decoder.depth) m->decoder = stage(a->decoder.hidden_size, a->decoder.num_heads, a->decoder.depth, a->mlp_ratio);
    *out = m;
    return OK;
}

int dit_new(struct dit **out, struct kern *k, const struct arch *a, const struct tensor_table *w, int keep, int max_rows,
            struct err *e) {
    struct dit *m;
    struct err local = {0};
    *out = NULL;
    if (!e) e = &local;
    if (arch_match(a, w, e) || dit_begin(&m, k, a, keep, max_rows, e)) return e->status;
    int rc = dit_load(m, w, e);
    if (rc == OK) rc = dit_reserve(m, false, e);
    if (rc == OK && k->calibrate) rc = dit_calibrate(m, e);
    if (rc == OK && k->graph_begin) rc = record(m, e);
    if (rc != OK) return dit_free(m), rc;
    *out = m;
    return OK;
}

void dit_free(struct dit *m) {
    if (!m) return;
    for (int i = 0; m->graphs && i < m->max_rows; i++)
        if (m->graphs[i]) m->k->graph_free(m->k, m->graphs[i]);
    for (int i = 0; i < m->n_layers; i++) m->k->linear_free(m->k, m->layers[i]);
    for (int i = 0; i < m->n_buffers; i++) m->k->free(m->k, m->buffers[i]);
    void *host[] = {m->encoder.blocks, m->decoder.blocks, m->embedders, m->mod,    m->sets,
                    m->host_t,         m->graphs,         m->layers,    m->buffers};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) mem_free(host[i]);
    mem_free(m);
}

/* ---- forward ---- */

// What diffusers feeds its timestep MLP: frequencies exp(-ln(10000) i/127), computed as it does, in float32.
static void diffusers_features(float *out, float t) {
    int half = DIT_FREQUENCIES / 2;
    for (int i = 0; i < half; i++) {
        float angle = t * (float)exp((double)(-9.210340371976184f * (float)i / (float)(half - 1)));
        out[i] = (float)cos((double)angle);
        out[half + i] = (float)sin((double)angle);
    }
}

int dit_units(int lines) { return KERN_ROUND_UP(lines, KERN_VEC) / KERN_VEC; }

// Timestep vectors of all R rows by one embedder, t_embed.
static int embed_time(struct dit *m, const struct dit_embedder *em, int units) {
    struct kern *k = m->k;
    TRY(k->linear(k, em->t1.run, m->t_hidden, m->freq, units, m->t_pre));
    return k->linear(k, em->t2.run, m->t_embed, m->t_hidden, units, NULL);
}

// One embedder's timestep and label of all R rows -> modulation vectors at `to`.
static int modulate(struct dit *m, const struct dit_embedder *em, const struct dit_linear *mod, float *to, int R) {
    struct kern *k = m->k;
    TRY(embed_time(m, em, dit_units(R)));
    TRY(k->condition(k, m->silu_c, m->t_embed, em->labels, m->y, R, m->encoder.C, m->c));
    return k->linear(k, mod->run, to, m->silu_c, dit_units(R), NULL);
}

// The vectors of timestep and label, each by itself, and for cross-attention all blocks' keys and values of them.
static int embed_tokens(struct dit *m, int R) {
    struct kern *k = m->k;
    int C = m->encoder.C;
    TRY(embed_time(m, m->embedders, dit_units(R)));
    TRY(k->condition(k, m->silu_c, m->zeros, m->embedders->labels, m->y, R, C, m->y_embed)); // silu_c is not used
    if (!m->kv.run) return KERN_OK;
    TRY(k->set_token(k, m->context, KERN_F32, m->t_embed, R, DIT_CONTEXT, C, 0));
    TRY(k->set_token(k, m->context, KERN_F32, m->y_embed, R, DIT_CONTEXT, C, 1));
    return k->linear(k, m->kv.run, m->context_kv, m->context, dit_units(R * DIT_CONTEXT), NULL);
}

static int conditioning(struct dit *m, int R) {
    if (!m->a.diffusers) TRY(m->k->timestep_embed(m->k, m->freq, m->t, R, DIT_FREQUENCIES));
    if (m->n_mod == 0) return embed_tokens(m, R);
    for (int i = 0; i < m->n_mod; i++) { // the final layer's, the last, is conditioned by the first embedder
        const struct dit_embedder *em = &m->embedders[i < m->n_embedders ? i : 0];
        TRY(modulate(m, em, &m->mod[i], m->modulation + (size_t)i * m->encoder.mod_step, R));
    }
    return KERN_OK;
}

static int evaluate(struct dit *m, int R) {
    TRY(conditioning(m, R));
    return m->k->rows(m->k, R, m->L, dit_rows, m);
}

/* ---- graphs ----
 *
 * On a back end that records (a GPU), a forward pass is replayed as one piece: its few hundred launches would cost more than two
 * rows' arithmetic. Sizes 1, 2, 3, 4, 6, 8, 12, 16, 24, ... are recorded at load; a batch runs as the next size up. The rows that
 * fill it hold whatever an earlier batch left there: rows do not depend on each other, and theirs are not read.
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
    m->graphs = mem_array((size_t)m->max_rows, sizeof(struct kern_graph *));
    if (!m->graphs) return err_set(e, E_NOMEM, "no memory for the graphs of a model");
    for (int R = 0; R < m->max_rows;) {
        R = graph_rows(R + 1) < m->max_rows ? graph_rows(R + 1) : m->max_rows;
        int rc = record_one(m, R);
        if (rc) return dit_failed(m, rc, e);
    }
    return OK;
}

static int upload_times(struct dit *m, int R, const float *t) {
    struct kern *k = m->k;
    bool reversed = m->a.reversed;
    if (m->a.diffusers) {
        for (int r = 0; r < R; r++) diffusers_features(m->host_t + (size_t)r * DIT_FREQUENCIES, reversed ? 1 - t[r] : t[r]);
        return k->upload(k, m->freq, m->host_t, (size_t)R * DIT_FREQUENCIES * sizeof *t);
    }
    for (int r = 0; reversed && r < R; r++) m->host_t[r] = 1 - t[r];
    return k->upload(k, m->t, reversed ? m->host_t : t, (size_t)R * sizeof *t);
}

static int check_labels(const struct dit *m, int R, const int32_t *y, struct err *e) {
    int rows = m->a.num_classes + (m->a.one_hot || m->a.class_dropout);
    for (int r = 0; r < R; r++)
        if (y[r] >= rows)
            return err_param(e, E_RANGE, "y", "label %d: the network knows 0 to %d%s", (int)y[r], rows - 1,
                             y[r] == m->a.num_classes ? " and has no null class" : "");
    return OK;
}

int dit_forward(struct dit *m, int R, const float *t, const int32_t *y, struct err *e) {
    if (R < 1 || R > m->max_rows) return err_set(e, E_INTERNAL, "a forward pass of %d rows, reserved are %d", R, m->max_rows);
    if (check_labels(m, R, y, e)) return e->status;
    int rc = upload_times(m, R, t);
    if (!rc) rc = m->k->upload(m->k, m->y, y, (size_t)R * sizeof *y);
    int size = m->graphs ? graph_rows(R) < m->max_rows ? graph_rows(R) : m->max_rows : 0;
    if (!rc) rc = size ? m->k->graph_launch(m->k, m->graphs[size - 1]) : evaluate(m, R);
    return rc ? dit_failed(m, rc, e) : OK;
}

float *dit_x(struct dit *m) { return m->x; }
float *dit_out(struct dit *m) { return m->out; }
size_t dit_bytes(const struct dit *m) { return m->bytes; }

/* ---- counting ---- */

// Multiply-adds of `depth` blocks of width C over L lines, of which the conditioning vectors (width cond) make `vectors` each.
static double stage_macs(double L, double C, double depth, double mlp_ratio, double vectors, double cond) {
    return depth * (L * C * C * (4 + 2 * mlp_ratio) + 2 * L * L * C + vectors * C * cond);
}

double dit_flops(const struct arch *a) {
    static const int vectors[BLOCK_COUNT] = {
        [BLOCK_ADALN_ZERO] = 6, [BLOCK_ADALN] = 4, [BLOCK_CROSS_ATTENTION] = 2 * DIT_CONTEXT};
    int side = a->input_size / a->patch_size;
    double T = (double)side * side, C = a->hidden_size, D = a->decoder.hidden_size;
    double patch2 = (double)a->patch_size * a->patch_size, L = T + (a->block == BLOCK_IN_CONTEXT ? DIT_CONTEXT : 0);
    double macs = stage_macs(L, C, a->depth, a->mlp_ratio, vectors[a->block], C);
    if (a->block == BLOCK_CROSS_ATTENTION) macs += a->depth * (2 * T * C * C + 2 * T * DIT_CONTEXT * C);
    if (a->decoder.depth) macs += stage_macs(T, D, a->decoder.depth, a->mlp_ratio, 6, C) + T * C * D + 2 * C * C;
    macs += T * patch2 * (C * a->in_channels + (a->decoder.depth ? D : C) * dit_channels(a)); // both ends
    macs += (a->block_embedders ? a->depth : 1) * (C * DIT_FREQUENCIES + C * C);              // timestep
    if (a->block == BLOCK_ADALN_ZERO || a->block == BLOCK_ADALN)
        macs += 2 * C * (a->decoder.depth ? D : C); // the final layer's vectors
    return 2 * macs;
}
