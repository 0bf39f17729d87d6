// SPDX-License-Identifier: MIT
#include "tests/ops/cases.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"
#include "kernels/philox.h"

#define F32_TOL 2e-6
#define BF16_TOL 4e-3 // both sides round to 8 bits; a sum that ends near a tie may round either way
#define LINEAR(name_, t_, in_, out_, ...)                                                                                        \
    { .name = name_, .op = OP_LINEAR, .T = t_, .C = in_, .N = out_, .tol = F32_TOL, __VA_ARGS__ }
#define LINEAR_BF16(name_, t_, in_, out_, ...)                                                                                   \
    { .name = name_, .op = OP_LINEAR, .dtype = KERN_BF16, .T = t_, .C = in_, .N = out_, .tol = BF16_TOL, __VA_ARGS__ }
#define TRAIN(name_, op_, t_, c_, n_, tol_, ...)                                                                                 \
    { .name = name_, .op = op_, .T = t_, .C = c_, .N = n_, .tol = tol_, __VA_ARGS__ }
#define HEADS(t_, h_, d_, ...)                                                                                                   \
    { .name = "attention", .op = OP_ATTENTION, .T = t_, .C = (h_) * (d_), .H = h_, .tol = F32_TOL, __VA_ARGS__ }
#define HEADS_BF16(t_, h_, d_, ...)                                                                                              \
    {                                                                                                                            \
        .name = "attention bf16", .op = OP_ATTENTION, .dtype = KERN_BF16, .T = t_, .C = (h_) * (d_), .H = h_, .tol = BF16_TOL,   \
        __VA_ARGS__                                                                                                              \
    }

