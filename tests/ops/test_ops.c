// SPDX-License-Identifier: MIT
// The cpu back end against the reference, and its rows against themselves in other company: every case, both instruction sets.
#include <dirent.h>
#include <malloc.h>
#include <math.h>
#include <sys/resource.h>
#include <unistd.h>

#include "kernels/backend.h"
#include "kernels/philox.h"
#include "tests/ops/cases.h"
#include "tests/test.h"

static struct kern *open_kern(const char *backend, enum kern_dtype act, int threads) {
    struct kern *k;
    char why[256] = "";
    struct kern_config cfg = {.backend = backend, .act = act, .threads = threads};
    if (kern_open(&k, &cfg, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s: %s", backend, why);
    return k;
}

static const char *label(const struct op_case *c) {
    static char text[128];
    snprintf(text, sizeof text, "%s (T %d, C %d, N %d, H %d)", c->name, c->T, c->C, c->N, c->H);
    return text;
}

static void opened(struct op_run *o, struct kern *k, const struct op_case *c, int R, const int *id) {
    if (op_open(o, k, c, R, id)) test_fail(__FILE__, __LINE__, "%s: open: %s", label(c), k->why);
    if (op_run(o)) test_fail(__FILE__, __LINE__, "%s: run: %s", label(c), k->why);
}

// Relative L2 distance over the rows that count
static double distance(const struct op_run *o, int i, const void *a, const void *b) {
    enum kern_dtype t = o->b[i].act ? o->k->act : KERN_F32;
    double num = 0, den = 0;
    for (size_t e = 0; e < (size_t)(o->b[i].shared ? 1 : o->R) * o->b[i].row; e++) {
        double x = (double)kern_load(t, a, e), y = (double)kern_load(t, b, e);
        num += (x - y) * (x - y);
        den += y * y;
    }
    return num == 0 ? 0 : sqrt(num / den); // NaN if either holds one
}

static void compare_case(const struct op_case *c, struct kern *cpu, struct kern *ref, int R) {
    struct op_run a, b;
    opened(&a, cpu, c, R, NULL);
    opened(&b, ref, c, R, NULL);
    for (int i = 0; i < a.n; i++) {
        if (!a.b[i].out) continue;
        void *x = malloc(a.b[i].bytes), *y = malloc(a.b[i].bytes);
        op_read(&a, i, x);
        op_read(&b, i, y);
        double d = distance(&a, i, x, y);
        if (!(d <= c->tol)) test_fail(__FILE__, __LINE__, "%s: buffer %d is off by %.3g, allowed %.3g", label(c), i, d, c->tol);
        bool unchanged = !a.b[i].shared && memcmp(x, a.b[i].host, (size_t)R * a.b[i].row * a.b[i].size) == 0;
        if (unchanged && i == 0 && !((c->op == OP_GATE_NORM || c->op == OP_GATE_NORM_BACKWARD) && c->N))
            test_fail(__FILE__, __LINE__, "%s: nothing was written", label(c));
        free(x);
        free(y);
    }
    if (c->op == OP_ROW_NORM)
        for (int r = 0; r < R; r++) CHECK_NEAR(a.norms[r] / b.norms[r], 1, c->tol);
    op_close(&a);
    op_close(&b);
}

static void compare_all(enum kern_dtype act, int threads) {
    struct kern *cpu = open_kern("cpu", act, threads), *ref = open_kern("ref", act, 0);
    for (int i = 0; i < op_cases_n; i++) {
        const struct op_case *c = &op_cases[i];
        bool heavy = op_flops(c, 1) > 1e8;
        if (c->dtype == act && !(heavy && !c->bench && c->T < 1024)) compare_case(c, cpu, ref, heavy ? 1 : 3);
    }
    kern_close(cpu);
    kern_close(ref);
}

TEST_LIMIT(ops_f32_match_the_reference, 180) { compare_all(KERN_F32, 2); }
TEST_LIMIT(ops_f32_match_the_reference_on_avx2, 180) {
    setenv("ONEDNN_MAX_CPU_ISA", "AVX2", 1);
    compare_all(KERN_F32, 2);
}
TEST_LIMIT(ops_bf16_match_the_reference, 180) {
    if (kern_cpu_has_bf16()) compare_all(KERN_BF16, 2);
    else printf("    this processor has no bfloat16\n");
}

/* ---- bits ---- */

enum { MOST = 17 };

// Every row of `got` equals the row of that id in `all` (which holds ids 0 .. MOST-1 in order)
static void same_rows(struct op_run *got, const struct op_run *all, void **bytes, const int *id) {
    for (int i = 0; i < got->n; i++) {
        const struct op_buffer *b = &got->b[i];
        if (!b->out || b->shared) continue;
        char *x = malloc(b->bytes);
        size_t row = b->row * b->size;
        op_read(got, i, x);
        for (int r = 0; r < got->R; r++)
            if (memcmp(x + (size_t)r * row, (char *)bytes[i] + (size_t)id[r] * row, row) != 0)
                test_fail(__FILE__, __LINE__, "%s: buffer %d, row %d at place %d of %d with %d threads has other bits",
                          label(got->c), i, id[r], r, got->R, got->k->threads);
        free(x);
    }
    for (int r = 0; got->c->op == OP_ROW_NORM && r < got->R; r++)
        CHECK(memcmp(&got->norms[r], &all->norms[id[r]], sizeof(double)) == 0);
}

// What all rows share, gradients of weights say, has the same bits for any number of threads
static void same_whole(struct kern *k, const struct op_case *c, void **bytes) {
    struct op_run o;
    opened(&o, k, c, MOST, NULL);
    for (int i = 0; i < o.n; i++) {
        if (!o.b[i].out || !o.b[i].shared) continue;
        char *x = malloc(o.b[i].bytes);
        op_read(&o, i, x);
        if (memcmp(x, bytes[i], o.b[i].bytes) != 0)
            test_fail(__FILE__, __LINE__, "%s: buffer %d has other bits with %d threads", label(c), i, k->threads);
        free(x);
    }
    op_close(&o);
}

static void case_bits(const struct op_case *c, struct kern *const *k, int kerns, bool every_R) {
    struct op_run all;
    void *bytes[OP_BUFFERS] = {0};
    int order[MOST];
    opened(&all, k[0], c, MOST, NULL);
    for (int i = 0; i < all.n; i++)
        if (all.b[i].out) op_read(&all, i, bytes[i] = malloc(all.b[i].bytes));
    for (int R = 1; R <= MOST; R += every_R || R < 3 ? 1 : 7)
        for (int t = 0; t < kerns; t++) {
            struct op_run some;
            for (int r = 0; r < R; r++) order[r] = (r * 5 + R + t) % MOST;
            opened(&some, k[t], c, R, order);
            same_rows(&some, &all, bytes, order);
            op_close(&some);
        }
    for (int t = 0; t < kerns; t++) same_whole(k[t], c, bytes);
    for (int i = 0; i < OP_BUFFERS; i++) free(bytes[i]);
    op_close(&all);
}

static void all_bits(enum kern_dtype act) {
    struct kern *k[3];
    for (int t = 0; t < 3; t++) k[t] = open_kern("cpu", act, t + 1);
    for (int i = 0; i < op_cases_n; i++) {
        const struct op_case *c = &op_cases[i];
        if (c->dtype == act && op_flops(c, 1) < 6e7)
            case_bits(c, k, 3, c->op == OP_NET || c->op == OP_VECTORS || op_flops(c, 1) < 2e5);
    }
    for (int t = 0; t < 3; t++) kern_close(k[t]);
}

TEST_LIMIT(ops_f32_rows_do_not_depend_on_company, 180) { all_bits(KERN_F32); }
TEST_LIMIT(ops_f32_rows_do_not_depend_on_company_on_avx2, 180) {
    setenv("ONEDNN_MAX_CPU_ISA", "AVX2", 1);
    all_bits(KERN_F32);
}
TEST_LIMIT(ops_bf16_rows_do_not_depend_on_company, 180) {
    if (kern_cpu_has_bf16()) all_bits(KERN_BF16);
    else printf("    this processor has no bfloat16\n");
}

/* ---- what a table of cases cannot say ---- */

TEST(ops_save_outputs_change_nothing) {
    for (int i = 0; i < op_cases_n; i++) {
        struct op_case c = op_cases[i];
        if (!c.save || c.dtype != KERN_F32 || c.op > OP_NET) continue; // save means something else in training
        struct kern *k = open_kern("cpu", KERN_F32, 2);
        struct op_run with, without;
        opened(&with, k, &c, 3, NULL);
        c.save = false;
        opened(&without, k, &c, 3, NULL);
        CHECK(memcmp(with.b[0].p, without.b[0].p, with.b[0].bytes) == 0);
        op_close(&with);
        op_close(&without);
        kern_close(k);
    }
}

TEST(ops_nan_is_never_lost) {
    struct kern *k = open_kern("cpu", KERN_F32, 1);
    for (int i = 0; i < op_cases_n; i++) {
        const struct op_case *c = &op_cases[i];
        bool tokens = c->op == OP_LINEAR || c->op == OP_ATTENTION || c->op == OP_NORM || (c->op == OP_GATE_NORM && !c->N) ||
                      c->op == OP_CONDITION;
        if (c->dtype != KERN_F32 || !tokens || op_flops(c, 1) > 1e8) continue;
        struct op_run o;
        CHECK(op_open(&o, k, c, 1, NULL) == 0);
        for (int at = 0; at < 2; at++) { // in the first element and in the last
            size_t e = at ? o.b[1].row - 1 : 0;
            CHECK(op_reset(&o) == 0);
            ((float *)o.b[1].p)[e] = NAN;
            CHECK(op_run(&o) == 0);
            int found = 0;
            for (size_t j = 0; j < o.b[0].row; j++) found += ((float *)o.b[0].p)[j] != ((float *)o.b[0].p)[j];
            if (!found) test_fail(__FILE__, __LINE__, "%s: a NaN at %zu vanished", label(c), e);
        }
        op_close(&o);
    }
    kern_close(k);
}

// Coefficients that are 0 must not read what they multiply
TEST(ops_row_update_zero_coefficients_do_not_read) {
    const char *names[] = {"ref", "cpu"};
    for (int b = 0; b < 2; b++) {
        struct kern *k = open_kern(names[b], KERN_F32, 1);
        enum { N = 100 };
        void *cols, *out;
        CHECK(k->alloc(k, KERN_COLS * N * 4, &cols) == 0 && k->alloc(k, N * 4, &out) == 0);
        for (int i = 0; i < KERN_COLS * N; i++) ((float *)cols)[i] = i < N ? (float)i : NAN;
        for (int i = 0; i < N; i++) ((float *)out)[i] = NAN;
        struct kern_row_update u = {
            .row_c = -1, .row_u = -1, .row_rest = -1, .n = 2, .assign = {{.dst = 3, .c = {2}}, {.dst = 0, .c = {-1}}}};
        CHECK(k->row_update(k, cols, N, N, out, N, NULL, &u, 1) == 0);
        for (int i = 0; i < N; i++) CHECK(((float *)cols)[3 * N + i] == 2.0f * (float)i && ((float *)cols)[i] == -(float)i);
        float noise[N];
        for (int i = 0; i < N; i++) noise[i] = (float)i;
        struct kern_row_update z = {.row_c = -1, .row_u = -1, .row_rest = -1, .n = 1, .assign = {{.dst = 1, .c_noise = 1}}};
        CHECK(k->row_update(k, cols, N, N, NULL, 0, noise, &z, 1) == 0);
        for (int i = 0; i < N; i++) CHECK(((float *)cols)[N + i] == (float)i);
        k->free(k, cols);
        k->free(k, out);
        kern_close(k);
    }
}

struct visit {
    int seen[100], scratch[100], limit;
};
static int visit_rows(struct kern *lane, void *ctx, int r0, int n, int s0) {
    struct visit *v = ctx;
    for (int i = 0; i < n; i++) __atomic_fetch_add(&v->seen[r0 + i], 1, __ATOMIC_RELAXED);
    if (s0 + n > v->limit) return snprintf(lane->why, sizeof lane->why, "scratch row %d", s0 + n), KERN_EDEVICE;
    if (r0 <= 7 && 7 < r0 + n && v->scratch[0]) return snprintf(lane->why, sizeof lane->why, "row 7 said no"), KERN_EDEVICE;
    return 0;
}

TEST(ops_rows_visit_each_row_once) {
    for (int threads = 1; threads <= 5; threads++) {
        struct kern *k = open_kern("cpu", KERN_F32, threads);
        CHECK(k->threads == threads);
        for (int n = 0; n < 100; n++)
            for (int lines = 16; lines <= 1024; lines *= 4) {
                struct visit v = {.limit = k->rows_scratch(k, 99, lines)};
                CHECK(k->rows(k, n, lines, visit_rows, &v) == 0);
                for (int i = 0; i < 100; i++) CHECK(v.seen[i] == (i < n));
            }
        struct visit v = {.limit = 100, .scratch = {1}};
        CHECK(k->rows(k, 20, 64, visit_rows, &v) == KERN_EDEVICE);
        CHECK_STR(k->why, "row 7 said no");
        kern_close(k);
    }
}

// One thread each for the pool, nicer than the caller, and none from OpenMP
TEST(ops_threads_are_counted_and_nice) {
    struct kern *k;
    char why[256];
    CHECK(kern_open(&k, &(struct kern_config){.backend = "cpu", .threads = 3, .nice = 4}, why, sizeof why) == 0);
    for (int i = 0; i < op_cases_n; i++) {
        struct op_run o;
        if (op_cases[i].dtype != KERN_F32 || op_cases[i].op != OP_NET) continue;
        opened(&o, k, &op_cases[i], 5, NULL);
        op_close(&o);
    }
    int threads = 0, nicer = 0;
    DIR *d = opendir("/proc/self/task");
    CHECK(d);
    for (struct dirent *e; (e = readdir(d));) {
        if (e->d_name[0] == '.') continue;
        int p = getpriority(PRIO_PROCESS, (id_t)atoi(e->d_name)), want = getpriority(PRIO_PROCESS, 0) + 4;
        threads++;
        nicer += p == (want > 19 ? 19 : want) && atoi(e->d_name) != getpid();
    }
    closedir(d);
#ifndef __SANITIZE_THREAD__ // which has one of its own
    CHECK(threads == 4);
#endif
    CHECK(nicer == 3);
    kern_close(k);
}

TEST(ops_refusals_say_why) {
    struct kern *k;
    char why[256];
    CHECK(kern_open(&k, &(struct kern_config){.backend = "gpu"}, why, sizeof why) == KERN_EUNSUPPORTED && !k &&
          strstr(why, "\"gpu\""));
    CHECK(kern_open(&k, &(struct kern_config){.backend = "cpu", .act = KERN_F16}, why, sizeof why) == KERN_EUNSUPPORTED && !k);
    const char *names[] = {"ref", "cpu"};
    for (int b = 0; b < 2; b++) {
        k = open_kern(names[b], KERN_F32, 1);
        struct kern_linear *l = (struct kern_linear *)k;
        void *p = k;
        CHECK(k->linear_new(k, &(struct kern_linear_spec){.out = 0, .in = 4, .unit = 1}, "", NULL, &l) == KERN_EUNSUPPORTED &&
              !l);
        CHECK(k->attention(k, NULL, NULL, 1, 4, 1, 12, NULL) == KERN_EUNSUPPORTED && strstr(k->why, "12"));
        CHECK(k->attention(k, NULL, NULL, 1, 4, 1, 136, NULL) == KERN_EUNSUPPORTED);
        CHECK(k->attention(k, NULL, NULL, 1, 4097, 1, 8, NULL) == KERN_EUNSUPPORTED && strstr(k->why, "4097"));
        CHECK(k->alloc(k, SIZE_MAX - 5, &p) == KERN_ENOMEM && !p && strstr(k->why, "memory"));
#ifndef __SANITIZE_ADDRESS__ // which ends the process instead
        CHECK(k->alloc(k, (size_t)1 << 60, &p) == KERN_ENOMEM && !p);
#endif
        CHECK(k->alloc(k, 0, &p) == 0 && p && (uintptr_t)p % 64 == 0);
        k->free(k, p);
        kern_close(k);
    }
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) // their shadows need the address space
static void limit_memory(size_t more) {                             // beyond what is mapped now; 0: no limit
    long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    CHECK(f && fscanf(f, "%ld", &pages) == 1);
    fclose(f);
    struct rlimit r;
    getrlimit(RLIMIT_AS, &r);
    r.rlim_cur = more ? (rlim_t)pages * 4096 + more : r.rlim_max;
    CHECK(setrlimit(RLIMIT_AS, &r) == 0);
}

// With less and less memory a layer or a back end is made or refused, never half made; and what exists goes on working
TEST(ops_out_of_memory_is_a_status) {
    enum { N = 2048 };
    int refused = 0, made = 0, kerns = 0;
    mallopt(M_MMAP_THRESHOLD, 1 << 16); // large blocks go back to the system when freed, so that the limit is felt
    struct kern *k = open_kern("cpu", KERN_F32, 2);
    float *w = calloc(N, N * sizeof *w);
    CHECK(w);
    const struct kern_linear_spec token = {.out = N, .in = N, .unit = 64}, vector = {.out = N, .in = N, .unit = KERN_VEC};
    for (int i = 0; i < 2; i++) { // oneDNN generates code for a new shape, and crashes when it has no memory for that
        struct kern_linear *l;
        CHECK(k->linear_new(k, i ? &vector : &token, w, NULL, &l) == 0);
        k->linear_free(k, l);
    }
    for (size_t more = (size_t)48 << 20; more >= (size_t)1 << 20; more -= (size_t)1 << 20) {
        struct kern_linear *l;
        limit_memory(more);
        for (int i = 0; i < 2; i++) {
            int rc = k->linear_new(k, i ? &vector : &token, w, NULL, &l);
            CHECK(rc == 0 || (rc == KERN_ENOMEM && !l && strstr(k->why, "memory")));
            if (rc == 0) k->linear_free(k, l);
            made += rc == 0;
            refused += rc != 0;
        }
        struct kern *other;
        char why[256] = "";
        int rc = kern_open(&other, &(struct kern_config){.backend = "cpu", .threads = 4}, why, sizeof why);
        CHECK(rc == 0 || ((rc == KERN_ENOMEM || rc == KERN_ETHREAD) && !other && *why));
        kerns += rc == 0;
        kern_close(other);
        limit_memory(0);
    }
    if (!made || !refused || !kerns || kerns == 48)
        test_fail(__FILE__, __LINE__, "%d layers made, %d refused, %d back ends", made, refused, kerns);
    compare_case(&op_cases[0], k, k, 2);
    free(w);
    kern_close(k);
}
#endif

TEST(ops_bf16_is_refused_where_the_processor_lacks_it) {
    setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", 1);
    struct kern *k;
    char why[256];
    CHECK(!kern_cpu_has_bf16());
    CHECK(kern_open(&k, &(struct kern_config){.backend = "cpu", .act = KERN_BF16}, why, sizeof why) == KERN_EUNSUPPORTED && !k &&
          strstr(why, "bfloat16"));
}

// One writes float32 where it belongs, one to scratch on its way to an activation: all else alike, they must not be taken for the same.
TEST(ops_layers_of_one_shape_and_unlike_outputs) {
    const struct op_case plain = {"plain", OP_LINEAR, KERN_BF16, .T = 16, .C = 32, .N = 64, .y_f32 = true, .tol = 1e-2},
                         gelu = {"gelu", OP_LINEAR, KERN_BF16, .T = 16, .C = 32, .N = 64, .act = KERN_GELU_TANH, .tol = 1e-2};
    if (!kern_cpu_has_bf16()) return;
    for (int first = 0; first < 2; first++) {
        struct kern *cpu = open_kern("cpu", KERN_BF16, 1), *ref = open_kern("ref", KERN_BF16, 1);
        struct op_run held;
        if (op_open(&held, cpu, first ? &gelu : &plain, 3, NULL)) test_fail(__FILE__, __LINE__, "open: %s", cpu->why);
        compare_case(first ? &plain : &gelu, cpu, ref, 3);
        op_close(&held);
        kern_close(cpu);
        kern_close(ref);
    }
}

TEST(ops_bf16_conversion_rounds_to_even) {
    static const struct {
        float f;
        uint16_t h;
    } want[] = {{1.0f, 0x3f80},       {0x1.01p0f, 0x3f80},       {0x1.03p0f, 0x3f82}, {0x1.0101p0f, 0x3f81},
                {-0x1.03p0f, 0xbf82}, {0x1.fffffep127f, 0x7f80}, {INFINITY, 0x7f80},  {0.0f, 0},
                {-0.0f, 0x8000}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) CHECK(kern_f32_to_bf16(want[i].f) == want[i].h);
    CHECK(kern_bf16_to_f32(kern_f32_to_bf16(NAN)) != kern_bf16_to_f32(kern_f32_to_bf16(NAN)));
    static const struct {
        uint16_t h;
        float f;
    } halves[] = {{0x3c00, 1},         {0xc000, -2},       {0x7bff, 65504}, {0x0001, 0x1p-24f},
                  {0x8400, -0x1p-14f}, {0x7c00, INFINITY}, {0, 0}};
    for (size_t i = 0; i < sizeof halves / sizeof *halves; i++) CHECK(kern_f16_to_f32(halves[i].h) == halves[i].f);
}

TEST(ops_precisions_have_names_and_places) {
    static const struct { const char *name; enum kern_dtype act; enum kern_product product; bool on_cpu; } all[] = {
        {"f32", KERN_F32, KERN_PRODUCT_ACT, true},   {"tf32", KERN_F32, KERN_PRODUCT_TF32, false}, {"bf16", KERN_BF16, KERN_PRODUCT_ACT, true},
        {"f16", KERN_F16, KERN_PRODUCT_ACT, false}, {"fp8", KERN_BF16, KERN_PRODUCT_FP8, false}, {"fp8-static", KERN_BF16, KERN_PRODUCT_FP8_STATIC, false}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        struct kern_config cfg = {.backend = "cpu"};
        struct kern *k;
        char why[256] = "";
        CHECK(kern_precision(&cfg, all[i].name) && cfg.act == all[i].act && cfg.product == all[i].product);
        if (all[i].on_cpu) continue;
        CHECK(kern_open(&k, &cfg, why, sizeof why) == KERN_EUNSUPPORTED && !k && strstr(why, "GPU"));
    }
    CHECK(!kern_precision(&(struct kern_config){0}, "f8"));
}

TEST(ops_float16_rounds_to_nearest_even) {
    static const struct { float in; uint16_t out; } all[] = {{1, 0x3c00},         {-2, 0xc000},        {65504, 0x7bff},      {65519.996f, 0x7bff}, {65520, 0x7c00},
                                                             {0x1p-24f, 1},       {0x1p-25f, 0},       {0x1.8p-24f, 2},      {1 + 0x1p-11f, 0x3c00}, {1 + 0x3p-11f, 0x3c02},
                                                             {INFINITY, 0x7c00},  {-INFINITY, 0xfc00}, {0x1p-14f, 0x0400},   {0x1.ff8p-15f, 0x03ff}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) CHECK(kern_f32_to_f16(all[i].in) == all[i].out);
    for (uint32_t h = 0; h < 0x7c00; h++) CHECK(kern_f32_to_f16(kern_f16_to_f32((uint16_t)h)) == h); // every finite number comes back
    float nan = kern_f16_to_f32(kern_f32_to_f16(NAN));
    CHECK(nan != nan);
}
