// SPDX-License-Identifier: MIT
/*
 * bench-ops: times the case list of tests/ops.
 *   bench-ops [-b backend] [-t threads] [-r rows,rows..] [-s seconds a case] [-o file.csv] [name ...]
 * Each case runs for a while; the best of its rounds is printed, as a shared machine only ever slows things down. Rows are timed
 * through the op itself, nets through k->rows, as models run. The last column is the work per second of processor time (all
 * threads together), which neighbours on the machine disturb much less than the clock on the wall: times the number of threads it
 * says what an idle machine would give.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "tests/ops/cases.h"

static const struct op_case extra[] = {
    // too large for the tests' reference
    {.name = "net, SiT-B/2", .op = OP_NET, .T = 256, .C = 768, .N = 3072, .H = 12, .depth = 12},
    {.name = "net, SiT-B/2 bf16", .op = OP_NET, .dtype = KERN_BF16, .T = 256, .C = 768, .N = 3072, .H = 12, .depth = 12},
    {.name = "fc1, XL", .op = OP_LINEAR, .T = 256, .C = 1152, .N = 4608, .act = KERN_GELU_TANH},
    {.name = "fc2, XL", .op = OP_LINEAR, .T = 256, .C = 4608, .N = 1152},
    {.name = "fc1, XL bf16", .op = OP_LINEAR, .dtype = KERN_BF16, .T = 256, .C = 1152, .N = 4608, .act = KERN_GELU_TANH},
};

static double clock_now(clockid_t clock) {
    struct timespec ts;
    clock_gettime(clock, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}
static double now(void) { return clock_now(CLOCK_MONOTONIC); }

static double best_time(struct op_run *o, double seconds, double *best_cpu) {
    double best = INFINITY, start = now();
    *best_cpu = INFINITY;
    int repeat = 1;
    op_run(o);
    do { // rounds of about a millisecond, or one run
        double t = now(), cpu = clock_now(CLOCK_PROCESS_CPUTIME_ID);
        for (int i = 0; i < repeat; i++) op_run(o);
        t = (now() - t) / repeat;
        cpu = (clock_now(CLOCK_PROCESS_CPUTIME_ID) - cpu) / repeat;
        if (t < best) best = t, *best_cpu = cpu;
        repeat = best > 1e-3 ? 1 : (int)(1e-3 / best) + 1;
    } while (now() - start < seconds);
    return best;
}

static void bench(const struct op_case *c, struct kern *k, int R, double seconds, FILE *csv) {
    struct op_run o;
    if (op_open(&o, k, c, R, NULL)) {
        printf("%-26s %s\n", c->name, k->why);
        return;
    }
    double cpu, t = best_time(&o, seconds, &cpu), flops = op_flops(c, R), bytes = op_bytes_moved(c, R);
    printf("%-26s T %4d C %4d N %4d R %3d %s %10.1f us", c->name, c->T, c->C, c->N, R, c->dtype == KERN_BF16 ? "bf16" : "f32 ",
           t * 1e6);
    if (flops > 0) printf(" %8.1f GFLOP/s %8.1f a processor second\n", flops / t * 1e-9, flops / cpu * 1e-9);
    else if (bytes > 0) printf(" %8.1f GB/s %11.1f a processor second\n", bytes / t * 1e-9, bytes / cpu * 1e-9);
    else printf("\n");
    if (csv)
        fprintf(csv, "\"%s\",%s,%d,%d,%d,%d,%s,%d,%.9g,%.9g,%.6g,%.6g\n", c->name, k->name, k->threads, c->T, c->C, c->N,
                c->dtype == KERN_BF16 ? "bf16" : "f32", R, t, cpu, flops / t * 1e-9, bytes / t * 1e-9);
    fflush(stdout);
    op_close(&o);
}

static bool wanted(const struct op_case *c, char **names, int n) {
    for (int i = 0; i < n; i++)
        if (strstr(c->name, names[i])) return true;
    return n == 0 && c->bench;
}

int main(int argc, char **argv) {
    struct kern_config cfg = {.backend = "cpu"};
    const char *rows = "1,2,16", *out = NULL;
    double seconds = 0.3;
    for (int opt; (opt = getopt(argc, argv, "b:t:r:s:o:")) != -1;) {
        if (opt == 'b') cfg.backend = optarg;
        else if (opt == 't') cfg.threads = atoi(optarg);
        else if (opt == 'r') rows = optarg;
        else if (opt == 's') seconds = atof(optarg);
        else if (opt == 'o') out = optarg;
        else
            return fprintf(stderr,
                           "usage: bench-ops [-b backend] [-t threads] [-r rows,rows] [-s seconds] [-o file.csv] [name ...]\n"),
                   2;
    }
    FILE *csv = out ? fopen(out, "w") : NULL;
    if (out && !csv) return perror(out), 1;
    if (csv) fprintf(csv, "case,backend,threads,T,C,N,dtype,rows,seconds,processor_seconds,gflops,gbytes\n");
    for (cfg.act = KERN_F32; cfg.act <= KERN_BF16; cfg.act++) {
        struct kern *k;
        char why[256];
        if (kern_open(&k, &cfg, why, sizeof why)) {
            printf("%s: %s\n", cfg.backend, why);
            continue;
        }
        printf("%s: %s\n", k->name, k->device);
        for (int i = 0; i < op_cases_n + (int)(sizeof extra / sizeof *extra); i++) {
            const struct op_case *c = i < op_cases_n ? &op_cases[i] : &extra[i - op_cases_n];
            if (c->dtype != cfg.act || !wanted(c, argv + optind, argc - optind)) continue;
            for (const char *r = rows; r; r = strchr(r, ',') ? strchr(r, ',') + 1 : NULL) bench(c, k, atoi(r), seconds, csv);
        }
        kern_close(k);
    }
    if (csv) fclose(csv);
    return 0;
}
