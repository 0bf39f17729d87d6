// SPDX-License-Identifier: MIT
/*
 * Training ops, cut into tasks over the vector code of train.h. They compute in float32; with bfloat16 activations the reference
 * serves.
 *
 * Backward of linear layers does without oneDNN: dy w and dy^T x of layers 192 to 768 wide run at 75 to 85 GFLOP/s on one core
 * with AVX2, oneDNN's at 62 to 86, and here neither the number of lines need be known beforehand nor the weights be reordered.
 */
#include "kernels/cpu/train.h"

#include "kernels/cpu/simd.h"
#include "kernels/ref/ref.h"

const struct train_simd *cpu_train_simd(const struct cpu *cpu) {
#if defined(__x86_64__)
    if (cpu->simd) return strcmp(cpu->simd->name, "AVX2") == 0 ? &train_avx2 : &train_avx512;
#endif
    (void)cpu;
    return NULL;
}

static size_t blocks(size_t n, size_t block) { return (n + block - 1) / block; }
static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* ---- sums of columns ---- */

enum { SUM_COLUMNS = 64 };

struct sum_call {
    float *sum;
    const float *a;
    size_t lines, n;
};

static int column_task(struct lane *lane, int task, void *arg) {
    const struct sum_call *c = arg;
    size_t i = (size_t)task * SUM_COLUMNS;
    cpu_train_simd(lane->cpu)->sum_lines(c->sum + i, c->a + i, NULL, c->lines, c->n, least(SUM_COLUMNS, c->n - i));
    return KERN_OK;
}

// sum [n] (+)= the sums of a's columns; sum may be NULL
static int sum_columns(struct kern *k, float *sum, const float *a, size_t lines, size_t n, bool add) {
    struct sum_call c = {sum, a, lines, n};
    if (!sum) return KERN_OK;
    if (!add) memset(sum, 0, n * sizeof *sum);
    return cpu_run(k, (int)blocks(n, SUM_COLUMNS), (double)lines * (double)n, column_task, &c);
}

/* ---- linear ---- */

struct linear_call {
    const float *dy, *x, *x_pre, *w;
    float *dx, *dw, *db;
    enum kern_act before;
    bool add;
    size_t lines, out, in, first, count;     // dw: of outputs [first, first + count)
    size_t dx_lines, dx_columns, dw_outputs; // of a task: lines and columns of dx, outputs of dw
};

static int dx_task(struct lane *lane, int task, void *arg) {
    const struct linear_call *c = arg;
    const struct train_simd *simd = cpu_train_simd(lane->cpu);
    size_t across = blocks(c->in, c->dx_columns), line = (size_t)task / across * c->dx_lines,
           column = (size_t)task % across * c->dx_columns;
    struct train_gemm g = {.c = c->dx + line * c->in + column,
                           .ldc = c->in,
                           .a = c->dy + line * c->out,
                           .ar = c->out,
                           .ak = 1,
                           .b = c->w + column,
                           .ldb = c->in,
                           .m = least(c->dx_lines, c->lines - line),
                           .n = least(c->dx_columns, c->in - column),
                           .k = c->out,
                           .work = lane->scratch};
    simd->gemm(&g);
    for (size_t m = 0; c->before != KERN_NONE && m < g.m; m++)
        simd->slope(g.c + m * c->in, c->x_pre + (line + m) * c->in + column, g.n, c->before);
    return KERN_OK;
}

static int dw_task(struct lane *lane, int task, void *arg) {
    const struct linear_call *c = arg;
    const struct train_simd *simd = cpu_train_simd(lane->cpu);
    size_t across = blocks(c->in, TRAIN_COLUMNS), o = (size_t)task / across * c->dw_outputs,
           column = (size_t)task % across * TRAIN_COLUMNS;
    size_t outputs = least(c->dw_outputs, c->count - o);
    const float *dy = c->dy + c->first + o;
    struct train_gemm g = {.c = c->dw + o * c->in + column,
                           .ldc = c->in,
                           .a = dy,
                           .ar = 1,
                           .ak = c->out,
                           .b = c->x + column,
                           .ldb = c->in,
                           .m = outputs,
                           .n = least(TRAIN_COLUMNS, c->in - column),
                           .k = c->lines,
                           .add = c->add,
                           .work = lane->scratch};
    simd->gemm(&g);
    if (!c->db || column) return KERN_OK;
    if (!c->add) memset(c->db + o, 0, outputs * sizeof *c->db);
    simd->sum_lines(c->db + o, dy, NULL, c->lines, c->out, outputs);
    return KERN_OK;
}

