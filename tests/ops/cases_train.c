// SPDX-License-Identifier: MIT
// The cases' training ops: what buffers they want, how they are called.
#include <stdlib.h>

#include "tests/ops/cases.h"

/* ---- descriptors ---- */

static struct kern_loss loss_of(int id) {
    struct kern_loss l = {.c_out = 1, .c1 = -0.7f, .c0 = 0.3f * (float)(id % 3), .weight = 0.5f + (float)id, .grad = 0.25f};
    if (id % 3 == 0) return l; // no variance: half of each line of out is not looked at
    l.hybrid = true;
    l.first = id % 3 == 2;
    l.log_lo = l.first ? -2 : -1.5f;
    l.log_span = 0.7f;
    l.lv_true = -1.4f;
    l.recip = 1.01f;
    l.recip_m1 = 0.1f;
    l.posterior = l.first ? 1 : 0.6f;
    return l;
}

static int descriptors(struct op_run *o, const int *id) {
    o->desc = calloc((size_t)o->R, sizeof(struct kern_loss) + sizeof(struct kern_mix));
    for (int r = 0; o->desc && r < o->R; r++) {
        int i = id ? id[r] : r;
        struct kern_mix mix = {.seed = 7u + (uint64_t)i, .image = (uint32_t)i, .draw = 2, .a1 = 0.1f * (float)i, .a0 = 0.9f};
        if (o->c->op == OP_LOSS) ((struct kern_loss *)o->desc)[r] = loss_of(i);
        else ((struct kern_mix *)o->desc)[r] = mix;
    }
    return o->desc ? 0 : KERN_ENOMEM;
}

/* ---- buffers: the comments number them ---- */

// 0 dx, 1 dw, 2 db, 3 dy, 4 x, 5 x_pre, 6 w, 7 dx_sum. dw and the sums are added to where there is a bias's; without save there
// is neither dx nor db, and dw is of a third of the outputs, from the next multiple of 8 on
static int linear_make(struct op_run *o, const int *id) {
    const struct op_case *c = o->c;
    size_t T = (size_t)c->T, C = (size_t)c->C, N = (size_t)c->N;
    int x = c->x_f32 ? 0 : ACT, y = c->y_f32 ? 0 : ACT;
    op_add(o, T * C, (c->save ? OUT : 0) | x, id), op_add(o, N * C, OUT | ONCE, id), op_add(o, N, (c->save ? OUT : 0) | ONCE, id);
    op_add(o, T * N, y, id), op_add(o, T * C, x, id), op_add(o, T * C, x, id);
    float *w = op_add(o, N * C, ONCE, id);
    op_add(o, C, (c->save ? OUT : 0) | ONCE, id);
    if (!w) return KERN_ENOMEM;
    struct kern_linear_spec s = {
        .out = c->N, .in = c->C, .unit = c->op == OP_VECTORS_BACKWARD ? KERN_VEC : c->T, .x_f32 = c->x_f32, .y_f32 = c->y_f32};
    o->layers_n = 1;
    return o->k->linear_wrap(o->k, &s, w, NULL, &o->layers[0]);
}

// 0 dx, 1 dh, 2 dmod (shift, scale, gate), 3 dy, 4 xhat, 5 rstd, 6 h, 7 mod, 8 y, 9 dh_sum
static int norm_make(struct op_run *o, const int *id) {
    size_t T = (size_t)o->c->T, C = (size_t)o->c->C;
    int gated = o->c->op == OP_GATE_NORM_BACKWARD ? OUT : 0, shared = o->c->H ? ONCE : 0;
    op_add(o, T * C, OUT, id), op_add(o, T * C, gated | ACT, id), op_add(o, 3 * C, OUT | shared, id);
    op_add(o, T * C, ACT, id), op_add(o, T * C, ACT, id), op_add(o, T, POSITIVE, id), op_add(o, T * C, ACT, id);
    op_add(o, 3 * C, shared, id);
    return op_add(o, T * C, (o->c->N ? 0 : OUT) | ACT, id), op_add(o, C, gated | ONCE, id), 0;
}

