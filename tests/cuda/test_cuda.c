// SPDX-License-Identifier: MIT
// The CUDA back end: the op case list against the reference, rows against themselves in other company, what a table cannot say.
// Needs a GPU.
#include <math.h>

#include "kernels/backend.h"
#include "tests/ops/cases.h"
#include "tests/test.h"

static struct kern *open_kern(const char *backend, enum kern_dtype act) {
    struct kern *k;
    char why[256] = "";
    struct kern_config cfg = {.backend = backend, .act = act, .exact_stream = true}; // the case list's residual stream is float32
    if (kern_open(&k, &cfg, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s: %s", backend, why);
    return k;
}

static void opened(struct op_run *o, struct kern *k, const struct op_case *c, int R, const int *id) {
    if (op_open(o, k, c, R, id)) test_fail(__FILE__, __LINE__, "%s: open: %s", c->name, k->why);
    if (op_run(o)) test_fail(__FILE__, __LINE__, "%s: run: %s", c->name, k->why);
}

/* ---- against the reference ---- */

// Relative L2 distance over the rows that count; NaN if either side holds one
static double distance(const struct op_run *o, int i, const void *a, const void *b) {
    enum kern_dtype t = o->b[i].act ? o->k->act : KERN_F32;
    double num = 0, den = 0;
    for (size_t e = 0; e < (size_t)(o->b[i].shared ? 1 : o->R) * o->b[i].row; e++) {
        double x = (double)kern_load(t, a, e), y = (double)kern_load(t, b, e);
        num += (x - y) * (x - y);
        den += y * y;
    }
    return num == 0 ? 0 : sqrt(num / den);
}

static int compare_case(const struct op_case *c, struct kern *cuda, struct kern *ref, int R) {
    struct op_run a, b;
    int failed = 0;
    opened(&a, cuda, c, R, NULL);
    opened(&b, ref, c, R, NULL);
    for (int i = 0; i < a.n; i++) {
        if (!a.b[i].out) continue;
        void *x = malloc(a.b[i].bytes), *y = malloc(a.b[i].bytes);
        CHECK(op_read(&a, i, x) == 0);
        CHECK(op_read(&b, i, y) == 0);
        double d = distance(&a, i, x, y);
        if (!(d <= c->tol))
            failed++, printf("    %s (T %d, C %d, N %d, H %d): buffer %d is off by %.3g, allowed %.3g\n", c->name, c->T, c->C,
                             c->N, c->H, i, d, c->tol);
        free(x);
        free(y);
    }
    for (int r = 0; c->op == OP_ROW_NORM && r < R; r++) CHECK_NEAR(a.norms[r] / b.norms[r], 1, c->tol);
    op_close(&a);
    op_close(&b);
    return failed;
}

// float16 runs bfloat16's cases but training's, eight times closer
static bool case_for(struct op_case *c, int i, enum kern_dtype act) {
    *c = op_cases[i];
    if (act == KERN_F16 && c->dtype == KERN_BF16 && c->op < OP_LINEAR_BACKWARD) c->dtype = KERN_F16, c->tol /= 8;
    bool odd = c->op == OP_NORM_BACKWARD && c->C % 4 && c->C > 512; // refused: a network's width is heads times a multiple of 8
    return c->dtype == act && !odd;
}

static void compare_all(enum kern_dtype act) {
    struct kern *cuda = open_kern("cuda", act), *ref = open_kern("ref", act);
    struct op_case c;
    int failed = 0;
    for (int i = 0; i < op_cases_n; i++)
        if (case_for(&c, i, act) && op_flops(&c, 1) < 3e8) failed += compare_case(&c, cuda, ref, op_flops(&c, 1) > 1e8 ? 1 : 3);
    kern_close(cuda);
    kern_close(ref);
    CHECK(failed == 0);
}

TEST_LIMIT(cuda_f32_matches_the_reference, 180) { compare_all(KERN_F32); }
TEST_LIMIT(cuda_bf16_matches_the_reference, 180) { compare_all(KERN_BF16); }
TEST_LIMIT(cuda_f16_matches_the_reference, 180) { compare_all(KERN_F16); }

// Every head dimension, with a last block of keys that is not full
TEST_LIMIT(cuda_attention_of_every_head_dimension, 120) {
    for (int t = 0; t < 3; t++) {
        static const enum kern_dtype acts[] = {KERN_F32, KERN_BF16, KERN_F16};
        enum kern_dtype act = acts[t];
        struct kern *cuda = open_kern("cuda", act), *ref = open_kern("ref", act);
        int failed = 0;
        for (int d = 8; d <= 128; d += 8) {
            struct op_case c = {.name = "attention",
                                .op = OP_ATTENTION,
                                .dtype = act,
                                .T = 70 + d,
                                .C = 2 * d,
                                .H = 2,
                                .tol = act == KERN_F32    ? 2e-6
                                       : act == KERN_BF16 ? 4e-3
                                                          : 5e-4,
                                .save = true};
            failed += compare_case(&c, cuda, ref, 2);
        }
        kern_close(cuda);
        kern_close(ref);
        CHECK(failed == 0);
    }
}

/* ---- attention into e4m3 ---- */

static float from_e4m3(uint8_t b) {
    float v = b & 0x78 ? ldexpf((float)(8 + (b & 7)), (b >> 3 & 15) - 10) : ldexpf((float)(b & 7), -9);
    return b & 0x80 ? -v : v;
}

static int attention_fp8_case(struct kern *k, int R, int T, int H, int D) {
    const size_t C = (size_t)(H * D), n = (size_t)(R * T) * C;
    const float scale = 0x1p-9f, most = 448 * scale; // of a layer that nothing was seen by
    struct kern_linear *reader;
    void *qkv, *o, *o8;
    float *w = calloc(C * C, sizeof *w);
    uint16_t *host = malloc(3 * n * sizeof *host);
    uint8_t *got = malloc(n);
    uint32_t s = 1;
    int off = 0;
    for (size_t i = 0; i < 3 * n; i++) { // some queries see one key nearly alone, so that some results are beyond `most`
        float v = 0x1p-31f * (float)(int32_t)(s = s * 1664525u + 1013904223u);
        host[i] = kern_f32_to_bf16(i % (3 * C) < C && i / (3 * C) % 3 == 0 ? 30 * v : v);
    }
    w[0] = 1;
    CHECK(k->linear_new(k, &(struct kern_linear_spec){.out = (int)C, .in = (int)C, .unit = T, .x_fp8 = true}, w, NULL, &reader) == 0);
    CHECK(k->alloc(k, 6 * n, &qkv) == 0 && k->alloc(k, 2 * n, &o) == 0 && k->alloc(k, n, &o8) == 0);
    CHECK(k->upload(k, qkv, host, 6 * n) == 0 && k->attention(k, o, qkv, R, T, H, D, NULL) == 0);
    int rc = k->attention_fp8(k, o8, qkv, R, T, H, D, reader);
    if (rc) test_fail(__FILE__, __LINE__, "%d rows of %d, %d heads of %d: %s", R, T, H, D, k->why);
    CHECK(k->download(k, host, o, 2 * n) == 0 && k->download(k, got, o8, n) == 0);
    for (size_t i = 0; i < n; i++) { // half a unit of e4m3's last place, and bfloat16's rounding
        float want = fminf(fmaxf(kern_load(KERN_BF16, host, i), -most), most), is = scale * from_e4m3(got[i]);
        if (fabsf(is - want) <= fabsf(want) * (0x1p-4f + 0x1p-8f) + scale * 0x1p-10f) continue;
        if (off++ < 3) printf("    %d rows of %d, %d heads of %d: number %zu is %g, attention's is %g\n", R, T, H, D, i, (double)is, (double)want);
    }
    k->linear_free(k, reader);
    k->free(k, qkv), k->free(k, o), k->free(k, o8);
    free(w), free(host), free(got);
    return off;
}

TEST_LIMIT(cuda_attention_in_fp8_is_attention_rounded, 120) {
    struct kern *k;
    char why[256];
    int off = 0;
    if (kern_open(&k, &(struct kern_config){.backend = "cuda", .act = KERN_BF16, .product = KERN_PRODUCT_FP8_STATIC}, why, sizeof why)) {
        if (!strstr(why, "Hopper")) test_fail(__FILE__, __LINE__, "%s", why);
        return; // no such products on this card
    }
    static const int cases[][4] = {{8, 256, 16, 72}, {9, 200, 16, 64}, {2, 300, 16, 72}, {1, 64, 2, 64}, {2, 70, 2, 64}, {5, 1024, 16, 72}, {3, 1000, 16, 64}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) off += attention_fp8_case(k, cases[i][0], cases[i][1], cases[i][2], cases[i][3]);
    CHECK(k->attention_fp8(k, NULL, NULL, 0, 256, 16, 72, NULL) == 0 && k->attention_fp8(k, NULL, NULL, 0, 256, 12, 80, NULL) == KERN_EUNSUPPORTED);
    kern_close(k);
    CHECK(off == 0);
}

/* ---- bits ---- */

// Rows `id` computed together equal the rows of those numbers in `bytes` (ids 0, 1, 2 ...)
static int same_rows(struct op_run *got, const struct op_run *all, void **bytes, const int *id) {
    int differ = 0;
    for (int i = 0; i < got->n; i++) {
        const struct op_buffer *b = &got->b[i];
        if (!b->out || b->shared) continue;
        char *x = malloc(b->bytes);
        size_t row = b->row * b->size;
        CHECK(op_read(got, i, x) == 0);
        for (int r = 0; r < got->R; r++) differ += memcmp(x + (size_t)r * row, (char *)bytes[i] + (size_t)id[r] * row, row) != 0;
        free(x);
    }
    for (int r = 0; got->c->op == OP_ROW_NORM && r < got->R; r++)
        differ += memcmp(&got->norms[r], &all->norms[id[r]], sizeof(double)) != 0;
    if (differ)
        printf("    %s (T %d, C %d, N %d, H %d): %d of %d rows have other bits\n", got->c->name, got->c->T, got->c->C, got->c->N,
               got->c->H, differ, got->R);
    return differ;
}

static int case_bits(const struct op_case *c, struct kern *k, int most, const int *counts) {
    struct op_run all, some;
    void *bytes[OP_BUFFERS] = {0};
    int order[64], failed = 0;
    opened(&all, k, c, most, NULL);
    for (int i = 0; i < all.n; i++)
        if (all.b[i].out) CHECK(op_read(&all, i, bytes[i] = malloc(all.b[i].bytes)) == 0);
    for (; *counts; counts++) {
        for (int r = 0; r < *counts; r++) order[r] = (r * 5 + *counts) % most;
        opened(&some, k, c, *counts, order);
        failed += same_rows(&some, &all, bytes, order);
        op_close(&some);
    }
    for (int i = 0; i < OP_BUFFERS; i++) free(bytes[i]);
    op_close(&all);
    return failed;
}

// Not of the products of a training step: a step has one number of rows, for which they are chosen (product.cu)
static void all_bits(enum kern_dtype act) {
    static const int few[] = {1, 2, 8, 9, 16, 0};
    struct kern *k = open_kern("cuda", act);
    struct op_case c;
    int failed = 0;
    for (int i = 0; i < op_cases_n; i++)
        if (case_for(&c, i, act) && op_flops(&c, 1) < 6e7 && c.op != OP_LINEAR_BACKWARD && c.op != OP_VECTORS_BACKWARD)
            failed += case_bits(&c, k, 17, few);
    kern_close(k);
    CHECK(failed == 0);
}

TEST_LIMIT(cuda_f32_rows_do_not_depend_on_company, 180) { all_bits(KERN_F32); }
TEST_LIMIT(cuda_bf16_rows_do_not_depend_on_company, 180) { all_bits(KERN_BF16); }
TEST_LIMIT(cuda_f16_rows_do_not_depend_on_company, 180) { all_bits(KERN_F16); }

// The sizes that serve: 1 to 64 rows of XL/2 through one block, and its modulation
TEST_LIMIT(cuda_bf16_rows_of_XL_do_not_depend_on_company, 300) {
    static const int counts[] = {1, 2, 3, 5, 8, 13, 16, 31, 48, 63, 0};
    static const struct op_case cases[] = {
        {.name = "block of XL", .op = OP_NET, .dtype = KERN_BF16, .T = 256, .C = 1152, .N = 4608, .H = 16, .depth = 1},
        {.name = "block of B", .op = OP_NET, .dtype = KERN_BF16, .T = 256, .C = 768, .N = 3072, .H = 12, .depth = 1},
        {.name = "modulation of XL",
         .op = OP_VECTORS,
         .dtype = KERN_BF16,
         .T = 1,
         .C = 1152,
         .N = 13824,
         .x_f32 = true,
         .y_f32 = true},
        {.name = "last layer", .op = OP_LINEAR, .dtype = KERN_BF16, .T = 256, .C = 1152, .N = 32, .y_f32 = true},
    };
    struct kern *k = open_kern("cuda", KERN_BF16);
    int failed = 0;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) failed += case_bits(&cases[i], k, 64, counts);
    kern_close(k);
    CHECK(failed == 0);
}

/* ---- the residual stream in float16 ---- */

struct halves {
    void *x, *h, *mod, *y, *table;
    int R, T, C;
};

// Residual stream, branch, modulation and table of R rows, as far as possible the same numbers on every back end
static void halves_open(struct halves *s, struct kern *k, int R, int T, int C, int first_row) {
    size_t n = (size_t)R * (size_t)T * (size_t)C, m = (size_t)R * 3 * (size_t)C, period = (size_t)T * (size_t)C;
    bool half = k->stream == KERN_F16;
    *s = (struct halves){.R = R, .T = T, .C = C};
    CHECK(!k->alloc(k, n * 4, &s->x) && !k->alloc(k, n * 2, &s->h) && !k->alloc(k, m * 4, &s->mod) &&
          !k->alloc(k, n * 2, &s->y) && !k->alloc(k, period * 4, &s->table));
    float *x = malloc(n * 4), *mod = malloc(m * 4), *table = malloc(period * 4);
    uint16_t *xh = malloc(n * 2), *h = malloc(n * 2);
    for (size_t i = 0; i < n; i++) {
        uint32_t e = (uint32_t)(i + (size_t)first_row * period);
        xh[i] = (uint16_t)(0x3800 | (e * 2654435761u >> 22) | (e * 40503u & 0x8000)); // +-[0.5, 2)
        x[i] = kern_f16_to_f32(xh[i]);
        h[i] = kern_f32_to_bf16((float)(int32_t)(e * 2246822519u) * 0x1p-31f);
    }
    for (size_t i = 0; i < m; i++)
        mod[i] = (float)(int32_t)((uint32_t)(i + (size_t)first_row * 3 * (size_t)C) * 3266489917u) * 0x1p-31f;
    for (size_t i = 0; i < period; i++) table[i] = (float)(int32_t)((uint32_t)i * 668265263u) * 0x1p-31f;
    CHECK(!k->upload(k, s->x, half ? (void *)xh : (void *)x, n * (half ? 2 : 4)) && !k->upload(k, s->h, h, n * 2) &&
          !k->upload(k, s->mod, mod, m * 4));
    CHECK(!k->upload(k, s->table, table, period * 4));
    free(x), free(mod), free(table), free(xh), free(h);
    const float *v = s->mod;
    CHECK(!k->add_table(k, s->x, s->table, R, T, C));
    CHECK(!k->norm_modulate(k, s->y, s->x, v, v + C, 3 * C, R, T, C, 1e-6f, NULL, NULL));
    CHECK(!k->gate_norm(k, s->y, s->x, s->h, v, v + C, v + 2 * C, 3 * C, R, T, C, 1e-6f, NULL, NULL));
}

static void halves_read(struct halves *s, struct kern *k, float *x, float *y) {
    size_t n = (size_t)s->R * (size_t)s->T * (size_t)s->C;
    void *raw = malloc(n * 4);
    CHECK(!k->download(k, raw, s->x, n * kern_dtype_size(k->stream)));
    for (size_t i = 0; i < n; i++) x[i] = kern_load(k->stream, raw, i);
    CHECK(!k->download(k, raw, s->y, n * 2));
    for (size_t i = 0; i < n; i++) y[i] = kern_load(KERN_BF16, raw, i);
    free(raw);
    void *buffers[] = {s->x, s->h, s->mod, s->y, s->table};
    for (int i = 0; i < 5; i++) k->free(k, buffers[i]);
}

static double relative(const float *a, const float *b, size_t n) {
    double num = 0, den = 0;
    for (size_t i = 0; i < n; i++)
        num += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]), den += (double)b[i] * (double)b[i];
    return sqrt(num / den);
}