// How tasks are cut does not show in what comes out. Many outputs of dw each, as every task packs x anew, but as much to do for
// each thread.
static size_t cut_outputs(size_t out, size_t in, size_t threads) {
    size_t across = blocks(in, TRAIN_COLUMNS), parts = 1;
    while (across * parts % threads && across * parts < 4 * threads) parts++;
    size_t outputs = KERN_ROUND_UP(blocks(out, parts), 12);
    return outputs > 48 ? outputs : 48;
}

// Many lines of dx each, as every task packs the weights anew.
static size_t cut_lines(size_t lines, size_t threads) {
    size_t each = KERN_ROUND_UP(blocks(lines, threads), 12);
    return each < TRAIN_LINES ? TRAIN_LINES : each > 4 * TRAIN_LINES ? 4 * TRAIN_LINES : each;
}

static struct linear_call linear_call(const struct cpu_layer *l, const void *dy, int units) {
    return (struct linear_call){
        .dy = dy, .w = l->w, .out = (size_t)l->spec.out, .in = (size_t)l->spec.in, .lines = (size_t)units * (size_t)l->spec.unit};
}

// Whether the products here serve a layer, or the reference's
static bool is_ours(const struct kern *k, const struct cpu_layer *l) {
    return cpu_train_simd(LANE(k)->cpu) && (k->act == KERN_F32 || (l->spec.x_f32 && l->spec.y_f32)) && l->w;
}

static int cpu_linear_backward(struct kern *k, const struct kern_linear *opaque, void *dx, float *dx_sum, const void *dy,
                               enum kern_act before, const void *x_pre, int units, bool add) {
    const struct cpu_layer *l = (const struct cpu_layer *)opaque;
    struct linear_call c = linear_call(l, dy, units);
    if (!is_ours(k, l)) return ref_linear_dx(k, &l->spec, l->w, dx, dx_sum, dy, before, x_pre, units, add);
    c.dx = dx, c.x_pre = x_pre, c.before = before;
    c.dx_lines = cut_lines(c.lines, (size_t)k->threads);
    c.dx_columns = c.lines <= TRAIN_LINES ? 32 : c.in; // few lines, vectors mostly: threads share the columns
    double work = 2.0 * (double)c.lines * (double)c.out * (double)c.in;
    int rc = cpu_run(k, (int)(blocks(c.lines, c.dx_lines) * blocks(c.in, c.dx_columns)), work, dx_task, &c);
    return rc < 0 ? rc : sum_columns(k, dx_sum, dx, c.lines, c.in, add);
}

static int cpu_linear_gradients(struct kern *k, const struct kern_linear *opaque, float *dw, float *db, const void *dy,
                                const void *x, int units, int first, int count, bool add) {
    const struct cpu_layer *l = (const struct cpu_layer *)opaque;
    struct linear_call c = linear_call(l, dy, units);
    if (!is_ours(k, l)) return ref_linear_dw(k, &l->spec, l->w, dw, db, dy, x, units, first, count, add);
    c.dw = dw, c.db = db, c.x = x, c.add = add, c.first = (size_t)first, c.count = (size_t)count;
    c.dw_outputs = cut_outputs(c.count, c.in, (size_t)k->threads);
    double work = 2.0 * (double)c.lines * (double)c.count * (double)c.in;
    return cpu_run(k, (int)(blocks(c.count, c.dw_outputs) * blocks(c.in, TRAIN_COLUMNS)), work, dw_task, &c);
}

/* ---- norm and gate ---- */

