// SPDX-License-Identifier: MIT
/*
 * sitd bench: the speed of this machine at a network's forward pass.
 *
 * One JSON line a row count: median, least and most milliseconds of a whole forward (conditioning included), and GFLOP/s counted as 2 x
 * multiply-adds of products and attention (dit_flops). Shapes of the papers get random weights: speed does not depend on them.
 */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/engine/runner.h"
#include "core/io/checkpoint.h"
#include "core/model/dit.h"
#include "kernels/philox.h"
#include "server/cache.h"
#include "server/cmd.h"

static const char help[] =
    "usage: sitd bench [options]\n\n"
    "  --model DIR            a model directory\n"
    "  --shape NAME           S/2, B/2, L/2, XL/2, H/2, also /4 and /8, with random weights (32x32x4 latents, 1000 classes);\n"
    "                         DiT-, SiT- or MaskDiT- may come before (MaskDiT's has its decoder)\n"
    "  --side N               side of a shape's latents (default 32: pictures of 256 pixels; 64: of 512)\n"
    "  --block NAME           conditioning of a shape: adaln-zero (default), adaln, cross-attention, in-context\n"
    "  --rows LIST            row counts, e.g. 1,2,16 (default 1,2,4,8,16)\n"
    "  --seconds X            time for each row count (default 2)\n"
    "  --steps N              also sample with N Euler steps: images a second, host work included\n"
    "  --error                also the error of a forward pass against float32 on the same back end\n"
    "  --table                a table instead of JSON lines\n"
    "  --any-bits             cuda: let a row's bits depend on the size of its batch\n"
    "  --exact-residual       cuda: keep the residual stream in float32\n"
    "  --backend cpu|cuda|ref|auto  --precision f32|tf32|bf16|f16|fp8|fp8-static  --threads N\n";

struct options {
    const char *model, *shape, *block, *rows;
    const char *precision;
    int side, steps; // side: of the latents
    bool error, table;
    double seconds;
    struct kern_config kern;
};

static int usage(const char *what, const char *value) {
    fprintf(stderr, "sitd bench: %s%s\n%s", what, value, help);
    return 2;
}

static int parse(struct options *o, int argc, char **argv) {
    static const struct option longs[] = {{"model", 1, 0, 'm'},   {"shape", 1, 0, 's'}, {"block", 1, 0, 'k'},     {"rows", 1, 0, 'r'},    {"seconds", 1, 0, 'x'},
                                          {"backend", 1, 0, 'b'}, {"precision", 1, 0, 'p'}, {"threads", 1, 0, 't'}, {"side", 1, 0, 'i'}, {"steps", 1, 0, 'n'}, {"error", 0, 0, 'e'}, {"table", 0, 0, 'T'}, {"any-bits", 0, 0, 'a'}, {"exact-residual", 0, 0, 'E'},
                                           {"help", 0, 0, 'h'}, {0}};
    char *end;
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) switch (c) {
        case 'm': o->model = optarg; break;
        case 's': o->shape = optarg; break;
        case 'k': o->block = optarg; break;
        case 'r': o->rows = optarg; break;
        case 'x':
            o->seconds = strtod(optarg, &end);
            if (!*optarg || *end || !(o->seconds > 0)) return 1 + usage("--seconds wants a positive number, not ", optarg);
            break;
        case 'b': o->kern.backend = optarg; break;
        case 'p':
            if (!kern_precision(&o->kern, optarg)) return 1 + usage("--precision is " KERN_PRECISIONS ", not ", optarg);
            o->precision = optarg;
            break;
        case 't':
            o->kern.threads = (int)strtol(optarg, &end, 10);
            if (!*optarg || *end || o->kern.threads < 1) return 1 + usage("--threads wants a whole number, not ", optarg);
            break;
        case 'i':
            o->side = (int)strtol(optarg, &end, 10);
            if (!*optarg || *end || o->side < 8 || o->side > 128 || o->side % 8) return 1 + usage("--side wants a multiple of 8 up to 128, not ", optarg);
            break;
        case 'n':
            o->steps = (int)strtol(optarg, &end, 10);
            if (!*optarg || *end || o->steps < 1 || o->steps > 1000) return 1 + usage("--steps wants 1 to 1000, not ", optarg);
            break;
        case 'e': o->error = true; break;
        case 'T': o->table = true; break;
        case 'a': o->kern.any_bits = true; break;
        case 'E': o->kern.exact_stream = true; break;
        case 'h': return fputs(help, stdout), 1;
        default: return 1 + usage("see the options", "");
    }
    if (optind < argc) return 1 + usage("not an option: ", argv[optind]);
    if (o->block && (!o->shape || arch_block_parse(o->block) < 0)) return 1 + usage("--block goes with --shape; it is no ", o->block);
    if (!o->model == !o->shape) return 1 + usage("give --model or --shape", "");
    return 0;
}