const struct op_case op_cases[] = {
    LINEAR("qkv", 64, 192, 576, .bench = true),
    LINEAR("proj", 64, 192, 192, .bench = true),
    LINEAR("fc1", 64, 192, 768, .act = KERN_GELU_TANH, .bench = true),
    LINEAR("fc2", 64, 768, 192, .bench = true),
    LINEAR("odd sizes", 9, 24, 40),
    LINEAR("one token, one output", 1, 8, 1),
    LINEAR("last panel narrower", 32, 512, 1000, .act = KERN_SILU, .save = true),
    LINEAR("equal panels", 16, 520, 768),
    LINEAR("two very wide panels", 2, 8, 4100),
    LINEAR("several chunks a unit", 1024, 32, 48),
    LINEAR("prime unit", 257, 16, 33),
    LINEAR("gelu, saved", 49, 72, 200, .act = KERN_GELU_TANH, .save = true),
    LINEAR("silu, saved", 16, 64, 64, .act = KERN_SILU, .save = true),
    LINEAR("saved without activation", 16, 64, 400, .save = true),
    LINEAR("float16 weights", 16, 64, 96, .w_store = KERN_F16),
    LINEAR("bfloat16 weights", 16, 64, 96, .w_store = KERN_BF16),
    LINEAR_BF16("qkv bf16", 64, 192, 576, .bench = true),
    LINEAR_BF16("proj bf16", 64, 192, 192, .bench = true),
    LINEAR_BF16("fc1 bf16", 64, 192, 768, .act = KERN_GELU_TANH, .bench = true),
    LINEAR_BF16("fc2 bf16", 64, 768, 192, .bench = true),
    LINEAR_BF16("odd sizes bf16", 9, 24, 40, .act = KERN_SILU, .save = true),
    LINEAR_BF16("odd depth bf16", 9, 25, 41),
    LINEAR_BF16("last panel narrower bf16", 32, 512, 1000, .act = KERN_GELU_TANH, .save = true),
    {.name = "vectors bf16", .op = OP_VECTORS, .dtype = KERN_BF16, .T = 1, .C = 40, .N = 72, .tol = BF16_TOL},
    LINEAR_BF16("f32 in", 16, 64, 96, .x_f32 = true),
    LINEAR_BF16("f32 out", 16, 64, 96, .y_f32 = true, .act = KERN_GELU_TANH, .save = true),
    LINEAR_BF16("f32 in and out", 16, 64, 96, .x_f32 = true, .y_f32 = true),
    {.name = "patch embedding", .op = OP_LINEAR, .T = 64, .C = 4, .N = 192, .x_f32 = true, .y_f32 = true, .tol = F32_TOL},
    {.name = "timestep fc1",
     .op = OP_VECTORS,
     .T = 1,
     .C = 256,
     .N = 192,
     .act = KERN_SILU,
     .x_f32 = true,
     .y_f32 = true,
     .tol = F32_TOL,
     .bench = true},
    {.name = "modulation",
     .op = OP_VECTORS,
     .T = 1,
     .C = 192,
     .N = 9600,
     .x_f32 = true,
     .y_f32 = true,
     .tol = F32_TOL,
     .bench = true},
    {.name = "vectors, odd sizes", .op = OP_VECTORS, .T = 1, .C = 13, .N = 301, .tol = F32_TOL, .save = true},
    {.name = "patchify", .op = OP_PATCHIFY, .T = 16, .C = 3, .N = 2, .bench = true},
    {.name = "patchify 4", .op = OP_PATCHIFY, .T = 32, .C = 4, .N = 4},
    {.name = "unpatchify", .op = OP_UNPATCHIFY, .T = 16, .C = 6, .N = 2, .H = 3, .bench = true},
    {.name = "add table", .op = OP_ADD_TABLE, .T = 64, .C = 192, .bench = true},
    {.name = "timestep", .op = OP_TIMESTEP, .T = 1, .C = 256, .tol = 1e-7, .bench = true},
    {.name = "condition", .op = OP_CONDITION, .T = 1, .C = 192, .tol = F32_TOL, .save = true, .bench = true},
    {.name = "condition, odd width", .op = OP_CONDITION, .T = 1, .C = 43, .tol = F32_TOL},
    {.name = "norm", .op = OP_NORM, .T = 64, .C = 192, .tol = F32_TOL, .save = true, .bench = true},
    {.name = "norm, odd width", .op = OP_NORM, .T = 70, .C = 37, .tol = F32_TOL, .save = true},
    {.name = "norm, narrow", .op = OP_NORM, .T = 3, .C = 5, .tol = F32_TOL},
    {.name = "norm bf16", .op = OP_NORM, .dtype = KERN_BF16, .T = 64, .C = 192, .tol = BF16_TOL, .bench = true},
    {.name = "norm bf16, odd width", .op = OP_NORM, .dtype = KERN_BF16, .T = 17, .C = 1157, .tol = BF16_TOL},
    {.name = "gate and norm", .op = OP_GATE_NORM, .T = 64, .C = 192, .tol = F32_TOL, .save = true, .bench = true},
    {.name = "gate and norm, XL", .op = OP_GATE_NORM, .T = 256, .C = 1152, .tol = F32_TOL, .bench = true},
    {.name = "gate and norm, odd", .op = OP_GATE_NORM, .T = 65, .C = 43, .tol = F32_TOL},
    {.name = "gate only", .op = OP_GATE_NORM, .T = 16, .C = 40, .tol = F32_TOL, .N = 1},
    {.name = "gate and norm bf16", .op = OP_GATE_NORM, .dtype = KERN_BF16, .T = 64, .C = 192, .tol = BF16_TOL, .bench = true},
    HEADS(64, 3, 64, .bench = true, .save = true),
    HEADS(256, 12, 64, .bench = true),
    HEADS(256, 16, 72, .bench = true),
    HEADS(1024, 2, 72, .bench = true),
    HEADS(1, 2, 8),
    HEADS(2, 1, 128, .save = true),
    HEADS(9, 3, 24),
    HEADS(16, 2, 16),
    HEADS(31, 2, 32),
    HEADS(33, 2, 40),
    HEADS(49, 1, 48),
    HEADS(65, 1, 56),
    HEADS(100, 1, 80),
    HEADS(64, 1, 88),
    HEADS(64, 1, 96),
    HEADS(48, 1, 104),
    HEADS(255, 1, 112),
    HEADS(257, 1, 120, .save = true),
    HEADS(600, 1, 128),
    HEADS(4096, 1, 8),
    HEADS_BF16(64, 3, 64, .bench = true, .save = true),
    HEADS_BF16(256, 16, 72, .bench = true),
    HEADS_BF16(9, 3, 24),
    HEADS_BF16(300, 1, 128),
    HEADS_BF16(1, 1, 8),
    {.name = "set token", .op = OP_SET_TOKEN, .T = 5, .C = 40, .N = 3},
    {.name = "cross-attention", .op = OP_CROSS, .T = 64, .C = 192, .H = 3, .N = 2, .tol = F32_TOL},
    {.name = "cross-attention, odd", .op = OP_CROSS, .T = 9, .C = 72, .H = 3, .N = 5, .tol = F32_TOL},
    {.name = "cross-attention bf16", .op = OP_CROSS, .dtype = KERN_BF16, .T = 16, .C = 48, .H = 2, .N = 2, .tol = BF16_TOL},
    {.name = "gather", .op = OP_GATHER, .T = 1, .C = 1000, .bench = true},
    {.name = "row update", .op = OP_ROW_UPDATE, .T = 16, .C = 4, .bench = true},
    {.name = "row update, odd plane", .op = OP_ROW_UPDATE, .T = 7, .C = 3},
    {.name = "row norm", .op = OP_ROW_NORM, .T = 1, .C = 1000, .tol = 1e-12},
    {.name = "net, small", .op = OP_NET, .T = 16, .C = 48, .N = 192, .H = 2, .depth = 2, .tol = 1e-5},
    {.name = "net, small bf16", .op = OP_NET, .dtype = KERN_BF16, .T = 16, .C = 48, .N = 192, .H = 2, .depth = 2, .tol = 1e-2},
    {.name = "net, bundled model", .op = OP_NET, .T = 64, .C = 192, .N = 768, .H = 3, .depth = 8, .tol = 1e-5, .bench = true},
    {.name = "net, bundled model bf16",
     .op = OP_NET,
     .dtype = KERN_BF16,
     .T = 64,
     .C = 192,
     .N = 768,
     .H = 3,
     .depth = 8,
     .tol = 1e-2,
     .bench = true},
    TRAIN("qkv backward", OP_LINEAR_BACKWARD, 64, 192, 576, F32_TOL, .save = true, .bench = true),
    TRAIN("proj backward", OP_LINEAR_BACKWARD, 64, 192, 192, F32_TOL, .save = true, .bench = true),
    TRAIN("fc1 backward", OP_LINEAR_BACKWARD, 64, 192, 768, F32_TOL, .save = true, .bench = true),
    TRAIN("fc2 backward", OP_LINEAR_BACKWARD, 64, 768, 192, F32_TOL, .save = true, .act = KERN_GELU_TANH, .bench = true),
    TRAIN("linear backward", OP_LINEAR_BACKWARD, 9, 25, 41, F32_TOL, .save = true, .act = KERN_SILU),
    TRAIN("linear backward", OP_LINEAR_BACKWARD, 1, 8, 1, F32_TOL, .save = true),
    TRAIN("linear backward", OP_LINEAR_BACKWARD, 16, 300, 130, F32_TOL, .save = true, .act = KERN_GELU_TANH),
    TRAIN("linear backward, no bias, no dx", OP_LINEAR_BACKWARD, 257, 16, 33, F32_TOL),
    TRAIN("modulation backward", OP_VECTORS_BACKWARD, 1, 192, 9600, F32_TOL, .save = true, .act = KERN_SILU, .x_f32 = true,
          .y_f32 = true, .bench = true),
    TRAIN("vectors backward", OP_VECTORS_BACKWARD, 1, 13, 301, F32_TOL, .save = true),
    TRAIN("linear backward", OP_LINEAR_BACKWARD, 9, 24, 40, BF16_TOL, .dtype = KERN_BF16, .save = true, .act = KERN_GELU_TANH),
    TRAIN("linear backward", OP_LINEAR_BACKWARD, 16, 64, 96, BF16_TOL, .dtype = KERN_BF16, .save = true, .x_f32 = true,
          .y_f32 = true),
    TRAIN("linear backward", OP_LINEAR_BACKWARD, 16, 64, 96, BF16_TOL, .dtype = KERN_BF16, .save = true, .y_f32 = true),
    TRAIN("norm backward", OP_NORM_BACKWARD, 64, 192, 0, F32_TOL, .bench = true),
    TRAIN("norm backward, shared", OP_NORM_BACKWARD, 13, 37, 0, F32_TOL, .H = 1),
    TRAIN("norm backward", OP_NORM_BACKWARD, 3, 1157, 0, BF16_TOL, .dtype = KERN_BF16),
    TRAIN("gate and norm backward", OP_GATE_NORM_BACKWARD, 64, 192, 0, F32_TOL, .save = true, .bench = true),
    TRAIN("gate and norm backward", OP_GATE_NORM_BACKWARD, 70, 43, 0, F32_TOL, .save = true),
    TRAIN("gate and norm backward, shared", OP_GATE_NORM_BACKWARD, 65, 200, 0, F32_TOL, .save = true, .H = 1),
    TRAIN("gate and norm backward, fixed gate", OP_GATE_NORM_BACKWARD, 5, 8, 0, F32_TOL),
    TRAIN("gate backward", OP_GATE_NORM_BACKWARD, 9, 40, 1, F32_TOL, .save = true),
    TRAIN("gate and norm backward", OP_GATE_NORM_BACKWARD, 16, 192, 0, BF16_TOL, .dtype = KERN_BF16, .save = true),
    TRAIN("attention backward", OP_ATTENTION_BACKWARD, 64, 192, 0, F32_TOL, .H = 3, .bench = true),
    TRAIN("attention backward", OP_ATTENTION_BACKWARD, 256, 72, 0, F32_TOL, .H = 1, .bench = true),
    TRAIN("attention backward", OP_ATTENTION_BACKWARD, 1, 16, 0, F32_TOL, .H = 2),
    TRAIN("attention backward", OP_ATTENTION_BACKWARD, 9, 72, 0, F32_TOL, .H = 3),
    TRAIN("attention backward", OP_ATTENTION_BACKWARD, 31, 64, 0, F32_TOL, .H = 2),
    TRAIN("attention backward", OP_ATTENTION_BACKWARD, 33, 40, 0, F32_TOL, .H = 1),
    TRAIN("attention backward", OP_ATTENTION_BACKWARD, 65, 128, 0, F32_TOL, .H = 1),
    TRAIN("attention backward", OP_ATTENTION_BACKWARD, 130, 88, 0, F32_TOL, .H = 1),
    TRAIN("attention backward", OP_ATTENTION_BACKWARD, 257, 120, 0, F32_TOL, .H = 1),
    TRAIN("attention backward", OP_ATTENTION_BACKWARD, 600, 8, 0, F32_TOL, .H = 1),
    TRAIN("attention backward", OP_ATTENTION_BACKWARD, 33, 48, 0, BF16_TOL, .dtype = KERN_BF16, .H = 2),
    TRAIN("attention backward, far from 0", OP_ATTENTION_BACKWARD, 70, 72, FAR, 2e-4, .H = 1),
    TRAIN("attention backward, far from 0", OP_ATTENTION_BACKWARD, 300, 64, FAR, 2e-4, .H = 1),
    TRAIN("attention backward, far from 0", OP_ATTENTION_BACKWARD, 70, 40, FAR, 1e-2, .dtype = KERN_BF16, .H = 1),
    TRAIN("attention backward, far from 0", OP_ATTENTION_BACKWARD, 70, 64, FAR, 1e-2, .dtype = KERN_BF16, .H = 1),
    TRAIN("attention backward, far from 0", OP_ATTENTION_BACKWARD, 300, 72, FAR, 1e-2, .dtype = KERN_BF16, .H = 1),
    TRAIN("cross-attention backward", OP_CROSS_BACKWARD, 64, 192, 2, F32_TOL, .H = 3),
    TRAIN("cross-attention backward", OP_CROSS_BACKWARD, 9, 72, 5, F32_TOL, .H = 3),
    TRAIN("cross-attention backward", OP_CROSS_BACKWARD, 9, 48, 2, BF16_TOL, .dtype = KERN_BF16, .H = 2),
    TRAIN("take token", OP_TAKE_TOKEN, 5, 40, 3, 0),
    TRAIN("condition backward", OP_CONDITION_BACKWARD, 1, 43, 0, 1e-6),
    TRAIN("unpatchify backward", OP_UNPATCHIFY_BACKWARD, 16, 6, 2, 0, .H = 3),
    TRAIN("mix", OP_MIX, 7, 3, 0, 0, .bench = true),
    TRAIN("loss", OP_LOSS, 8, 4, 0, F32_TOL, .bench = true),
    TRAIN("adamw", OP_ADAMW, 1, 100003, 0, 0, .bench = true),
};
const int op_cases_n = sizeof op_cases / sizeof *op_cases;