struct norm_call {
    struct train_norm all; // of the first row
    size_t R, T, C, ld;
};

static int norm_task(struct lane *lane, int task, void *arg) { // one row
    const struct norm_call *c = arg;
    struct train_norm a = c->all;
    size_t row = (size_t)task, mod = row * c->ld, at = row * c->T * c->C;
    float *sums[] = {a.dshift, a.dscale, a.dgate};
    for (int i = 0; i < 3; i++) // with vectors of its own the row's sums are ready at once; otherwise sum_task makes them
        if (sums[i] && c->ld) memset(sums[i] + mod, 0, c->C * sizeof(float));
    a.lines = c->T;
    a.C = c->C;
    a.dx += at;
    a.dshift = c->ld && a.dy ? a.dshift + mod : NULL;
    a.dscale = c->ld && a.dy ? a.dscale + mod : NULL;
    a.dgate = c->ld && a.dgate ? a.dgate + mod : NULL;
    if (a.dy) a.dy += at, a.xhat += at, a.rstd += row * c->T, a.scale += mod;
    if (a.y) a.y += at, a.shift += mod;
    if (a.h) a.h += at, a.dh += at, a.gate += mod;
    cpu_train_simd(lane->cpu)->norm(&a);
    return KERN_OK;
}

static int sum_task(struct lane *lane, int task, void *arg) { // some columns over all rows
    const struct norm_call *c = arg;
    const struct train_norm *a = &c->all;
    const struct train_simd *simd = cpu_train_simd(lane->cpu);
    size_t i = (size_t)task * SUM_COLUMNS, n = least(SUM_COLUMNS, c->C - i), lines = c->R * c->T;
    if (a->dy) simd->sum_lines(a->dshift + i, a->dy + i, NULL, lines, c->C, n);
    if (a->dy) simd->sum_lines(a->dscale + i, a->dy + i, a->xhat + i, lines, c->C, n);
    if (a->dgate) simd->sum_lines(a->dgate + i, a->dx + i, a->h + i, lines, c->C, n);
    return KERN_OK;
}

static int cpu_gate_norm_backward(struct kern *k, const struct kern_norm_back *a) {
    if (k->act != KERN_F32) return ref_gate_norm_backward(k, a);
    struct norm_call c = {.R = (size_t)a->R, .T = (size_t)a->T, .C = (size_t)a->C, .ld = (size_t)a->ld};
    c.all = (struct train_norm){.dx = a->dx,
                                .dh = a->dh,
                                .y = a->dy ? a->y : NULL,
                                .dshift = a->dy ? a->dshift : NULL,
                                .dscale = a->dy ? a->dscale : NULL,
                                .dgate = a->dgate,
                                .dy = a->dy,
                                .xhat = a->xhat,
                                .rstd = a->rstd,
                                .h = a->h,
                                .gate = a->gate,
                                .shift = a->shift,
                                .scale = a->scale};
    double work = 20.0 * a->R * a->T * a->C;
    int rc = cpu_run(k, a->R, work, norm_task, &c);
    if (rc == KERN_OK && !a->ld) rc = cpu_run(k, (int)blocks(c.C, SUM_COLUMNS), work, sum_task, &c);
    return rc < 0 ? rc : sum_columns(k, a->dh_sum, a->dh, c.R * c.T, c.C, a->add);
}

/* ---- attention ---- */

struct attention_call {
    float *dqkv;
    const float *d_o, *qkv, *lse;
    int T, H, D;
};

static int attention_task(struct lane *lane, int task, void *arg) { // one head of one row
    const struct attention_call *c = arg;
    size_t row = (size_t)(task / c->H), T = (size_t)c->T, C = (size_t)c->H * (size_t)c->D;
    size_t head = (size_t)(task % c->H) * (size_t)c->D, at = row * T * 3 * C + head, out = row * T * C + head;
    struct train_head a = {.dq = c->dqkv + at,
                           .dk = c->dqkv + at + C,
                           .dv = c->dqkv + at + 2 * C,
                           .q = c->qkv + at,
                           .k = c->qkv + at + C,
                           .v = c->qkv + at + 2 * C,
                           .d_o = c->d_o + out,
                           .lse = c->lse + (size_t)task * T,
                           .ld = 3 * C,
                           .o_ld = C,
                           .T = c->T,
                           .D = c->D,
                           .work = lane->scratch};
    cpu_train_simd(lane->cpu)->attention(&a);
    return KERN_OK;
}

