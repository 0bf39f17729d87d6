// SPDX-License-Identifier: MIT
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/engine/replay.h"
#include "server/cmd.h"

static const char help[] =
    "usage: sitd replay --model PATH [options] CASE...\n\n"
    "Runs recorded cases through a model and prints the error against what was recorded, one line each:\n"
    "NAME rel_l2=... max_abs=... ok|FAIL. Exit status 1 if any fails. Of a training case these are the numbers\n"
    "of the gradient that is farthest off, followed by its name and by the error of the losses, which may be a\n"
    "tenth of what gradients may.\n\n"
    "  --model PATH         a model directory, or a bare .pt or .safetensors\n"
    "  --rtol R             relative L2 error allowed (default: 1e-5 forward, 1e-4 fixed steps and\n"
    "                       gradients, 1e-3 dopri5)\n"
    "  --heads N            attention heads, instead of the case's\n"
    "  --backend NAME       cpu (default), cuda, ref, or auto\n"
    "  --precision P        f32 (default), tf32, bf16, f16, fp8, fp8-static\n"
    "  --threads N          compute threads (default: what the machine allows)\n";

static int usage(const char *what, const char *value) {
    fprintf(stderr, "sitd replay: %s%s\n%s", what, value, help);
    return 2;
}

struct options {
    const char *model;
    double rtol;
    int heads;
    struct kern_config kern;
};

static bool whole_number(int *out, const char *text) {
    char *end;
    long v = strtol(text, &end, 10);
    *out = (int)v;
    return *text && !*end && v >= 1 && v <= 65536;
}

// 0, or the exit status + 1
static int parse(struct options *o, int argc, char **argv) {
    static const struct option longs[] = {{"model", 1, 0, 'm'},     {"rtol", 1, 0, 'r'},      {"heads", 1, 0, 'n'}, {"backend", 1, 0, 'b'},
                                          {"precision", 1, 0, 'p'}, {"threads", 1, 0, 't'}, {"help", 0, 0, 'h'},  {0}};
    char *end;
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) switch (c) {
        case 'm': o->model = optarg; break;
        case 'r':
            o->rtol = strtod(optarg, &end);
            if (!*optarg || *end || !(o->rtol > 0)) return 1 + usage("--rtol wants a positive number, not ", optarg);
            break;
        case 'n':
            if (!whole_number(&o->heads, optarg)) return 1 + usage("--heads wants a whole number, not ", optarg);
            break;
        case 'b': o->kern.backend = optarg; break;
        case 'p':
            if (!kern_precision(&o->kern, optarg)) return 1 + usage("--precision is " KERN_PRECISIONS ", not ", optarg);
            break;
        case 't':
            if (!whole_number(&o->kern.threads, optarg)) return 1 + usage("--threads wants a whole number, not ", optarg);
            break;
        case 'h': return fputs(help, stdout), 1;
        default: return 1 + usage("see the options", "");
    }
    if (!o->model) return 1 + usage("--model is missing", "");
    if (optind == argc) return 1 + usage("no case given", "");
    return 0;
}

static bool run_case(struct replay *r, const char *path, double rtol) {
    struct replay_result result;
    struct err e = {0};
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    int length = (int)strlen(name);
    if (length > 12 && !strcmp(name + length - 12, ".safetensors")) length -= 12;
    if (replay_case(r, path, &result, &e)) {
        printf("%.*s error: %s FAIL\n", length, name, e.text);
        return false;
    }
    double most = rtol > 0 ? rtol : result.tolerance;
    bool ok = result.finite && result.rel_l2 <= most && result.loss <= most / 10;
    printf("%.*s rel_l2=%.3g max_abs=%.3g ", length, name, result.rel_l2, result.max_abs);
    if (*result.worst) printf("worst=%s loss=%.3g ", result.worst, result.loss);
    puts(ok ? "ok" : "FAIL");
    return ok;
}

int cmd_replay(int argc, char **argv) {
    struct options o = {.kern = {.backend = "cpu"}};
    int rc = parse(&o, argc, argv);
    if (rc) return rc - 1;
    char why[256];
    struct kern *k;
    struct replay *r = NULL;
    struct err e = {0};
    if (kern_open(&k, &o.kern, why, sizeof why)) return fprintf(stderr, "sitd replay: %s\n", why), 69;
    if (replay_open(&r, k, o.model, o.heads, &e)) {
        fprintf(stderr, "sitd replay: %s\n", e.text);
        kern_close(k);
        return status_exit_code(e.status);
    }
    int failed = 0;
    for (int i = optind; i < argc; i++) failed += !run_case(r, argv[i], o.rtol);
    replay_close(r);
    kern_close(k);
    return failed > 0;
}