/* ---- buffers ---- */

// Uniform with variance 1, from a mixed counter: cheap, as the tests make some hundred million of them
static float noise(uint64_t stream, size_t e) {
    uint64_t z = (stream + 1) * 0x9e3779b97f4a7c15u ^ (e + 1) * 0xd1b54a32d192ed03u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z ^= z >> 27;
    return 1.7320508f * 0x1p-31f * (float)(int32_t)(z >> 16);
}

static float value(const struct op_case *c, int buffer, int id, size_t e) {
    return noise((uint64_t)(c->T * 131 + c->C) << 32 | (uint64_t)(buffer * 4096 + id), e);
}

void *op_add(struct op_run *o, size_t row, int flags, const int *id) {
    struct op_buffer *b = &o->b[o->n];
    b->row = row;
    b->shared = flags & ONCE;
    b->out = flags & OUT;
    b->act = flags & ACT;
    b->size = b->act ? kern_dtype_size(o->k->act) : 4;
    size_t lines = b->shared ? 1 : (size_t)o->lines;
    b->bytes = lines * row * b->size;
    b->host = calloc(lines * row + 1, b->size);
    if (!b->host || o->k->alloc(o->k, b->bytes, &b->p)) return NULL;
    for (size_t r = 0; r < lines; r++)
        for (size_t e = 0; e < row && ((int)r < o->R); e++) {
            int row_id = b->shared ? 1000 : id ? id[r] : (int)r;
            float v = value(o->c, o->n, row_id, e) * (flags & ROUGH ? 30 : 1) + (flags & FAR ? 8 : 0);
            if (flags & INT) ((int32_t *)b->host)[r * row + e] = row_id % 5 - 1;
            else if (flags & POSITIVE) kern_store(KERN_F32, b->host, r * row + e, fabsf(v));
            else kern_store(b->act ? o->k->act : KERN_F32, b->host, r * row + e, v);
        }
    o->n++;
    return b->p;
}