static int cpu_attention_backward(struct kern *k, void *dqkv, float *dqkv_sum, const void *d_o, const void *qkv, const void *o,
                                  const float *lse, int R, int T, int H, int D, bool add) {
    if (k->act != KERN_F32) return ref_attention_backward(k, dqkv, dqkv_sum, d_o, qkv, o, lse, R, T, H, D, add);
    int rc = kern_check_attention(k, T, H, D);
    if (rc < 0) return rc;
    struct attention_call c = {.dqkv = dqkv, .d_o = d_o, .qkv = qkv, .lse = lse, .T = T, .H = H, .D = D};
    rc = cpu_run(k, R * H, 10.0 * R * H * T * T * D, attention_task, &c);
    return rc < 0 ? rc : sum_columns(k, dqkv_sum, dqkv, (size_t)R * (size_t)T, 3 * (size_t)H * (size_t)D, add);
}

/* ---- cross-attention, forward too: the reference on each row ---- */

struct cross_call {
    char *o; // backward: dq
    const char *q, *d_o;
    const float *kv;
    float *dkv; // NULL: forward
    int ld, T, S, H, D;
};

static int cross_task(struct lane *lane, int task, void *arg) {
    const struct cross_call *c = arg;
    size_t row = (size_t)task, at = row * (size_t)(c->T * c->H * c->D) * kern_dtype_size(lane->kern.act);
    size_t kv = row * (size_t)c->S * (size_t)c->ld;
    if (!c->dkv) return ref_cross_attention(&lane->kern, c->o + at, c->q + at, c->kv + kv, c->ld, 1, c->T, c->S, c->H, c->D);
    return ref_cross_attention_backward(&lane->kern, c->o + at, c->dkv + kv, c->d_o + at, c->q + at, c->kv + kv, c->ld, 1, c->T,
                                        c->S, c->H, c->D);
}

static int run_cross(struct kern *k, struct cross_call *c, int R) {
    int rc = kern_check_cross(k, c->T, c->S, c->H, c->D);
    return rc < 0 ? rc : cpu_run(k, R, 20.0 * R * c->T * c->S * c->H * c->D, cross_task, c);
}

static int cpu_cross_attention(struct kern *k, void *o, const void *q, const float *kv, int ld, int R, int T, int S, int H,
                               int D) {
    struct cross_call c = {.o = o, .q = q, .kv = kv, .ld = ld, .T = T, .S = S, .H = H, .D = D};
    return run_cross(k, &c, R);
}

static int cpu_cross_attention_backward(struct kern *k, void *dq, float *dkv, const void *d_o, const void *q, const float *kv,
                                        int ld, int R, int T, int S, int H, int D) {
    struct cross_call c = {.o = dq, .q = q, .d_o = d_o, .kv = kv, .dkv = dkv, .ld = ld, .T = T, .S = S, .H = H, .D = D};
    return run_cross(k, &c, R);
}

/* ---- images ---- */

struct image_call {
    float *a, *b; // mix: xt, x0; loss: dout, loss
    const float *out, *x1, *x0, *xt;
    size_t numel, out_ld;
    const struct kern_mix *mix;
    const struct kern_loss *loss;
};

static int mix_task(struct lane *lane, int task, void *arg) {
    const struct image_call *c = arg;
    size_t at = (size_t)task * c->numel;
    lane->cpu->simd->mix(c->a + at, c->b + at, c->x1 + at, c->numel, &c->mix[task]);
    return KERN_OK;
}

static int cpu_mix(struct kern *k, float *xt, float *x0, const float *x1, size_t numel, const struct kern_mix *mix, int R) {
    struct image_call c = {.a = xt, .b = x0, .x1 = x1, .numel = numel, .mix = mix};
    return cpu_run(k, R, 40.0 * R * (double)numel, mix_task, &c);
}