int train_make(struct op_run *o, const int *id) {
    const struct op_case *c = o->c;
    size_t T = (size_t)c->T, C = (size_t)c->C, N = (size_t)c->N, H = (size_t)c->H, side2 = T * T;
    switch (c->op) {
    case OP_LINEAR_BACKWARD:
    case OP_VECTORS_BACKWARD:
        return linear_make(o, id);
    case OP_NORM_BACKWARD:
    case OP_GATE_NORM_BACKWARD:
        return norm_make(o, id);
    case OP_ATTENTION_BACKWARD: // dqkv, d_o, qkv, o, lse, dqkv_sum. N: a flag for qkv
        op_add(o, 3 * T * C, OUT | ACT, id), op_add(o, T * C, ACT, id), op_add(o, 3 * T * C, ACT | c->N, id);
        return op_add(o, T * C, ACT, id), op_add(o, T * H, 0, id), op_add(o, 3 * C, OUT | ONCE, id), 0;
    case OP_CROSS_BACKWARD: // dq, dkv, d_o, q, kv: of two blocks, of which the second's are used
        op_add(o, T * C, OUT | ACT, id), op_add(o, N * 4 * C, OUT, id);
        return op_add(o, T * C, ACT, id), op_add(o, T * C, ACT, id), op_add(o, N * 4 * C, 0, id), 0;
    case OP_TAKE_TOKEN:
        return op_add(o, C, OUT, id), op_add(o, T * C, 0, id), 0;
    case OP_CONDITION_BACKWARD: // the table has the classes that INT buffers name
        return op_add(o, 5 * C, OUT | ONCE, id), op_add(o, C, 0, id), op_add(o, 1, INT, id), 0;
    case OP_UNPATCHIFY_BACKWARD:
        return op_add(o, C * side2, OUT, id), op_add(o, H * side2, 0, id), 0;
    case OP_MIX: // xt, x0, x1
        op_add(o, C * side2, OUT, id), op_add(o, C * side2, OUT, id), op_add(o, C * side2, 0, id);
        return descriptors(o, id);
    case OP_LOSS: // dout, loss, out, x1, x0, xt
        op_add(o, 2 * C * side2, OUT, id), op_add(o, 2, OUT, id), op_add(o, 2 * C * side2, 0, id);
        op_add(o, C * side2, 0, id), op_add(o, C * side2, 0, id), op_add(o, C * side2, 0, id);
        return descriptors(o, id);
    default: // OP_ADAMW: p, m, v, two averages, g, then what norm2 is made from and norm2
        for (int i = 0; i < 6; i++) op_add(o, C, (i < 5 ? OUT : 0) | (i == 2 ? POSITIVE : 0), id);
        return op_add(o, 1000, ONCE, id), op_add(o, 2, ONCE, id), 0;
    }
}

/* ---- calls ---- */

static int linear_run(struct op_run *o, void **p) {
    const struct op_case *c = o->c;
    int rc = o->k->linear_refresh(o->k, o->layers[0]), units = c->op == OP_VECTORS_BACKWARD ? o->lines / KERN_VEC : o->R;
    int first = c->save ? 0 : KERN_ROUND_UP(c->N / 3, 8), count = c->save ? c->N : c->N / 3;
    if (!rc)
        rc = o->k->linear_gradients(o->k, o->layers[0], p[1], c->save ? p[2] : NULL, p[3], p[4], units, first, count, c->save);
    if (rc || !c->save) return rc;
    return o->k->linear_backward(o->k, o->layers[0], p[0], p[7], p[3], c->act, p[5], units, true);
}

static int norm_run(struct op_run *o, void **p) {
    const struct op_case *c = o->c;
    bool gated = c->op == OP_GATE_NORM_BACKWARD;
    int C = c->C;
    float *d = p[2], *mod = p[7];
    struct kern_norm_back a = {
        .dx = p[0], .dshift = d, .dscale = d + C, .dgate = c->save ? d + 2 * C : NULL, .xhat = p[4], .rstd = p[5]};
    if (gated) a.dh = p[1], a.dh_sum = p[9], a.h = p[6], a.gate = mod + 2 * C, a.add = c->H;
    if (!c->N) a.dy = p[3], a.y = p[8];
    a.shift = mod, a.scale = mod + C, a.ld = c->H ? 0 : 3 * C, a.R = o->R, a.T = c->T, a.C = C;
    return o->k->gate_norm_backward(o->k, &a);
}