static int layer(struct op_run *o, struct kern_linear_spec s) {
    size_t n = (size_t)s.out * (size_t)s.in;
    float *w = malloc(n * 4), *b = malloc((size_t)s.out * 4), scale = 1 / sqrtf((float)s.in);
    if (!w || !b) return KERN_ENOMEM;
    s.w_store = o->c->w_store;
    for (size_t i = 0; i < n; i++) {
        float v = scale * noise(7000 + (uint64_t)o->layers_n, i);
        if (s.w_store == KERN_F32) w[i] = v;
        else
            ((uint16_t *)w)[i] = (uint16_t)(s.w_store == KERN_BF16 ? kern_f32_to_bf16(v)
                                                                   : 0x2c00 | (philox_float_bits(v) >> 9 & 0x83ff)); // any halves
    }
    for (int i = 0; i < s.out; i++) b[i] = noise(8000 + (uint64_t)o->layers_n, (size_t)i);
    int rc = o->k->linear_new(o->k, &s, w, o->layers_n % 4 == 3 ? NULL : b, &o->layers[o->layers_n]);
    o->layers_n += rc == 0;
    free(w);
    free(b);
    return rc;
}

static struct kern_row_update update_of(int id, int place) {
    struct kern_row_update u = {.slot = place,
                                .row_c = 2 * place,
                                .row_u = id % 3 ? 2 * place + 1 : -1,
                                .row_rest = 2 * place,
                                .scale = 1.5f + (float)id,
                                .guided = 2 + 3 * (id % 2),
                                .seed = 42u + (uint64_t)id,
                                .image = 3,
                                .draw = (uint32_t)id,
                                .n = 1 + id % 3};
    for (int a = 0; a < u.n; a++) {
        u.assign[a] = (struct kern_assign){.dst = (a + id) % KERN_COLS, .c_out = a == 1 ? 0 : 0.3f, .c_noise = id % 2 ? 0.7f : 0};
        for (int j = 0; j < KERN_COLS; j++) u.assign[a].c[j] = (j + id + a) % 3 ? 0 : 0.1f * (float)(j + 1);
        if (id % 3 && a != 1) u.assign[a].c_clip = -0.4f;
    }
    u.learned = id % 4 == 1; // with noise; its guidance reaches into the second half of the channels
    u.log_lo = -1.5f;
    u.log_span = 0.7f;
    u.clip = (struct kern_clip){.c = {[1] = 0.8f, [4] = -0.5f}, .c_out = 0.9f};
    return u;
}