static int loss_task(struct lane *lane, int task, void *arg) {
    const struct image_call *c = arg;
    size_t r = (size_t)task, at = r * c->numel;
    (void)lane;
    ref_loss_image(c->a + r * c->out_ld, c->b + 2 * r, c->out + r * c->out_ld, c->out_ld, c->x1 + at, c->x0 + at, c->xt + at,
                   c->numel, &c->loss[r]);
    return KERN_OK;
}

static int cpu_loss(struct kern *k, float *dout, float *loss, const float *out, size_t out_ld, const float *x1, const float *x0,
                    const float *xt, size_t numel, const struct kern_loss *l, int R) {
    struct image_call c = {
        .a = dout, .b = loss, .out = out, .x1 = x1, .x0 = x0, .xt = xt, .numel = numel, .out_ld = out_ld, .loss = l};
    return cpu_run(k, R, 20.0 * R * (double)numel, loss_task, &c);
}

/* ---- optimiser: a fixed number of parts, whose sums are added in order ---- */

enum { PARTS = 256 };

struct flat_call {
    float *p, *m, *v;
    float *const *e;
    const float *g;
    size_t n, part;
    struct adamw s;
    double sums[PARTS];
};

static int squares_task(struct lane *lane, int task, void *arg) {
    struct flat_call *c = arg;
    size_t at = least((size_t)task * c->part, c->n);
    c->sums[task] = cpu_train_simd(lane->cpu)->sum_squares(c->g + at, least(c->part, c->n - at));
    return KERN_OK;
}

static int adamw_task(struct lane *lane, int task, void *arg) {
    struct flat_call *c = arg;
    size_t at = least((size_t)task * c->part, c->n);
    c->sums[task] =
        cpu_train_simd(lane->cpu)->adamw(&c->s, c->p + at, c->m + at, c->v + at, c->e, at, c->g + at, least(c->part, c->n - at));
    return KERN_OK;
}

static int run_parts(struct kern *k, struct flat_call *c, double work, cpu_task_fn *task, double *sum) {
    c->part = KERN_ROUND_UP(blocks(c->n, PARTS), 64);
    int rc = cpu_run(k, PARTS, work * (double)c->n, task, c);
    double v = 0;
    for (int i = 0; i < PARTS; i++) v += c->sums[i];
    if (sum) *sum += v;
    return rc;
}

static int cpu_sum_squares(struct kern *k, double *sum, const float *x, size_t n) {
    struct flat_call c = {.g = x, .n = n};
    return run_parts(k, &c, 4, squares_task, sum);
}

static int cpu_adamw(struct kern *k, float *p, float *m, float *v, float *const e[], const float *g, size_t n,
                     const struct kern_adamw *a, const double *norm2, double *moved2) {
    struct flat_call c = {
        .p = p, .m = m, .v = v, .e = e, .g = g, .n = n, .s = adamw_begin(a, adamw_scale(a, norm2 ? *norm2 : 0))};
    return run_parts(k, &c, 20, adamw_task, moved2);
}

void cpu_train_fill(struct kern *k, const struct cpu *cpu) {
    if (cpu_train_simd(cpu) && k->act == KERN_F32) k->back_lines = 2 * KERN_SUM_LINES * k->threads;
    k->linear_wrap = cpu_linear_wrap;
    k->linear_refresh = cpu_linear_refresh;
    k->linear_backward = cpu_linear_backward;
    k->linear_gradients = cpu_linear_gradients;
    k->loss = cpu_loss;
    k->cross_attention = cpu_cross_attention;
    k->cross_attention_backward = cpu_cross_attention_backward;
    if (!cpu->simd) return;
    k->gate_norm_backward = cpu_gate_norm_backward;
    k->attention_backward = cpu_attention_backward;
    k->mix = cpu_mix;
    k->sum_squares = cpu_sum_squares;
    k->adamw = cpu_adamw;
}
