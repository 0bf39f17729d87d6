// SPDX-License-Identifier: MIT
// The CUDA back end: the op case list against the reference, rows against themselves in other company, what a table cannot say. Needs a GPU.
#include <math.h>

#include "kernels/backend.h"
#include "tests/ops/cases.h"
#include "tests/test.h"

static struct kern *open_kern(const char *backend, enum kern_dtype act) {
    struct kern *k;
    char why[256] = "";
    struct kern_config cfg = {.backend = backend, .act = act};
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
    for (size_t e = 0; e < (size_t)o->R * o->b[i].row; e++) {
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
        if (!(d <= c->tol)) failed++, printf("    %s (T %d, C %d, N %d, H %d): buffer %d is off by %.3g, allowed %.3g\n", c->name, c->T, c->C, c->N, c->H, i, d, c->tol);
        free(x);
        free(y);
    }
    for (int r = 0; c->op == OP_ROW_NORM && r < R; r++) CHECK_NEAR(a.norms[r] / b.norms[r], 1, c->tol);
    op_close(&a);
    op_close(&b);
    return failed;
}

static void compare_all(enum kern_dtype act) {
    struct kern *cuda = open_kern("cuda", act), *ref = open_kern("ref", act);
    int failed = 0;
    for (int i = 0; i < op_cases_n; i++)
        if (op_cases[i].dtype == act && op_flops(&op_cases[i], 1) < 3e8) failed += compare_case(&op_cases[i], cuda, ref, op_flops(&op_cases[i], 1) > 1e8 ? 1 : 3);
    kern_close(cuda);
    kern_close(ref);
    CHECK(failed == 0);
}

TEST_LIMIT(cuda_f32_matches_the_reference, 180) { compare_all(KERN_F32); }
TEST_LIMIT(cuda_bf16_matches_the_reference, 180) { compare_all(KERN_BF16); }

// Every head dimension, with a last block of keys that is not full
TEST_LIMIT(cuda_attention_of_every_head_dimension, 120) {
    for (int t = 0; t < 2; t++) {
        enum kern_dtype act = t ? KERN_BF16 : KERN_F32;
        struct kern *cuda = open_kern("cuda", act), *ref = open_kern("ref", act);
        int failed = 0;
        for (int d = 8; d <= 128; d += 8) {
            struct op_case c = {.name = "attention", .op = OP_ATTENTION, .dtype = act, .T = 70 + d, .C = 2 * d, .H = 2, .tol = t ? 4e-3 : 2e-6, .save = true};
            failed += compare_case(&c, cuda, ref, 2);
        }
        kern_close(cuda);
        kern_close(ref);
        CHECK(failed == 0);
    }
}

/* ---- bits ---- */

// Rows `id` computed together equal the rows of those numbers in `bytes` (ids 0, 1, 2 ...)
static int same_rows(struct op_run *got, const struct op_run *all, void **bytes, const int *id) {
    int differ = 0;
    for (int i = 0; i < got->n; i++) {
        const struct op_buffer *b = &got->b[i];
        if (!b->out) continue;
        char *x = malloc(b->bytes);
        size_t row = b->row * b->size;
        CHECK(op_read(got, i, x) == 0);
        for (int r = 0; r < got->R; r++) differ += memcmp(x + (size_t)r * row, (char *)bytes[i] + (size_t)id[r] * row, row) != 0;
        free(x);
    }
    for (int r = 0; got->c->op == OP_ROW_NORM && r < got->R; r++) differ += memcmp(&got->norms[r], &all->norms[id[r]], sizeof(double)) != 0;
    if (differ) printf("    %s (T %d, C %d, N %d, H %d): %d of %d rows have other bits\n", got->c->name, got->c->T, got->c->C, got->c->N, got->c->H, differ, got->R);
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

static void all_bits(enum kern_dtype act) {
    static const int few[] = {1, 2, 8, 9, 16, 0};
    struct kern *k = open_kern("cuda", act);
    int failed = 0;
    for (int i = 0; i < op_cases_n; i++)
        if (op_cases[i].dtype == act && op_flops(&op_cases[i], 1) < 6e7) failed += case_bits(&op_cases[i], k, 17, few);
    kern_close(k);
    CHECK(failed == 0);
}

TEST_LIMIT(cuda_f32_rows_do_not_depend_on_company, 180) { all_bits(KERN_F32); }
TEST_LIMIT(cuda_bf16_rows_do_not_depend_on_company, 180) { all_bits(KERN_BF16); }

// The sizes that serve: 1 to 64 rows of XL/2 through one block, and its modulation
TEST_LIMIT(cuda_bf16_rows_of_XL_do_not_depend_on_company, 300) {
    static const int counts[] = {1, 2, 3, 5, 8, 13, 16, 31, 48, 63, 0};
    static const struct op_case cases[] = {
        {.name = "block of XL", .op = OP_NET, .dtype = KERN_BF16, .T = 256, .C = 1152, .N = 4608, .H = 16, .depth = 1},
        {.name = "block of B", .op = OP_NET, .dtype = KERN_BF16, .T = 256, .C = 768, .N = 3072, .H = 12, .depth = 1},
        {.name = "modulation of XL", .op = OP_VECTORS, .dtype = KERN_BF16, .T = 1, .C = 1152, .N = 13824, .x_f32 = true, .y_f32 = true},
        {.name = "last layer", .op = OP_LINEAR, .dtype = KERN_BF16, .T = 256, .C = 1152, .N = 32, .y_f32 = true},
    };
    struct kern *k = open_kern("cuda", KERN_BF16);
    int failed = 0;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) failed += case_bits(&cases[i], k, 64, counts);
    kern_close(k);
    CHECK(failed == 0);
}

/* ---- what a table of cases cannot say ---- */

TEST(cuda_uploads_arrive_in_order_when_the_ring_turns) {
    struct kern *k = open_kern("cuda", KERN_F32);
    enum { N = 20000, TIMES = 200 }; // 16 MB through a ring of 2
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
    k->free(k, p);
    free(host);
    free(got);
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
    CHECK(kern_open(&k, &(struct kern_config){.backend = "cuda", .device = 99}, why, sizeof why) == KERN_EDEVICE && !k && strstr(why, "99"));
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