TEST(cuda_float16_stream_matches_the_reference_and_keeps_its_bits) {
    static const int widths[] = {40, 192, 768, 1152};
    struct kern *cuda, *ref = open_kern("ref", KERN_BF16);
    char why[256];
    CHECK(kern_open(&cuda, &(struct kern_config){.backend = "cuda", .act = KERN_BF16}, why, sizeof why) == 0 &&
          cuda->stream == KERN_F16);
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
        enum { R = 9, T = 17 };
        size_t row = (size_t)T * (size_t)widths[w], n = R * row;
        float *x = malloc(4 * n), *y = malloc(4 * n), *want_x = malloc(4 * n), *want_y = malloc(4 * n);
        struct halves s;
        halves_open(&s, cuda, R, T, widths[w], 0), halves_read(&s, cuda, x, y);
        halves_open(&s, ref, R, T, widths[w], 0), halves_read(&s, ref, want_x, want_y);
        CHECK_NEAR(relative(x, want_x, n), 0, 4e-4);
        CHECK_NEAR(relative(y, want_y, n), 0, 4e-3);
        halves_open(&s, cuda, 2, T, widths[w], 5), halves_read(&s, cuda, want_x, want_y); // rows 5 and 6 again, alone
        CHECK(memcmp(x + 5 * row, want_x, 2 * row * 4) == 0 && memcmp(y + 5 * row, want_y, 2 * row * 4) == 0);
        free(x), free(y), free(want_x), free(want_y);
    }
    kern_close(cuda);
    kern_close(ref);
}