static int descriptors(struct op_run *o, const int *id) {
    o->desc = calloc((size_t)o->R, sizeof(struct kern_row_update) + sizeof(struct kern_norm));
    o->norms = calloc((size_t)o->R, sizeof(double));
    if (!o->desc || !o->norms) return KERN_ENOMEM;
    for (int r = 0; r < o->R; r++) {
        int i = id ? id[r] : r;
        if (o->c->op == OP_ROW_UPDATE) ((struct kern_row_update *)o->desc)[r] = update_of(i, r);
        if (o->c->op == OP_GATHER)
            ((struct kern_gather *)o->desc)[r] = (struct kern_gather){.slot = r, .col = i % KERN_COLS, .scale = 0.5f + (float)i};
        if (o->c->op == OP_ROW_NORM)
            ((struct kern_norm *)o->desc)[r] =
                (struct kern_norm){.slot = r, .a = i % 3, .b = 4, .c = {0.5f, 0, 0, -2}, .atol = 1e-3, .rtol = 1e-2};
    }
    return 0;
}

static int net_open(struct op_run *o, const int *id) {
    const struct op_case *c = o->c;
    size_t tokens = (size_t)c->T, C = (size_t)c->C, scratch = (size_t)o->k->rows_scratch(o->k, o->R, c->T);
    op_add(o, tokens * C, OUT, id);
    op_add(o, (size_t)c->depth * 6 * C, 0, id);
    size_t act[] = {C, 3 * C, C, C, (size_t)c->N}; // norm, qkv, attention, branch, mlp
    for (int i = 0; i < 5; i++) op_add(o, scratch * tokens * act[i], ACT | ONCE, id);
    for (int d = 0; d < c->depth; d++) {
        struct kern_linear_spec s[] = {{.out = 3 * c->C, .in = c->C, .unit = c->T},
                                       {.out = c->C, .in = c->C, .unit = c->T},
                                       {.out = c->N, .in = c->C, .unit = c->T, .act = KERN_GELU_TANH},
                                       {.out = c->C, .in = c->N, .unit = c->T}};
        for (int i = 0; i < 4; i++)
            if (layer(o, s[i])) return -1;
    }
    return 0;
}