static int attention_run(struct op_run *o, void **p) { // on what the forward op says of these inputs
    const struct op_case *c = o->c;
    int rc = o->k->attention(o->k, p[3], p[2], o->R, c->T, c->H, c->C / c->H, p[4]);
    return rc ? rc : o->k->attention_backward(o->k, p[0], p[5], p[1], p[2], p[3], p[4], o->R, c->T, c->H, c->C / c->H, c->save);
}

static int adamw_run(struct op_run *o, void **p) {
    const struct kern_adamw a = {.lr = 1e-3,
                                 .beta1 = 0.9,
                                 .beta2 = 0.999,
                                 .eps = 1e-8,
                                 .decay = 0.1,
                                 .bias1 = 0.271,
                                 .bias2 = 0.002997,
                                 .grad_scale = 0.5,
                                 .max_norm = 10,
                                 .n_ema = 2,
                                 .ema = {0.9999, 0.5}};
    int rc = o->k->zero(o->k, p[7], sizeof(double));
    if (!rc) rc = o->k->sum_squares(o->k, p[7], p[6], 1000);
    float *e[] = {p[3], p[4]};
    return rc ? rc : o->k->adamw(o->k, p[0], p[1], p[2], e, p[5], (size_t)o->R * (size_t)o->c->C, &a, p[7], NULL);
}

int train_run(struct op_run *o) {
    const struct op_case *c = o->c;
    struct kern *k = o->k;
    int R = o->R, T = c->T, C = c->C;
    size_t n = (size_t)C * (size_t)T * (size_t)T;
    void *p[OP_BUFFERS];
    for (int i = 0; i < OP_BUFFERS; i++) p[i] = o->b[i].p;
    switch (c->op) {
    case OP_LINEAR_BACKWARD:
    case OP_VECTORS_BACKWARD:
        return linear_run(o, p);
    case OP_NORM_BACKWARD:
    case OP_GATE_NORM_BACKWARD:
        return norm_run(o, p);
    case OP_ATTENTION_BACKWARD:
        return attention_run(o, p);
    case OP_CROSS_BACKWARD:
        return k->cross_attention_backward(k, p[0], (float *)p[1] + 2 * C, p[2], p[3], (const float *)p[4] + 2 * C, 4 * C, R, T,
                                           c->N, c->H, C / c->H);
    case OP_TAKE_TOKEN:
        return k->take_token(k, p[0], p[1], R, T, C, c->N);
    case OP_CONDITION_BACKWARD:
        return k->condition_backward(k, p[0], p[1], p[2], R, C);
    case OP_UNPATCHIFY_BACKWARD:
        return k->unpatchify_backward(k, p[0], p[1], R, C, c->H, T, c->N);
    case OP_MIX:
        return k->mix(k, p[0], p[1], p[2], n, o->desc, R);
    case OP_LOSS:
        return k->loss(k, p[0], p[1], p[2], 2 * n, p[3], p[4], p[5], n, o->desc, R);
    default:
        return adamw_run(o, p);
    }
}

double train_flops(const struct op_case *c, int R) {
    double T = c->T, C = c->C, N = c->N;
    if (c->op == OP_LINEAR_BACKWARD || c->op == OP_VECTORS_BACKWARD) return 2 * R * T * C * N * (c->save ? 2 : 1);
    if (c->op == OP_ATTENTION_BACKWARD) return (4 + 10) * R * T * T * C; // the forward pass runs with it
    return 0;
}

double train_bytes_moved(const struct op_case *c, int R) {
    double T = c->T, C = c->C, es = (double)kern_dtype_size(c->dtype);
    if (c->op == OP_NORM_BACKWARD) return R * T * C * (8 + 2 * es);
    if (c->op == OP_GATE_NORM_BACKWARD) return R * T * C * (8 + 4 * es);
    if (c->op == OP_MIX) return R * T * T * C * 12;
    if (c->op == OP_LOSS) return R * T * T * C * 28;
    if (c->op == OP_ADAMW) return R * C * 4 * 11;
    return 0;
}