// 60000 + gate*h in `many` places of one token, all else small
static uint64_t beyond_float16(int C, int many) {
    enum { T = 5 };
    struct kern *k;
    char why[256];
    size_t n = (size_t)T * (size_t)C;
    uint16_t *x = calloc(n, 2), *h = calloc(n, 2);
    float *gate = malloc((size_t)C * 4);
    void *dx, *dh, *dg, *dy;
    CHECK(kern_open(&k, &(struct kern_config){.backend = "cuda", .act = KERN_BF16}, why, sizeof why) == 0 && k->overflows(k) == 0);
    for (int i = 0; i < C; i++) gate[i] = 1;
    for (int i = 0; i < many; i++) x[2 * C + i] = kern_f32_to_f16(i % 2 ? -60000 : 60000), h[2 * C + i] = kern_f32_to_bf16(i % 2 ? -6000 : 6000);
    CHECK(!k->alloc(k, n * 2, &dx) && !k->alloc(k, n * 2, &dh) && !k->alloc(k, n * 2, &dy) && !k->alloc(k, (size_t)C * 4, &dg));
    CHECK(!k->upload(k, dx, x, n * 2) && !k->upload(k, dh, h, n * 2) && !k->upload(k, dg, gate, (size_t)C * 4));
    CHECK(!k->gate_norm(k, dy, dx, dh, dg, dg, dg, 0, 1, T, C, 1e-6f, NULL, NULL) && !k->download(k, x, dx, n * 2));
    uint64_t found = k->overflows(k);
    k->free(k, dx), k->free(k, dh), k->free(k, dy), k->free(k, dg);
    kern_close(k);
    free(x), free(h), free(gate);
    return found;
}