static int make(struct op_run *o, const int *id) {
    const struct op_case *c = o->c;
    size_t T = (size_t)c->T, C = (size_t)c->C, N = (size_t)c->N, side2 = T * T;
    switch (c->op) {
    case OP_LINEAR:
    case OP_VECTORS:
        op_add(o, T * N, OUT | (c->y_f32 ? 0 : ACT), id);
        op_add(o, T * C, c->x_f32 ? 0 : ACT, id);
        if (c->save) op_add(o, T * N, OUT | (c->y_f32 ? 0 : ACT), id);
        return layer(o, (struct kern_linear_spec){.out = c->N,
                                                  .in = c->C,
                                                  .unit = c->op == OP_VECTORS ? KERN_VEC : c->T,
                                                  .act = c->act,
                                                  .x_f32 = c->x_f32,
                                                  .y_f32 = c->y_f32});
    case OP_PATCHIFY:
        return op_add(o, C * side2, OUT, id), op_add(o, C * side2, 0, id), 0;
    case OP_UNPATCHIFY:
        return op_add(o, (size_t)c->H * side2, OUT, id), op_add(o, C * side2, 0, id), 0;
    case OP_ADD_TABLE:
        return op_add(o, T * C, OUT, id), op_add(o, T * C, ONCE, id), 0;
    case OP_TIMESTEP:
        return op_add(o, C, OUT, id), op_add(o, 1, ROUGH, id), 0;
    case OP_CONDITION:
        op_add(o, C, OUT, id), op_add(o, C, 0, id), op_add(o, 4 * C, ONCE, id), op_add(o, 1, INT, id);
        return c->save ? (op_add(o, C, OUT, id), 0) : 0;
    case OP_NORM:
    case OP_GATE_NORM:
        op_add(o, T * C, OUT | ACT, id), op_add(o, T * C, OUT | ROUGH, id), op_add(o, T * C, ACT, id), op_add(o, 3 * C, 0, id);
        return c->save ? (op_add(o, T * C, OUT | ACT, id), op_add(o, T, OUT, id), 0) : 0;
    case OP_ATTENTION:
        op_add(o, T * C, OUT | ACT, id), op_add(o, 3 * T * C, ACT, id);
        return c->save ? (op_add(o, T * (size_t)c->H, OUT, id), 0) : 0;
    case OP_SET_TOKEN:
        return op_add(o, T * C, OUT, id), op_add(o, C, 0, id), 0;
    case OP_CROSS: // keys and values of two blocks, of which the second's are used
        return op_add(o, T * C, OUT | ACT, id), op_add(o, T * C, ACT, id), op_add(o, N * 4 * C, 0, id), 0;
    case OP_GATHER:
        return op_add(o, C, OUT, id), op_add(o, KERN_COLS * C, 0, id), descriptors(o, id);
    case OP_ROW_UPDATE:
        return op_add(o, KERN_COLS * C * side2, OUT, id), op_add(o, 4 * C * side2, 0, id), descriptors(o, id);
    case OP_ROW_NORM:
        return op_add(o, KERN_COLS * C, 0, id), descriptors(o, id);
    case OP_NET:
        return net_open(o, id);
    default:
        return train_make(o, id);
    }
}

