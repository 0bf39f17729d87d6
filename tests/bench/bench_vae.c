// SPDX-License-Identifier: MIT
/*
 * bench_vae: seconds and memory of the published autoencoder's shape with random weights. torch_vae.py times the same beside it.
 * bench-vae [--size 256] [--threads 2] [--encode] [--runs 3] [--backend cpu] [--precision f32] [--pictures 1]: together, of as many as the
 * back end takes
 */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "core/base/mem.h"
#include "core/model/vae.h"
#include "tests/published_vae.h"

static double clock_now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double now(void) { return clock_now(CLOCK_MONOTONIC); }
static double cpu_now(void) { return clock_now(CLOCK_PROCESS_CPUTIME_ID); }

static double peak_mib(void) {
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return (double)r.ru_maxrss / 1024;
}

static int fail(const char *why) { return fprintf(stderr, "bench-vae: %s\n", why), 1; }

int main(int argc, char **argv) {
    static const struct option longs[] = {
        {"size", 1, 0, 's'}, {"threads", 1, 0, 't'}, {"encode", 0, 0, 'e'}, {"runs", 1, 0, 'r'},
        {"backend", 1, 0, 'b'}, {"precision", 1, 0, 'p'}, {"pictures", 1, 0, 'n'}, {0}};
    struct vae_arch a = published_vae;
    struct kern_config config = {.backend = "cpu", .threads = 2};
    int size = 256, runs = 3, pictures = 1;
    enum vae_way way = VAE_DECODE;
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        if (c == 's') size = atoi(optarg);
        if (c == 't') config.threads = atoi(optarg);
        if (c == 'e') way = VAE_ENCODE;
        if (c == 'r') runs = atoi(optarg);
        if (c == 'b') config.backend = optarg;
        if (c == 'p') config.act = strcmp(optarg, "bf16") ? KERN_F32 : KERN_BF16;
        if (c == 'n') pictures = atoi(optarg);
    }
    a.encoder = way == VAE_ENCODE;
    a.decoder = !a.encoder;
    struct vae_size latent = {.height = size / 8, .width = size / 8, .decode = a.decoder, .encode = a.encoder};
    struct vae_weights w;
    struct kern *k;
    struct vae *v;
    struct err e = {0};
    char why[256];
    if (kern_open(&k, &config, why, sizeof why)) return fail(why);
    if (vae_random(&w, &a, 1, &e)) return fail(e.text);
    double start = now();
    if (vae_new(&v, k, &a, &w.table, &latent, &e)) return fail(e.text);
    double made = now() - start, best = 1e9, best_cpu = 1e9, best_done = 1e9;
    vae_weights_free(&w);
    if (pictures < 1 || pictures > vae_pictures(v)) pictures = vae_pictures(v);
    size_t n = (size_t)pictures, in_count = n * (size_t)size * (size_t)size * 3, out_count = n * vae_numel(v, way);
    float *in = mem_array(in_count, sizeof *in), *out = mem_array(out_count, sizeof *out);
    if (!in || !out) return fail("no memory");
    for (size_t i = 0; i < in_count; i++) in[i] = (float)(i * 2654435761u % 2000) / 1000 - 1;
    for (int i = 0; i <= runs; i++) { // the first warms up
        double cpu = cpu_now();
        start = now();
        if (vae_start(v, way, in, pictures, &e) || vae_step(v, INFINITY, &e)) return fail(e.text);
        if (k->download(k, out, NULL, 0)) return fail(k->why); // waits
        double done = now() - start;
        if (vae_read(v, out, &e)) return fail(e.text);
        double s = now() - start;
        if (i && done < best_done) best_done = done;
        cpu = cpu_now() - cpu;
        if (i && s < best) best = s;
        if (i && cpu < best_cpu) best_cpu = cpu; // neighbours on the machine disturb it less
    }
    printf("sitd %s %d px, %d together, %s: %.4f s (%.4f before the pictures are read), of processors %.3f s (%.0f GFLOP/s as written); made in "
           "%.2f s, holds %.0f MiB, peak %.0f MiB with the weights it was made from\n",
           way == VAE_DECODE ? "decode" : "encode", size, pictures, k->device, best, best_done, best_cpu,
           (double)pictures * vae_flops(v, way) / best_done / 1e9, made,
           (double)vae_bytes(v) / 1048576, peak_mib());
    vae_free(v);
    mem_free(in), mem_free(out);
    kern_close(k);
    return 0;
}