TEST(cuda_numbers_beyond_float16_are_counted) {
    static const int widths[] = {40, 128, 192, 1152};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        CHECK(beyond_float16(widths[i], 3) == 3);
        CHECK(beyond_float16(widths[i], 0) == 0);
    }
}

/* ---- what a table of cases cannot say ---- */

TEST(cuda_uploads_arrive_in_order_when_the_ring_turns) {
    struct kern *k = open_kern("cuda", KERN_F32);
    enum { N = 20000, TIMES = 200 }; // 16 MB through a ring of 4
    void *p;
    float *host = malloc(N * 4), *got = malloc(N * 4);
    CHECK(k->alloc(k, (size_t)TIMES * N * 4, &p) == 0);
    CHECK(k->download(k, got, p, N * 4) == 0);
    for (int i = 0; i < N; i++) CHECK(got[i] == 0);
    for (int t = 0; t < TIMES; t++) {
        for (int i = 0; i < N; i++) host[i] = (float)(t * N + i);
        CHECK(k->upload(k, (float *)p + (size_t)t * N, host, N * 4) == 0);
    }
    for (int t = 0; t < TIMES; t++) {
        CHECK(k->download(k, got, (float *)p + (size_t)t * N, N * 4) == 0);
        for (int i = 0; i < N; i++) CHECK(got[i] == (float)(t * N + i));
    }
    float *all = malloc((size_t)TIMES * N * 4), *back = malloc((size_t)TIMES * N * 4); // and in one call, with an odd number of bytes
    for (int i = 0; i < TIMES * N; i++) all[i] = (float)(i ^ 5);
    CHECK(k->upload(k, p, all, (size_t)TIMES * N * 4 - 3) == 0 && k->download(k, back, p, (size_t)TIMES * N * 4) == 0);
    CHECK(memcmp(all, back, (size_t)TIMES * N * 4 - 3) == 0);
    k->free(k, p);
    free(host), free(got), free(all), free(back);
    kern_close(k);
}