int op_open(struct op_run *o, struct kern *k, const struct op_case *c, int R, const int *id) {
    *o = (struct op_run){
        .k = k, .c = c, .R = R, .lines = c->op == OP_VECTORS || c->op == OP_VECTORS_BACKWARD ? KERN_ROUND_UP(R, KERN_VEC) : R};
    int rc = make(o, id);
    for (int i = 0; i < o->n && rc == 0; i++)
        if (!o->b[i].p) rc = KERN_ENOMEM;
    return rc ? rc : op_reset(o);
}

int op_reset(struct op_run *o) {
    for (int i = 0; i < o->n; i++) o->k->upload(o->k, o->b[i].p, o->b[i].host, o->b[i].bytes);
    return 0;
}

int op_read(struct op_run *o, int i, void *host) { return o->k->download(o->k, host, o->b[i].p, o->b[i].bytes); }

void op_close(struct op_run *o) {
    for (int i = 0; i < o->layers_n; i++) o->k->linear_free(o->k, o->layers[i]);
    for (int i = 0; i < o->n; i++) {
        o->k->free(o->k, o->b[i].p);
        free(o->b[i].host);
    }
    free(o->desc);
    free(o->norms);
}

/* ---- running ---- */

static int net_rows(struct kern *k, void *ctx, int r0, int n, int s0) {
    struct op_run *o = ctx;
    const struct op_case *c = o->c;
    int T = c->T, C = c->C, ld = 6 * C * c->depth, rc;
    size_t es = kern_dtype_size(k->act), line = (size_t)s0 * (size_t)T * es;
    float *x = (float *)o->b[0].p + (size_t)r0 * o->b[0].row;
    const float *mod = (const float *)o->b[1].p + (size_t)r0 * (size_t)ld;
    char *norm = (char *)o->b[2].p + line * (size_t)C, *qkv = (char *)o->b[3].p + line * 3 * (size_t)C,
         *att = (char *)o->b[4].p + line * (size_t)C;
    char *branch = (char *)o->b[5].p + line * (size_t)C, *mlp = (char *)o->b[6].p + line * (size_t)c->N;
    rc = k->norm_modulate(k, norm, x, mod, mod + C, ld, n, T, C, 1e-6f, NULL, NULL);
    for (int d = 0; d < c->depth && !rc; d++, mod += 6 * C) {
        struct kern_linear **l = o->layers + 4 * d;
        bool last = d == c->depth - 1;
        rc = k->linear(k, l[0], qkv, norm, n, NULL);
        if (!rc) rc = k->attention(k, att, qkv, n, T, c->H, C / c->H, NULL);
        if (!rc) rc = k->linear(k, l[1], branch, att, n, NULL);
        if (!rc) rc = k->gate_norm(k, norm, x, branch, mod + 2 * C, mod + 3 * C, mod + 4 * C, ld, n, T, C, 1e-6f, NULL, NULL);
        if (!rc) rc = k->linear(k, l[2], mlp, norm, n, NULL);
        if (!rc) rc = k->linear(k, l[3], branch, mlp, n, NULL);
        if (!rc)
            rc = k->gate_norm(k, last ? NULL : norm, x, branch, mod + 5 * C, last ? NULL : mod + 6 * C, last ? NULL : mod + 7 * C,
                              ld, n, T, C, 1e-6f, NULL, NULL);
    }
    return rc;
}

