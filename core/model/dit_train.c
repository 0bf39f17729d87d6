// SPDX-License-Identifier: MIT
/*
 * dit_train: a network that samples (dit.c, listing.c), laid over a flat array of weights, which keeps what backward reads.
 */
#include <string.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/model/dit_train_int.h"

static int check(const struct kern *k, const struct arch *a, struct err *e) {
    const struct {
        const char *name;
        bool is;
    } foreign[] = {{"decoder", a->decoder.depth > 0},
                   {"one_hot", a->one_hot},
                   {"block_embedders", a->block_embedders},
                   {"compat", a->diffusers},
                   {"time", a->reversed || a->negated}};
    if (arch_check(a, e)) return e->status;
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++)
        if (foreign[i].is)
            return err_param(e, E_UNSUPPORTED, foreign[i].name, "networks with '%s' cannot be trained", foreign[i].name);
    if (k->stream != KERN_F32) return err_param(e, E_UNSUPPORTED, "exact_stream", "training wants a residual stream in float32");
    return OK;
}

static int reserve_flat(struct dit_train *t, struct err *e) {
    struct dit_flat *f = &t->flat;
    size_t C = (size_t)t->net->encoder.C;
    if (dit_flat_lay(f, &t->net->a, e)) return e->status;
    if (dit_buffer(t->net, &f->weights, f->floats * sizeof(float), e) ||
        dit_buffer(t->net, &f->grads, f->floats * sizeof(float), e))
        return e->status;
    if (!f->norms_count) return OK;
    float *minus_one = mem_array(C, sizeof *minus_one);
    if (!minus_one) return err_set(e, E_NOMEM, "no memory for %zu ones", C);
    for (size_t i = 0; i < C; i++) minus_one[i] = -1;
    int rc = dit_buffer_from(t->net, &t->minus_one, minus_one, C, e);
    mem_free(minus_one);
    return rc == OK ? dit_buffer(t->net, &f->norm_scale, f->norms_count * sizeof(float), e) : rc;
}

// As few rows as make whole runs of KERN_SUM_LINES lines, as often as back_lines holds them
static int group_rows(const struct dit *m) {
    int least = 1, lines = m->k->back_lines;
    if (!lines) return m->max_rows;
    while (least * m->L % KERN_SUM_LINES) least++;
    int rows = lines / (least * m->L) * least;
    rows = rows < least ? least : rows;
    return rows < m->max_rows ? rows : m->max_rows;
}

static int reserve_gradients(struct dit_train *t, struct err *e) {
    struct dit *m = t->net;
    size_t rows = (size_t)m->max_rows, lines = KERN_ROUND_UP(rows, (size_t)KERN_VEC), f = sizeof(float);
    size_t C = (size_t)m->encoder.C, MLP = (size_t)m->encoder.MLP, side2 = (size_t)m->a.input_size * (size_t)m->a.input_size;
    size_t tokens = rows * (size_t)m->L, act = tokens * kern_dtype_size(m->k->act);
    t->group = group_rows(m), t->wide = MLP > 3 * C ? MLP : 3 * C;
    const struct {
        void *out;
        size_t bytes;
    } wanted[] = {
        {&t->dx, tokens * C * f},
        {&t->dout, lines * (size_t)m->out_channels * side2 * f},
        {&t->dtok, rows * (size_t)m->out_channels * side2 * f},
        {&t->d_in, act * C},
        {&t->d_out, act / rows * (size_t)t->group * C},
        {&t->d_wide, act * t->wide},
        {&t->d_mod, m->n_mod ? lines * (size_t)m->mod_ld * f : 0},
        {&t->d_kv, m->kv.run ? lines * DIT_CONTEXT * 2 * C * (size_t)m->encoder.depth * f : 0},
        {&t->d_context, m->kv.run ? lines * DIT_CONTEXT * C * f : 0},
        {&t->d_t, lines * C * f},
        {&t->d_y, m->n_mod ? 0 : lines * C * f},
        {&t->d_hidden, lines * C * f},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if (wanted[i].bytes && dit_buffer(m, wanted[i].out, wanted[i].bytes, e)) return e->status;
    if (m->n_mod) t->d_y = t->d_t;
    return OK;
}

int dit_train_new(struct dit_train **out, struct kern *k, const struct arch *a, int rows, enum dit_recompute recompute,
                  struct err *e) {
    struct err local = {0};
    *out = NULL;
    if (!e) e = &local;
    if (check(k, a, e)) return e->status;
    struct dit_train *t = mem_alloc(sizeof *t);
    if (!t) return err_set(e, E_NOMEM, "no memory for a network that learns");
    t->k = k;
    int rc = dit_begin(&t->net, k, a, dit_channels(a), rows, e);
    if (rc == OK) rc = reserve_flat(t, e);
    if (rc == OK) t->net->flat = &t->flat;
    if (rc == OK) rc = dit_load(t->net, &(struct tensor_table){0}, e);
    if (rc == OK) rc = dit_reserve(t->net, recompute == RECOMPUTE_BLOCK, e);
    if (rc == OK) rc = reserve_gradients(t, e);
    if (rc != OK) return dit_train_free(t), rc;
    *out = t;
    return OK;
}

void dit_train_free(struct dit_train *t) {
    if (!t) return;
    dit_free(t->net);
    dit_flat_deinit(&t->flat);
    mem_free(t);
}

int dit_train_params(const struct dit_train *t, const struct dit_param **out) { return *out = t->flat.params, t->flat.n; }
size_t dit_train_floats(const struct dit_train *t) { return t->flat.floats; }
float *dit_train_weights(struct dit_train *t) { return t->flat.weights; }
float *dit_train_grads(struct dit_train *t) { return t->flat.grads; }
float *dit_train_x(struct dit_train *t) { return t->net->x; }
float *dit_train_out(struct dit_train *t) { return t->net->out; }
float *dit_train_dout(struct dit_train *t) { return t->dout; }
size_t dit_train_bytes(const struct dit_train *t) { return t->net->bytes; }

void dit_train_on_grads(struct dit_train *t, void (*fn)(void *ctx, size_t offset, size_t count), void *ctx) {
    t->on_grads = fn, t->ctx = ctx;
}

static int refresh(struct dit_train *t) {
    struct kern *k = t->k;
    const struct dit_flat *f = &t->flat;
    int C = t->net->encoder.C;
    for (int i = 0; i < t->net->n_layers; i++) TRY(k->linear_refresh(k, t->net->layers[i]));
    if (!f->norms_count) return KERN_OK;
    TRY(k->copy(k, f->norm_scale, f->weights + f->norms, f->norms_count * sizeof(float)));
    return k->add_table(k, f->norm_scale, t->minus_one, (int)(f->norms_count / (size_t)C), 1, C);
}

int dit_train_refresh(struct dit_train *t, struct err *e) {
    int rc = refresh(t);
    return rc ? dit_failed(t->net, rc, e) : OK;
}

int dit_train_forward(struct dit_train *t, int R, const float *time, const int32_t *y, struct err *e) {
    return dit_forward(t->net, R, time, y, e);
}

int dit_train_backward(struct dit_train *t, int R, bool add, struct err *e) {
    if (R < 1 || R > t->net->max_rows) return err_set(e, E_INTERNAL, "backward of %d rows, reserved are %d", R, t->net->max_rows);
    t->add = add;
    int rc = dit_back(t, R);
    return rc ? dit_failed(t->net, rc, e) : OK;
}