// Weights in pieces, some larger than the ring's half, make the layer that they make as one.
TEST(cuda_linear_of_pieces_is_that_of_the_whole) {
    enum { IN = 1152, UNIT = 8 };
    static const int out[] = {1, 1000, 7, 600};
    const int total = 1608;
    struct kern *k = open_kern("cuda", KERN_BF16);
    float *w = malloc((size_t)total * IN * 4), *x = malloc(UNIT * IN * 4), *b = malloc((size_t)total * 4);
    float *y[2] = {malloc((size_t)UNIT * total * 4), malloc((size_t)UNIT * total * 4)};
    const void *piece[4];
    size_t count[4], at = 0;
    void *dx, *dy;
    for (int i = 0; i < total * IN; i++) w[i] = (float)(int32_t)((uint32_t)i * 2654435761u) * 0x1p-34f;
    for (int i = 0; i < UNIT * IN; i++) x[i] = (float)(i % 37 - 18) / 16;
    for (int i = 0; i < total; i++) b[i] = (float)i;
    for (int i = 0; i < 4; at += count[i++]) piece[i] = w + at, count[i] = (size_t)out[i] * IN;
    CHECK(k->alloc(k, UNIT * IN * 4, &dx) == 0 && k->alloc(k, (size_t)UNIT * total * 4, &dy) == 0 && k->upload(k, dx, x, UNIT * IN * 4) == 0);
    struct kern_linear_spec s = {.out = total, .in = IN, .unit = UNIT, .x_f32 = true, .y_f32 = true};
    for (int i = 0; i < 2; i++) {
        struct kern_linear *l;
        CHECK((i ? k->linear_new_pieces(k, &s, piece, count, 4, b, &l) : k->linear_new(k, &s, w, b, &l)) == 0);
        CHECK(k->linear(k, l, dy, dx, 1, NULL) == 0 && k->download(k, y[i], dy, (size_t)UNIT * total * 4) == 0);
        k->linear_free(k, l);
    }
    CHECK(memcmp(y[0], y[1], (size_t)UNIT * total * 4) == 0 && y[0][total - 1] != 0);
    k->free(k, dx), k->free(k, dy);
    free(w), free(x), free(b), free(y[0]), free(y[1]);
    kern_close(k);
}