int op_run(struct op_run *o) {
    const struct op_case *c = o->c;
    struct kern *k = o->k;
    int R = o->R, T = c->T, C = c->C;
    size_t n = (size_t)C * (size_t)T * (size_t)T;
    void *p[OP_BUFFERS];
    for (int i = 0; i < OP_BUFFERS; i++) p[i] = o->b[i].p;
    float *mod = p[3];
    switch (c->op) {
    case OP_LINEAR:
        return k->linear(k, o->layers[0], p[0], p[1], R, p[2]);
    case OP_VECTORS:
        return k->linear(k, o->layers[0], p[0], p[1], o->lines / KERN_VEC, p[2]);
    case OP_PATCHIFY:
        return k->patchify(k, p[0], p[1], R, C, T, c->N);
    case OP_UNPATCHIFY:
        return k->unpatchify(k, p[0], p[1], R, C, c->H, T, c->N);
    case OP_ADD_TABLE:
        return k->add_table(k, p[0], p[1], R, T, C);
    case OP_TIMESTEP:
        return k->timestep_embed(k, p[0], p[1], R, C);
    case OP_CONDITION:
        return k->condition(k, p[0], p[1], p[2], p[3], R, C, p[4]);
    case OP_NORM:
        return k->norm_modulate(k, p[0], p[1], mod, mod + C, 3 * C, R, T, C, 1e-6f, p[4], p[5]);
    case OP_GATE_NORM:
        return k->gate_norm(k, c->N ? NULL : p[0], p[1], p[2], mod, mod + C, mod + 2 * C, 3 * C, R, T, C, 1e-6f, p[4], p[5]);
    case OP_ATTENTION:
        return k->attention(k, p[0], p[1], R, T, c->H, C / c->H, p[2]);
    case OP_SET_TOKEN:
        return k->set_token(k, p[0], KERN_F32, p[1], R, T, C, c->N);
    case OP_CROSS:
        return k->cross_attention(k, p[0], p[1], (const float *)p[2] + 2 * C, 4 * C, R, T, c->N, c->H, C / c->H);
    case OP_GATHER:
        return k->gather(k, p[0], p[1], (size_t)C, o->desc, R);
    case OP_ROW_UPDATE:
        return k->row_update(k, p[0], n, n / (size_t)C, p[1], 2 * n, NULL, o->desc, R);
    case OP_ROW_NORM:
        return k->row_norm(k, o->norms, p[0], (size_t)C, o->desc, R);
    case OP_NET:
        return k->rows(k, R, T, net_rows, o);
    default:
        return train_run(o);
    }
}

double op_flops(const struct op_case *c, int R) {
    double T = c->T, C = c->C, N = c->N;
    if (c->op == OP_LINEAR || c->op == OP_VECTORS) return 2 * R * T * C * N;
    if (c->op == OP_ATTENTION) return 4 * R * T * T * C;
    if (c->op == OP_NET) return R * c->depth * (2 * T * C * (4 * C + 2 * N) + 4 * T * T * C);
    return train_flops(c, R);
}

double op_bytes_moved(const struct op_case *c, int R) {
    double T = c->T, C = c->C, es = (double)kern_dtype_size(c->dtype);
    switch (c->op) {
    case OP_NORM:
        return R * T * C * (4 + es);
    case OP_GATE_NORM:
        return R * T * C * (8 + 2 * es);
    case OP_ADD_TABLE:
        return R * T * C * 8;
    case OP_PATCHIFY:
    case OP_UNPATCHIFY:
        return R * T * T * C * 8;
    case OP_ROW_UPDATE:
        return R * T * T * C * 4 * 7;
    case OP_GATHER:
        return R * C * 8;
    case OP_CONDITION:
        return R * C * 8;
    case OP_TIMESTEP:
        return R * C * 4;
    default:
        return train_bytes_moved(c, R);
    }
}
