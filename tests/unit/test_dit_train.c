// SPDX-License-Identifier: MIT
/*
 * A network that learns: its gradients against finite differences, and what they must not depend on. tests/golden holds recorded
 * gradients.
 */
#include "core/model/dit_train.h"

#include <math.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/model/dit.h"
#include "tests/test.h"

enum { ROWS = 5, MANY = 300 }; // many: several groups of rows in backward

static struct arch design(enum arch_block block) {
    return (struct arch){.input_size = 4,
                         .patch_size = 2,
                         .in_channels = 2,
                         .hidden_size = 16,
                         .depth = 3,
                         .num_heads = 2,
                         .num_classes = 3,
                         .mlp_ratio = 4,
                         .class_dropout = true,
                         .learn_sigma = true,
                         .block = block};
}

struct learner {
    struct kern *k;
    struct arch a;
    struct dit_train *net;
    size_t floats, numel; // of the flat array; of all rows' outputs
    float *w, *g, *dout, *out;
    int rows;
};

static float noise(size_t i) { return (float)((i * 2654435761u >> 7) % 20011) / 10005 - 1; }

static void open_rows(struct learner *l, const char *backend, int threads, enum arch_block block, enum dit_recompute recompute,
                      int rows) {
    struct kern_config config = {.backend = backend, .threads = threads};
    struct err e = {0};
    char why[256] = "";
    *l = (struct learner){.a = design(block), .rows = rows};
    if (kern_open(&l->k, &config, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s", why);
    CHECK_OK(dit_train_new(&l->net, l->k, &l->a, rows, recompute, &e), &e);
    l->floats = dit_train_floats(l->net);
    l->numel = (size_t)rows * 2 * 2 * 16;
    float **arrays[] = {&l->w, &l->g, &l->dout, &l->out};
    for (int i = 0; i < 4; i++) CHECK((*arrays[i] = mem_array(i < 2 ? l->floats : l->numel, sizeof(float))));
    const struct dit_param *p;
    for (int i = dit_train_params(l->net, &p) - 1; i >= 0; i--) // wide enough that every tensor matters
        for (size_t j = 0; j < p[i].count; j++)
            l->w[p[i].offset + j] = 0.2f * noise(p[i].offset + j) + (strstr(p[i].name, "norm") ? 1 : 0);
    for (size_t i = 0; i < l->numel; i++) l->dout[i] = noise(i + 999);
}

static void open_learner(struct learner *l, const char *backend, int threads, enum arch_block block,
                         enum dit_recompute recompute) {
    open_rows(l, backend, threads, block, recompute, ROWS);
}

static void close_learner(struct learner *l) {
    dit_train_free(l->net);
    kern_close(l->k);
    mem_free(l->w), mem_free(l->g), mem_free(l->dout), mem_free(l->out);
}

// Rows [first, first + n), with the weights of l->w.
static void forward(struct learner *l, int first, int n) {
    static const float times[ROWS] = {0.1f, 0.9f, 0.4f, 0, 1};
    static const int32_t labels[ROWS] = {0, 3, 2, 1, 2};
    struct err e = {0};
    float x[MANY * 32], t[MANY];
    int32_t y[MANY];
    for (size_t i = 0; i < sizeof x / sizeof *x; i++) x[i] = noise(i);
    for (int i = 0; i < MANY; i++) t[i] = times[i % ROWS], y[i] = labels[i % ROWS];
    CHECK(l->k->upload(l->k, dit_train_weights(l->net), l->w, l->floats * sizeof(float)) == 0);
    CHECK_OK(dit_train_refresh(l->net, &e), &e);
    CHECK(l->k->upload(l->k, dit_train_x(l->net), x + 32 * first, (size_t)n * 32 * sizeof(float)) == 0);
    CHECK_OK(dit_train_forward(l->net, n, t + first, y + first, &e), &e);
    CHECK(l->k->download(l->k, l->out, dit_train_out(l->net), (size_t)n * 64 * sizeof(float)) == 0);
}

static void backward(struct learner *l, int first, int n, bool add) {
    struct err e = {0};
    forward(l, first, n);
    CHECK(l->k->upload(l->k, dit_train_dout(l->net), l->dout + 64 * first, (size_t)n * 64 * sizeof(float)) == 0);
    CHECK_OK(dit_train_backward(l->net, n, add, &e), &e);
    CHECK(l->k->download(l->k, l->g, dit_train_grads(l->net), l->floats * sizeof(float)) == 0);
}

static double value(struct learner *l) {
    double sum = 0;
    forward(l, 0, ROWS);
    for (size_t i = 0; i < l->numel; i++) sum += (double)l->dout[i] * (double)l->out[i];
    return sum;
}

// Each tensor moved along a direction of its own.
static void differences(const char *backend, int threads) {
    for (int block = 0; block < BLOCK_COUNT; block++) {
        struct learner l;
        const struct dit_param *p;
        open_learner(&l, backend, threads, (enum arch_block)block, RECOMPUTE_NONE);
        backward(&l, 0, ROWS, false);
        int n = dit_train_params(l.net, &p);
        for (int i = 0; i < n; i++) {
            double along = 0, size = 0, step = 0.004, f[2];
            for (size_t j = p[i].offset; j < p[i].offset + p[i].count; j++) {
                along += (double)l.g[j] * (double)noise(3 * j), size += (double)(l.g[j] * l.g[j]);
            }
            for (int side = 0; side < 2; side++) {
                double move = side ? -step : step;
                for (size_t j = p[i].offset; j < p[i].offset + p[i].count; j++) l.w[j] += (float)move * noise(3 * j);
                f[side] = value(&l);
                for (size_t j = p[i].offset; j < p[i].offset + p[i].count; j++) l.w[j] -= (float)move * noise(3 * j);
            }
            double measured = (f[0] - f[1]) / (2 * step);
            if (!(fabs(measured - along) <= 0.005 * sqrt(size) + 1e-3))
                test_fail(__FILE__, __LINE__, "%s: %s %s: %g by differences, %g by backward", backend, arch_block_name(l.a.block),
                          p[i].name, measured, along);
        }
        close_learner(&l);
    }
}

TEST(dit_train_finite_differences) {
    differences("ref", 1);
    differences("cpu", 2);
}

static void same_gradients(const struct learner *a, const struct learner *b) {
    CHECK(memcmp(a->g, b->g, a->floats * sizeof(float)) == 0);
    CHECK(memcmp(a->out, b->out, a->numel * sizeof(float)) == 0);
}

TEST(dit_train_threads_and_recomputing_change_no_bit) {
    for (int block = 0; block < BLOCK_COUNT; block++) {
        struct learner one, other;
        open_learner(&one, "cpu", 1, (enum arch_block)block, RECOMPUTE_NONE);
        backward(&one, 0, ROWS, false);
        for (int how = 0; how < 3; how++) {
            open_learner(&other, "cpu", how == 1 ? 1 : how + 2, (enum arch_block)block, how ? RECOMPUTE_BLOCK : RECOMPUTE_NONE);
            backward(&other, 0, ROWS, false);
            same_gradients(&one, &other);
            CHECK(how == 0 || dit_train_bytes(other.net) < dit_train_bytes(one.net));
            close_learner(&other);
        }
        close_learner(&one);
    }
}

// What a larger batch left in the buffers does not count in a smaller one.
static double apart(const struct learner *a, const struct learner *b) {
    double diff = 0, size = 0;
    for (size_t i = 0; i < a->floats; i++) {
        double d = (double)a->g[i] - (double)b->g[i];
        diff += d * d, size += (double)a->g[i] * (double)a->g[i];
    }
    return size > 0 ? sqrt(diff / size) : 1;
}

// Groups depend on the number of threads; what comes out does not, and is what the reference makes of all rows at once
TEST(dit_train_groups_of_rows_change_no_bit) {
    for (int block = 0; block < BLOCK_COUNT; block++) {
        struct learner l[3];
        for (int i = 0; i < 3; i++) {
            open_rows(&l[i], i ? "cpu" : "ref", i == 2 ? 4 : 1, (enum arch_block)block, i == 2 ? RECOMPUTE_BLOCK : RECOMPUTE_NONE,
                      MANY);
            backward(&l[i], 0, MANY, false);
        }
        same_gradients(&l[1], &l[2]);
        double off = apart(&l[0], &l[1]);
        if (!(off <= 3e-6)) test_fail(__FILE__, __LINE__, "%s: off by %g", arch_block_name(l->a.block), off);
        for (int i = 0; i < 3; i++) close_learner(&l[i]);
    }
}

TEST(dit_train_gradients_add_up) {
    for (int block = 0; block < BLOCK_COUNT; block++) {
        struct learner whole, parts;
        open_learner(&whole, "cpu", 2, (enum arch_block)block, RECOMPUTE_NONE);
        open_learner(&parts, "cpu", 2, (enum arch_block)block, RECOMPUTE_NONE);
        backward(&whole, 0, ROWS, false);
        backward(&parts, 0, ROWS, false);
        backward(&parts, 0, 3, false); // nor does what is in the gradients
        backward(&parts, 3, 2, true);
        double off = apart(&whole, &parts);
        if (!(off <= 1e-6)) test_fail(__FILE__, __LINE__, "%s: off by %g", arch_block_name(whole.a.block), off);
        close_learner(&whole), close_learner(&parts);
    }
}

struct ranges {
    char *told; // a byte a float
    size_t floats;
    int n;
};
static void on_grads(void *ctx, size_t offset, size_t count) {
    struct ranges *r = ctx;
    CHECK(count > 0 && offset + count <= r->floats);
    for (size_t i = offset; i < offset + count; i++) CHECK(r->told[i]++ == 0);
    if (r->n++ == 0) CHECK(offset + count == r->floats);
}

TEST(dit_train_gradients_are_told_once_from_the_end_on) {
    for (int block = 0; block < BLOCK_COUNT; block++) {
        struct learner l;
        open_learner(&l, "ref", 1, (enum arch_block)block, RECOMPUTE_NONE);
        struct ranges r = {.told = mem_array(l.floats, 1), .floats = l.floats};
        bool modulated = block == BLOCK_ADALN || block == BLOCK_ADALN_ZERO;
        CHECK(r.told != NULL);
        dit_train_on_grads(l.net, on_grads, &r);
        backward(&l, 0, 1, false);
        CHECK(r.n == (modulated ? 2 * (l.a.depth + 1) + 2 : l.a.depth + 2));
        for (size_t i = 0; i < l.floats; i++) CHECK(r.told[i] == 1);
        mem_free(r.told);
        close_learner(&l);
    }
}

/* ---- values ---- */

TEST(dit_train_begins_as_the_authors_do) {
    for (int block = 0; block < BLOCK_COUNT; block++) {
        struct learner l;
        const struct dit_param *p;
        open_learner(&l, "ref", 1, (enum arch_block)block, RECOMPUTE_NONE);
        dit_train_init(l.net, l.w, 3);
        memcpy(l.g, l.w, l.floats * sizeof(float));
        dit_train_init(l.net, l.w, 3);
        CHECK(memcmp(l.g, l.w, l.floats * sizeof(float)) == 0);
        dit_train_init(l.net, l.g, 4);
        CHECK(memcmp(l.g, l.w, l.floats * sizeof(float)) != 0);
        for (int i = dit_train_params(l.net, &p) - 1; i >= 0; i--) {
            double squares = 0, bound = sqrt(6.0 / 64); // of qkv [48, 16]
            for (size_t j = p[i].offset; j < p[i].offset + p[i].count; j++) squares += (double)l.w[j] * (double)l.w[j];
            double spread = sqrt(squares / (double)p[i].count);
            if (strcmp(p[i].name, "blocks.1.attn.qkv.weight") == 0) CHECK_NEAR(spread, bound / sqrt(3), 0.05 * bound);
            if (strcmp(p[i].name, "t_embedder.mlp.0.weight") == 0) CHECK_NEAR(spread, 0.02, 0.001);
            if (strcmp(p[i].name, "blocks.1.norm1.weight") == 0) CHECK_NEAR(spread, 1, 0);
            if (strcmp(p[i].name, "blocks.1.adaLN_modulation.1.weight") == 0) CHECK((spread == 0) == (block == BLOCK_ADALN_ZERO));
        }
        forward(&l, 0, ROWS);
        for (size_t i = 0; i < l.numel; i++) CHECK(l.out[i] == 0);
        close_learner(&l);
    }
}

// Out as a table and back; and the network that samples says the same with it.
TEST(dit_train_tables_go_both_ways) {
    for (int block = 0; block < BLOCK_COUNT; block++) {
        struct learner l;
        struct tensor_table table;
        struct dit *m;
        struct err e = {0};
        float again[ROWS * 64];
        open_learner(&l, "ref", 1, (enum arch_block)block, RECOMPUTE_NONE);
        CHECK_OK(dit_train_export(l.net, &table, l.w, &e), &e);
        CHECK_OK(arch_match(&l.a, &table, &e), &e);
        CHECK_OK(dit_train_import(l.net, l.g, &table, &e), &e);
        CHECK(memcmp(l.g, l.w, l.floats * sizeof(float)) == 0);
        forward(&l, 0, ROWS);
        CHECK_OK(dit_new(&m, l.k, &l.a, &table, 4, ROWS, &e), &e);
        CHECK(l.k->copy(l.k, dit_x(m), dit_train_x(l.net), ROWS * 32 * sizeof(float)) == 0);
        CHECK_OK(dit_forward(m, ROWS, (const float[]){0.1f, 0.9f, 0.4f, 0, 1}, (const int32_t[]){0, 3, 2, 1, 2}, &e), &e);
        CHECK(l.k->download(l.k, again, dit_out(m), sizeof again) == 0);
        CHECK(memcmp(again, l.out, sizeof again) == 0);
        table.n--;
        CHECK(dit_train_import(l.net, l.g, &table, &e) == E_CONFLICT);
        mem_free(table.tensors);
        dit_free(m);
        close_learner(&l);
    }
}

TEST(dit_train_refuses_what_cannot_learn) {
    struct kern_config config = {.backend = "ref"};
    struct kern *k;
    CHECK(kern_open(&k, &config, NULL, 0) == 0);
    for (int i = 0; i < 5; i++) {
        static const char *const culprits[] = {"decoder", "block_embedders", "compat", "time", "architecture.depth"};
        struct arch a = design(BLOCK_ADALN_ZERO);
        struct dit_train *t;
        struct err e = {0};
        if (i == 0) a.decoder.hidden_size = 16, a.decoder.depth = 1, a.decoder.num_heads = 2;
        if (i == 1) a.block_embedders = true;
        if (i == 2) a.diffusers = true;
        if (i == 3) a.reversed = true;
        if (i == 4) a.depth = 0;
        CHECK(dit_train_new(&t, k, &a, 1, RECOMPUTE_NONE, &e) != OK && !t);
        CHECK_STR(e.param, culprits[i]);
    }
    kern_close(k);
}

TEST(dit_train_survives_no_memory) {
    struct kern_config config = {.backend = "ref"};
    struct kern *k;
    CHECK(kern_open(&k, &config, NULL, 0) == 0);
    for (int i = 1; i < 10000; i++) {
        struct arch a = design(BLOCK_CROSS_ATTENTION);
        struct dit_train *t;
        struct err e = {0};
        fault_arm(FAULT_ALLOC, i, false);
        int rc = dit_train_new(&t, k, &a, 2, RECOMPUTE_NONE, &e);
        fault_disarm();
        dit_train_free(t);
        if (rc == OK) return kern_close(k);
        CHECK(rc == E_NOMEM);
    }
    test_fail(__FILE__, __LINE__, "still failing");
}