TEST(cuda_graphs_replay_what_was_recorded) {
    struct kern *k = open_kern("cuda", KERN_F32);
    struct kern_graph *g;
    void *x, *table;
    float host[64], got[64], one[64];
    CHECK(k->alloc(k, sizeof host, &x) == 0 && k->alloc(k, sizeof host, &table) == 0);
    for (int i = 0; i < 64; i++) host[i] = (float)i, one[i] = 1;
    CHECK(k->upload(k, x, host, sizeof host) == 0 && k->upload(k, table, one, sizeof one) == 0);
    CHECK(k->add_table(k, x, table, 1, 8, 8) == 0);
    CHECK(k->graph_begin(k) == 0);
    CHECK(k->upload(k, x, host, sizeof host) == KERN_EUNSUPPORTED); // not part of a graph; recording goes on
    CHECK(k->add_table(k, x, table, 1, 8, 8) == 0);
    CHECK(k->graph_end(k, &g) == 0 && g);
    for (int i = 0; i < 3; i++) CHECK(k->graph_launch(k, g) == 0);
    CHECK(k->download(k, got, x, sizeof got) == 0);
    for (int i = 0; i < 64; i++) CHECK(got[i] == (float)(i + 4));
    k->graph_free(k, g);
    k->free(k, x);
    k->free(k, table);
    kern_close(k);
}