// The published networks; one-hot labels and the decoder are MaskDiT's.
static bool shape_arch(struct arch *a, const char *name, const char *block, int side) {
    bool masked = strncmp(name, "MaskDiT-", 8) == 0;
    name += masked ? 8 : strncmp(name, "DiT-", 4) == 0 || strncmp(name, "SiT-", 4) == 0 ? 4 : 0;
    const char *slash = strchr(name, '/');
    if (!slash) return false;
    *a = (struct arch){.input_size = side, .patch_size = atoi(slash + 1), .in_channels = 4, .num_classes = 1000, .mlp_ratio = 4,
                       .class_dropout = true, .learn_sigma = !masked, .one_hot = masked};
    if (block) a->block = (enum arch_block)arch_block_parse(block);
    if (masked) a->decoder.hidden_size = 512, a->decoder.depth = 8, a->decoder.num_heads = 16;
    return arch_size(a, name, (size_t)(slash - name)) && (a->patch_size == 2 || a->patch_size == 4 || a->patch_size == 8);
}

// Most memory that the process ever held, loading included.
static double peak_mb(void) {
    struct rusage u;
    return getrusage(RUSAGE_SELF, &u) ? 0 : (double)u.ru_maxrss * 1024 / 1e6;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Zeros would flatter a GPU: fewer bits switch, so its clock stays higher.
static int random_images(struct dit *m, struct kern *k, const struct arch *a, int rows, struct err *e) {
    size_t numel = (size_t)a->in_channels * (size_t)a->input_size * (size_t)a->input_size, count = numel * (size_t)rows;
    float *x = mem_array(count, sizeof *x);
    if (!x) return err_set(e, E_NOMEM, "no memory");
    for (size_t i = 0; i < count; i++) x[i] = philox_normal(1, (uint32_t)(i / numel), 0, (uint32_t)(i % numel));
    int rc = k->upload(k, dit_x(m), x, count * sizeof *x) ? err_set(e, E_DEVICE, "%s: %s", k->name, k->why) : OK;
    mem_free(x);
    return rc;
}

// Median milliseconds of a forward pass, with the least and the most
struct timing { double median, least, most; int runs; };

static int time_rows(struct timing *out, struct dit *m, struct kern *k, const struct arch *a, int rows, double seconds, struct err *e) {
    enum { MOST = 4096 };
    double *times = mem_array(MOST, sizeof *times);
    float *t = mem_array((size_t)rows, sizeof *t);
    int32_t *y = mem_array((size_t)rows, sizeof *y);
    int n = 0, rc = times && t && y ? OK : err_set(e, E_NOMEM, "no memory");
    int inner = k->graph_launch ? 8 : 1; // a GPU runs behind: time a few passes, as a sampler queues them, and wait once
    for (int i = 0; rc == OK && i < rows; i++) t[i] = 0.5f, y[i] = i % a->num_classes;
    if (rc == OK) rc = random_images(m, k, a, rows, e);
    for (double start = clock_seconds(); rc == OK && n < MOST && (n < 4 || clock_seconds() - start < seconds);) {
        double before = clock_seconds();
        float first;
        for (int i = 0; i < inner && rc == OK; i++) rc = dit_forward(m, rows, t, y, e);
        if (rc == OK && k->download(k, &first, dit_out(m), sizeof first)) rc = err_set(e, E_DEVICE, "%s: %s", k->name, k->why);
        times[n++] = 1e3 * (clock_seconds() - before) / inner;
    }
    if (rc == OK) {
        n--, memmove(times, times + 1, (size_t)n * sizeof *times); // the first run warms caches
        qsort(times, (size_t)n, sizeof *times, by_value);
        *out = (struct timing){times[n / 2], times[0], times[n - 1], n};
    }
    mem_free(times), mem_free(t), mem_free(y);
    return rc;
}

// What one large product reaches: the ceiling that a forward pass is held against.
static int product_gflops(double *gflops, struct kern *k, struct err *e) {
    int n = k->graph_launch ? 8192 : 1024;
    size_t count = (size_t)n * (size_t)n;
    struct kern_linear_spec spec = {.out = n, .in = n, .unit = n};
    struct kern_linear *l = NULL;
    void *x = NULL, *y = NULL;
    float *w = mem_array(count, sizeof *w), first, best = 0;
    for (size_t i = 0; w && i < count; i++) w[i] = (float)(int32_t)((uint32_t)i * 2654435761u ^ (uint32_t)(i >> 7) * 668265263u) * 0x1p-31f;
    int rc = w ? k->linear_new(k, &spec, w, NULL, &l) : KERN_ENOMEM;
    if (!rc) rc = k->alloc(k, count * 4, &x) ? KERN_ENOMEM : k->alloc(k, count * 4, &y);
    for (size_t i = 0; w && k->act != KERN_F32 && i < count; i++) // small numbers of both 16-bit types, with random signs and last bits
        ((uint16_t *)w)[i] = (uint16_t)(0x3c00 | ((uint32_t)i * 2654435761u >> 16 & 0x807f));
    if (!rc) rc = k->upload(k, x, w, count * kern_dtype_size(k->act));
    for (int i = 0; !rc && i < 5; i++) {
        double before = clock_seconds();
        for (int j = 0; j < 8 && !rc; j++) rc = k->linear(k, l, y, x, 1, NULL);
        if (!rc) rc = k->download(k, &first, y, sizeof first);
        best = (float)fmax(best, 8 * 2 * (double)n * n * n / (clock_seconds() - before) / 1e9);
    }
    if (rc) err_set(e, rc == KERN_ENOMEM ? E_NOMEM : E_DEVICE, "%s: %s", k->name, k->why);
    if (l) k->linear_free(k, l);
    if (x) k->free(k, x);
    if (y) k->free(k, y);
    mem_free(w);
    *gflops = best;
    return rc ? e->status : OK;
}

// The first ROWS rows of a forward pass of random images, host memory, caller frees
enum { ERROR_ROWS = 2 };
static int forward_once(float **out, size_t *count, struct dit *m, struct kern *k, const struct arch *a, struct err *e) {
    const float t[ERROR_ROWS] = {0.3f, 0.7f};
    const int32_t y[ERROR_ROWS] = {0, a->num_classes > 1};
    *count = (size_t)ERROR_ROWS * (size_t)a->in_channels * (size_t)a->input_size * (size_t)a->input_size;
    *out = mem_array(*count, sizeof **out);
    if (!*out) return err_set(e, E_NOMEM, "no memory");
    if (random_images(m, k, a, ERROR_ROWS, e) || dit_forward(m, ERROR_ROWS, t, y, e)) return e->status;
    return k->download(k, *out, dit_out(m), *count * sizeof **out) ? err_set(e, E_DEVICE, "%s: %s", k->name, k->why) : OK;
}

// Relative L2 distance of m's forward pass from float32's with the same weights
static int error_of(double *error, struct dit *m, struct kern *k, const struct options *o, const struct arch *a, const struct tensor_table *w,
                    struct err *e) {
    struct kern_config exact = {.backend = o->kern.backend, .device = o->kern.device, .threads = o->kern.threads};
    struct kern *k32 = NULL;
    struct dit *m32 = NULL;
    float *got = NULL, *want = NULL;
    size_t count = 0;
    char why[256];
    double num = 0, den = 0;
    int rc = kern_open(&k32, &exact, why, sizeof why) ? err_set(e, E_DEVICE, "%s", why) : OK;
    if (rc == OK) rc = dit_new(&m32, k32, a, w, a->in_channels, ERROR_ROWS, e);
    if (rc == OK) rc = forward_once(&want, &count, m32, k32, a, e);
    if (rc == OK) rc = forward_once(&got, &count, m, k, a, e);
    for (size_t i = 0; rc == OK && i < count; i++)
        num += ((double)got[i] - want[i]) * ((double)got[i] - want[i]), den += (double)want[i] * want[i];
    *error = sqrt(num / den);
    mem_free(got), mem_free(want);
    dit_free(m32);
    kern_close(k32);
    return rc;
}

// Images a second of `rows` images at once, o->steps Euler steps each, from noise to latents on the host
static int sample_rate(double *rate, struct kern *k, const struct options *o, const struct arch *a, const struct tensor_table *w, int rows,
                       struct err *e) {
    struct runner *r = NULL;
    struct runner_slot *slots = mem_array((size_t)rows, sizeof *slots), **all = mem_array((size_t)rows, sizeof(struct runner_slot *));
    struct sampler_model model = {.path = PATH_LINEAR, .prediction = PRED_VELOCITY};
    struct sampler_spec spec;
    float *out = NULL;
    sampler_defaults(&spec, &model, SAMPLER_ODE);
    spec.method = METHOD_EULER, spec.steps = o->steps, spec.guidance = 1;
    int rc = slots && all ? runner_new(&r, k, a, w, rows, rows, e) : err_set(e, E_NOMEM, "no memory");
    if (rc == OK && !(out = mem_array(runner_numel(r), sizeof *out))) rc = err_set(e, E_NOMEM, "no memory");
    double before = clock_seconds();
    for (int i = 0; rc == OK && i < rows; i++) {
        slots[i] = (struct runner_slot){.slot = i, .label = i % a->num_classes, .seed = 1, .image = (uint32_t)i, .null_of = -1};
        all[i] = &slots[i];
        rc = runner_start(r, all[i], &spec, &model, e);
    }
    while (rc == OK && !slots[0].done) {
        rc = runner_step(r, all, rows, NULL, e);
        if (rc == OK) rc = runner_plan(r, all, rows, e);
    }
    for (int i = 0; rc == OK && i < rows; i++) rc = runner_read(r, i, out, e);
    *rate = rows / (clock_seconds() - before);
    runner_free(r);
    mem_free(out), mem_free(all), mem_free(slots);
    return rc;
}

struct report { double load_s, ceiling, error; }; // error: -1 unless asked for

static int bench_rows(const struct options *o, struct dit *m, struct kern *k, const struct arch *a, const struct tensor_table *w, int rows,
                      const struct report *p, struct err *e) {
    struct timing t;
    double rate = 0, flops = rows * dit_flops(a);
    char images[64] = "", error[64] = "";
    int rc = time_rows(&t, m, k, a, rows, o->seconds, e);
    if (rc == OK && o->steps) rc = sample_rate(&rate, k, o, a, w, rows, e);
    if (rc != OK) return rc;
    double gflops = flops / t.median / 1e6;
    if (o->table) {
        printf("%6d %10.3f %10.3f %10.0f %8.0f%%", rows, t.median, 1e3 * rows / t.median, gflops, 100 * gflops / p->ceiling);
        printf(o->steps ? " %12.2f\n" : "\n", rate);
        return fflush(stdout), OK;
    }
    if (o->steps) snprintf(images, sizeof images, ",\"steps\":%d,\"images_s\":%.3f", o->steps, rate);
    if (p->error >= 0) snprintf(error, sizeof error, ",\"error\":%.3g", p->error);
    printf("{\"backend\":\"%s\",\"device\":\"%s\",\"precision\":\"%s\",\"threads\":%d,\"rows\":%d,\"runs\":%d,\"ms\":%.3f,\"ms_min\":%.3f,\"ms_max\":%.3f,"
           "\"gflops\":%.1f,\"of_product\":%.3f,\"load_s\":%.2f%s%s,\"peak_mb\":%.0f}\n",
           k->name, k->device, o->precision, k->threads, rows, t.runs, t.median, t.least, t.most, gflops, gflops / p->ceiling, p->load_s, images, error,
           peak_mb());
    return fflush(stdout), OK;
}

static int bench_model(const struct options *o, struct kern *k, const struct arch *a, const struct tensor_table *w, int most, struct err *e) {
    struct report p = {.error = -1};
    struct dit *m = NULL;
    double before = clock_seconds();
    int rc = dit_new(&m, k, a, w, a->in_channels, most, e);
    p.load_s = clock_seconds() - before;
    if (rc == OK) rc = product_gflops(&p.ceiling, k, e);
    if (rc == OK && (o->error || o->kern.product >= KERN_PRODUCT_FP8)) rc = error_of(&p.error, m, k, o, a, w, e);
    if (rc == OK && o->table) {
        printf("%s, %s, loaded in %.2f s, one large product %.0f GFLOP/s", k->device, o->precision, p.load_s, p.ceiling);
        if (p.error >= 0) printf(", error against f32 %.3g", p.error);
        printf("\n  rows         ms     rows/s    GFLOP/s of product%s\n", o->steps ? "     images/s" : "");
    }
    for (const char *s = o->rows; rc == OK && s; s = strchr(s, ',') ? strchr(s, ',') + 1 : NULL) rc = bench_rows(o, m, k, a, w, atoi(s), &p, e);
    dit_free(m);
    return rc;
}

static int bench(const struct options *o, struct kern *k, struct err *e) {
    struct model_dir dir = {0};
    struct arch_weights random = {0};
    struct arch a;
    int most = ERROR_ROWS, rc;
    for (const char *s = o->rows; s; s = strchr(s, ',') ? strchr(s, ',') + 1 : NULL) {
        if (atoi(s) < 1 || atoi(s) > 4096) return err_param(e, E_RANGE, "--rows", "--rows wants counts from 1 to 4096, not %s", s);
        most = atoi(s) > most ? atoi(s) : most;
    }
    if (o->model) rc = model_dir_open(&dir, o->model, e), a = dir.desc.arch;
    else rc = shape_arch(&a, o->shape, o->block, o->side) ? arch_random(&random, &a, 1, e) : err_param(e, E_RANGE, "--shape", "no shape '%s'", o->shape);
    if (rc == OK) rc = bench_model(o, k, &a, o->model ? dir.weights : &random.table, most, e);
    arch_weights_free(&random);
    if (o->model) model_dir_close(&dir);
    return rc;
}

int cmd_bench(int argc, char **argv) {
    struct options o = {.rows = "1,2,4,8,16", .side = 32, .seconds = 2, .precision = "f32", .kern = {.backend = "cpu"}};
    int rc = parse(&o, argc, argv);
    if (rc) return rc - 1;
    char why[256], cache[512];
    struct kern *k;
    struct err e = {0};
    o.kern.cache = cache_folder("", cache, sizeof cache);
    if (kern_open(&k, &o.kern, why, sizeof why)) return fprintf(stderr, "sitd bench: %s\n", why), 69;
    fprintf(stderr, "%s\n", k->device);
    rc = bench(&o, k, &e);
    if (rc != OK) fprintf(stderr, "sitd bench: %s\n", e.text);
    kern_close(k);
    return status_exit_code(rc);
}
