// SPDX-License-Identifier: MIT
/*
 * sitd bench: the speed of this machine at a network's forward pass.
 *
 * One JSON line a row count: median, least and most milliseconds of a whole forward (conditioning included), and GFLOP/s counted as 2 x
 * multiply-adds of products and attention (dit_flops). Shapes of the papers get random weights: speed does not depend on them.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/model/dit.h"
#include "kernels/philox.h"
#include "server/cmd.h"

static const char help[] =
    "usage: sitd bench [options]\n\n"
    "  --model DIR            a model directory\n"
    "  --shape NAME           S/2, B/2, L/2, XL/2, H/2, also /4 and /8, with random weights (32x32x4 latents, 1000 classes);\n"
    "                         DiT-, SiT- or MaskDiT- may come before (MaskDiT's has its decoder)\n"
    "  --block NAME           conditioning of a shape: adaln-zero (default), adaln, cross-attention, in-context\n"
    "  --rows LIST            row counts, e.g. 1,2,16 (default 1,2,4,8,16)\n"
    "  --seconds X            time for each row count (default 2)\n"
    "  --backend cpu|cuda|ref|auto  --precision f32|bf16  --threads N\n";

struct options {
    const char *model, *shape, *block, *rows;
    double seconds;
    struct kern_config kern;
};

static int usage(const char *what, const char *value) {
    fprintf(stderr, "sitd bench: %s%s\n%s", what, value, help);
    return 2;
}

static int parse(struct options *o, int argc, char **argv) {
    static const struct option longs[] = {{"model", 1, 0, 'm'},   {"shape", 1, 0, 's'}, {"block", 1, 0, 'k'},     {"rows", 1, 0, 'r'},    {"seconds", 1, 0, 'x'},
                                          {"backend", 1, 0, 'b'}, {"precision", 1, 0, 'p'}, {"threads", 1, 0, 't'}, {"help", 0, 0, 'h'}, {0}};
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
            if (strcmp(optarg, "f32") != 0 && strcmp(optarg, "bf16") != 0) return 1 + usage("--precision is f32 or bf16, not ", optarg);
            o->kern.act = strcmp(optarg, "bf16") == 0 ? KERN_BF16 : KERN_F32;
            break;
        case 't':
            o->kern.threads = (int)strtol(optarg, &end, 10);
            if (!*optarg || *end || o->kern.threads < 1) return 1 + usage("--threads wants a whole number, not ", optarg);
            break;
        case 'h': return fputs(help, stdout), 1;
        default: return 1 + usage("see the options", "");
    }
    if (optind < argc) return 1 + usage("not an option: ", argv[optind]);
    if (o->block && (!o->shape || arch_block_parse(o->block) < 0)) return 1 + usage("--block goes with --shape; it is no ", o->block);
    if (!o->model == !o->shape) return 1 + usage("give --model or --shape", "");
    return 0;
}

// The published sizes (DiT paper, table 1; H, the one-hot labels and the decoder are MaskDiT's).
static bool shape_arch(struct arch *a, const char *name, const char *block) {
    static const struct { const char *name; int depth, width, heads; } sizes[] = {
        {"S", 12, 384, 6}, {"B", 12, 768, 12}, {"L", 24, 1024, 16}, {"XL", 28, 1152, 16}, {"H", 32, 1280, 16}};
    bool masked = strncmp(name, "MaskDiT-", 8) == 0;
    name += masked ? 8 : strncmp(name, "DiT-", 4) == 0 || strncmp(name, "SiT-", 4) == 0 ? 4 : 0;
    const char *slash = strchr(name, '/');
    for (size_t i = 0; slash && i < sizeof sizes / sizeof *sizes; i++) {
        if (strlen(sizes[i].name) != (size_t)(slash - name) || strncmp(name, sizes[i].name, (size_t)(slash - name)) != 0) continue;
        *a = (struct arch){.input_size = 32, .patch_size = atoi(slash + 1), .in_channels = 4, .hidden_size = sizes[i].width, .depth = sizes[i].depth,
                           .num_heads = sizes[i].heads, .num_classes = 1000, .mlp_ratio = 4, .class_dropout = true, .learn_sigma = !masked,
                           .one_hot = masked};
        if (block) a->block = (enum arch_block)arch_block_parse(block);
        if (masked) a->decoder.hidden_size = 512, a->decoder.depth = 8, a->decoder.num_heads = 16;
        return a->patch_size == 2 || a->patch_size == 4 || a->patch_size == 8;
    }
    return false;
}

static double now(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
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

static int bench_rows(struct dit *m, struct kern *k, const struct arch *a, int rows, double seconds, struct err *e) {
    enum { MOST = 4096 };
    double *times = mem_array(MOST, sizeof *times);
    float *t = mem_array((size_t)rows, sizeof *t);
    int32_t *y = mem_array((size_t)rows, sizeof *y);
    int n = 0, rc = times && t && y ? OK : err_set(e, E_NOMEM, "no memory");
    int inner = k->graph_launch ? 8 : 1; // a GPU runs behind: time a few passes, as a sampler queues them, and wait once
    for (int i = 0; rc == OK && i < rows; i++) t[i] = 0.5f, y[i] = i % a->num_classes;
    if (rc == OK) rc = random_images(m, k, a, rows, e);
    for (double start = now(); rc == OK && n < MOST && (n < 4 || now() - start < seconds);) {
        double before = now();
        float first;
        for (int i = 0; i < inner && rc == OK; i++) rc = dit_forward(m, rows, t, y, e);
        if (rc == OK && k->download(k, &first, dit_out(m), sizeof first)) rc = err_set(e, E_DEVICE, "%s: %s", k->name, k->why);
        times[n++] = 1e3 * (now() - before) / inner;
    }
    if (rc == OK) {
        n--, memmove(times, times + 1, (size_t)n * sizeof *times); // the first run warms caches
        qsort(times, (size_t)n, sizeof *times, by_value);
        double flops = rows * dit_flops(a);
        printf("{\"backend\":\"%s\",\"precision\":\"%s\",\"threads\":%d,\"rows\":%d,\"runs\":%d,\"ms\":%.3f,\"ms_min\":%.3f,\"ms_max\":%.3f,\"gflops\":%.1f,\"peak_mb\":%.0f}\n",
               k->name, k->act == KERN_F32 ? "f32" : "bf16", k->threads, rows, n, times[n / 2], times[0], times[n - 1], flops / times[n / 2] / 1e6, peak_mb());
        fflush(stdout);
    }
    mem_free(times), mem_free(t), mem_free(y);
    return rc;
}

static int bench(const struct options *o, struct kern *k, struct err *e) {
    struct model_dir dir = {0};
    struct arch_weights random = {0};
    struct arch a;
    struct dit *m = NULL;
    int most = 0, rc;
    for (const char *s = o->rows; s; s = strchr(s, ',') ? strchr(s, ',') + 1 : NULL) {
        if (atoi(s) < 1 || atoi(s) > 4096) return err_param(e, E_RANGE, "--rows", "--rows wants counts from 1 to 4096, not %s", s);
        most = atoi(s) > most ? atoi(s) : most;
    }
    if (o->model) rc = model_dir_open(&dir, o->model, e), a = dir.desc.arch;
    else rc = shape_arch(&a, o->shape, o->block) ? arch_random(&random, &a, 1, e) : err_param(e, E_RANGE, "--shape", "no shape '%s'", o->shape);
    if (rc == OK) rc = dit_new(&m, k, &a, o->model ? dir.weights : &random.table, a.in_channels, most, e);
    arch_weights_free(&random);
    for (const char *s = o->rows; rc == OK && s; s = strchr(s, ',') ? strchr(s, ',') + 1 : NULL) rc = bench_rows(m, k, &a, atoi(s), o->seconds, e);
    dit_free(m);
    if (o->model) model_dir_close(&dir);
    return rc;
}

int cmd_bench(int argc, char **argv) {
    struct options o = {.rows = "1,2,4,8,16", .seconds = 2, .kern = {.backend = "cpu"}};
    int rc = parse(&o, argc, argv);
    if (rc) return rc - 1;
    char why[256];
    struct kern *k;
    struct err e = {0};
    if (kern_open(&k, &o.kern, why, sizeof why)) return fprintf(stderr, "sitd bench: %s\n", why), 69;
    fprintf(stderr, "%s\n", k->device);
    rc = bench(&o, k, &e);
    if (rc != OK) fprintf(stderr, "sitd bench: %s\n", e.text);
    kern_close(k);
    return status_exit_code(rc);
}