TEST(cuda_refusals_say_why) {
    struct kern *k;
    char why[256];
    void *p;
    CHECK(kern_open(&k, &(struct kern_config){.backend = "cuda", .device = 99}, why, sizeof why) == KERN_EDEVICE && !k &&
          strstr(why, "99"));
    k = open_kern("cuda", KERN_BF16);
    struct kern_linear *l = (struct kern_linear *)k;
    CHECK(k->linear_new(k, &(struct kern_linear_spec){.out = 0, .in = 4, .unit = 1}, "", NULL, &l) == KERN_EUNSUPPORTED && !l);
    CHECK(k->attention(k, NULL, NULL, 1, 4, 1, 12, NULL) == KERN_EUNSUPPORTED && strstr(k->why, "12"));
    CHECK(k->alloc(k, SIZE_MAX - 5, &p) == KERN_ENOMEM && !p);
    CHECK(k->alloc(k, (size_t)1 << 45, &p) == KERN_ENOMEM && !p && strstr(k->why, "memory"));
    CHECK(k->alloc(k, 0, &p) == 0 && p); // and goes on working
    k->free(k, p);
    kern_close(k);
}

TEST(cuda_nan_is_never_lost) {
    struct kern *k = open_kern("cuda", KERN_BF16);
    struct op_case c = {.name = "attention", .op = OP_ATTENTION, .dtype = KERN_BF16, .T = 100, .C = 72, .H = 1};
    struct op_run o;
    uint16_t nan = 0x7fc0, got[100 * 72];
    CHECK(op_open(&o, k, &c, 1, NULL) == 0);
    CHECK(k->upload(k, (uint16_t *)o.b[1].p + 99 * 216 + 80, &nan, 2) == 0); // in a key
    CHECK(op_run(&o) == 0 && op_read(&o, 0, got) == 0);
    int found = 0;
    for (int i = 0; i < 100 * 72; i++) found += kern_bf16_to_f32(got[i]) != kern_bf16_to_f32(got[i]);
    CHECK(found == 100 * 72);
    op_close(&o);
    kern_close(k);
}
