// SPDX-License-Identifier: MIT
#include "server/cmd_sample.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "core/base/mem.h"


static const char help[] =
    "usage: sitd sample --model DIR [options] --out FILE.png\n"
    "       sitd sample --model DIR [options] --npz FILE.npz --num N\n\n"
    "Samples images without a server: one PNG, or a grid of several; or many into one numpy archive, for evaluation.\n\n"
    "  --model DIR            a model directory\n"
    "  --out FILE             a PNG of all images as a grid; with a %d in it, one file an image\n"
    "  --columns N            columns of the grid (default: 10 at most)\n"
    "  --classes LIST         labels or class numbers, separated by commas; 'null' is unconditional (default: each class once)\n"
    "  --n N                  so many of each class in turn (default 1)\n"
    "  --npz FILE --num N     N images as arr_0, uint8 [N, height, width, 3], as the ADM evaluator reads them. Interrupted, the same\n"
    "                         command continues what FILE.part holds\n"
    "  --labels random|balanced  of --npz: drawn evenly by the seed (default), or each class in turn\n"
    "  --seed N               default: random, printed; with --npz 0\n"
    "  --rng native|torch-cpu the noise that torch.manual_seed(seed) gave the authors' scripts on the CPU (default native)\n"
    "  --type ode|sde|ddpm|ddim|edm  --method NAME  --steps N  --interpolant linear|gvp|vp   (default: as the model's family is sampled)\n"
    "  --denoise true|false                                                       ode\n"
    "  --atol X  --rtol X  --max-evaluations N                                    ode, method dopri5\n"
    "  --w-t FORM|'[[T,W],...]'  --w-t-scale X  --w-t-eta X  --last-step NAME  --last-step-size X      sde\n"
    "  --spacing NAME  --clip true|false  --eta X                                 ddpm, ddim; ddim\n"
    "  --churn X  --s-min X  --s-max X  --s-noise X  --rho X  --sigma-min X  --sigma-max X             edm\n"
    "  --guidance X           guidance scale (default 1)\n"
    "  --request JSON         further fields, as in POST /v1/samples\n"
    "  --backend auto|cpu|cuda|ref  --precision f32|tf32|bf16|f16|fp8|fp8-static  --threads N  --max-rows N\n";

int sample_usage(const char *what, const char *value) {
    fprintf(stderr, "sitd sample: %s%s\n`sitd sample --help` lists the options\n", what, value);
    return 2;
}

enum { O_MODEL = 256, O_OUT, O_COLUMNS, O_CLASSES, O_N, O_SEED, O_RNG, O_GUIDANCE, O_INTERPOLANT, O_REQUEST, O_BACKEND, O_PRECISION, O_THREADS,
       O_ROWS, O_HELP, O_NPZ, O_NUM, O_LABELS, O_SAMPLER }; // O_SAMPLER + i: sampler_fields[i]

static const struct { const char *flag, *field; enum { TEXT, WHOLE, REAL, JSON } type; } sampler_fields[] = {
    {"type", "type", TEXT},         {"method", "method", TEXT},       {"steps", "steps", WHOLE},
    {"w-t", "w_t", JSON},           {"w-t-scale", "w_t_scale", REAL}, {"last-step", "last_step", TEXT},
    {"last-step-size", "last_step_size", REAL}, {"atol", "atol", REAL}, {"rtol", "rtol", REAL},
    {"max-evaluations", "max_evaluations", WHOLE}, {"w-t-eta", "w_t_eta", REAL}, {"spacing", "spacing", TEXT}, {"eta", "eta", REAL},
    {"clip", "clip", JSON}, {"denoise", "denoise", JSON}, {"churn", "churn", REAL}, {"s-min", "s_min", REAL}, {"s-max", "s_max", REAL}, {"s-noise", "s_noise", REAL},
    {"rho", "rho", REAL}, {"sigma-min", "sigma_min", REAL}, {"sigma-max", "sigma_max", REAL},
};
#define SAMPLER_FIELDS (sizeof sampler_fields / sizeof *sampler_fields)

static bool whole(const char *text, long long least, long long most, long long *out) {
    char *end;
    *out = strtoll(text, &end, 10);
    return *text && !*end && *out >= least && *out <= most;
}

// A number as JSON: whole where it is written so, since the codec tells 50 from 50.0. NULL if it is no number.
static json_t *number(const char *text) {
    char *end;
    long long i = strtoll(text, &end, 10);
    if (*text && !*end) return json_integer(i);
    double d = strtod(text, &end);
    return *text && !*end ? json_real(d) : NULL;
}

// A list, true or false as they are; any other text is a name, for the codec to judge.
static json_t *name_or_json(const char *text) {
    json_t *v = json_loads(text, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES, NULL);
    if (json_is_array(v) || json_is_boolean(v)) return v;
    json_decref(v);
    return json_string(text);
}

static int sampler_flag(struct sample_options *o, int i, const char *value) {
    int type = sampler_fields[i].type;
    json_t *v = type == TEXT ? json_string(value) : type == JSON ? name_or_json(value) : number(value);
    char flag[64];
    snprintf(flag, sizeof flag, "--%s wants a number, not ", sampler_fields[i].flag);
    return v ? json_object_set_new(o->sampler, sampler_fields[i].field, v) : sample_usage(flag, value);
}

static int option(struct sample_options *o, int c) {
    long long v;
    json_t *j;
    switch (c) {
    case O_MODEL: o->model = optarg; return 0;
    case O_OUT: o->out = optarg; return 0;
    case O_NPZ: o->npz = optarg; return 0;
    case O_NUM: return whole(optarg, 1, 1LL << 32, &o->num) ? 0 : sample_usage("--num wants 1..4294967296, not ", optarg);
    case O_LABELS: o->labels = optarg; return 0;
    case O_CLASSES: o->classes = optarg; return 0;
    case O_REQUEST: o->request = optarg; return 0;
    case O_BACKEND: o->backend = optarg; return 0;
    case O_PRECISION: o->precision = optarg; return 0;
    case O_INTERPOLANT: return json_object_set_new(o->body, "interpolant", json_string(optarg));
    case O_SEED: return json_object_set_new(o->body, "seed", json_string(optarg));
    case O_RNG: return json_object_set_new(o->body, "rng", json_string(optarg));
    case O_GUIDANCE:
        j = number(optarg);
        return j ? json_object_set_new(o->body, "guidance", json_pack("{s:o}", "scale", j)) : sample_usage("--guidance wants a number, not ", optarg);
    case O_COLUMNS: return whole(optarg, 1, 1024, &v) ? o->columns = (int)v, 0 : sample_usage("--columns wants 1..1024, not ", optarg);
    case O_N: return whole(optarg, 1, 1024, &v) ? o->n = (int)v, 0 : sample_usage("--n wants 1..1024, not ", optarg);
    case O_THREADS: return whole(optarg, 1, 4096, &v) ? o->threads = (int)v, 0 : sample_usage("--threads wants 1..4096, not ", optarg);
    case O_ROWS: return whole(optarg, 2, 4096, &v) ? o->max_rows = (int)v, 0 : sample_usage("--max-rows wants 2..4096, not ", optarg);
    default: return c >= O_SAMPLER && c < O_SAMPLER + (int)SAMPLER_FIELDS ? sampler_flag(o, c - O_SAMPLER, optarg) : sample_usage("see the options", "");
    }
}

#define PLAIN 18 // options that are no field of "sampler"

static int check_export(const struct sample_options *o) {
    if (o->out || o->classes || o->columns || o->n != 1)
        return sample_usage(o->out ? "--out" : o->classes ? "--classes" : o->columns ? "--columns" : "--n", " does not go with --npz");
    if (!o->num) return sample_usage("--num is missing: how many images --npz is to hold", "");
    if (o->labels && strcmp(o->labels, "random") && strcmp(o->labels, "balanced"))
        return sample_usage("--labels wants random or balanced, not ", o->labels);
    return 0;
}

int sample_parse(struct sample_options *o, int argc, char **argv) {
    struct option longs[SAMPLER_FIELDS + PLAIN + 1] = {
        {"model", 1, 0, O_MODEL}, {"out", 1, 0, O_OUT}, {"columns", 1, 0, O_COLUMNS}, {"classes", 1, 0, O_CLASSES}, {"n", 1, 0, O_N},
        {"seed", 1, 0, O_SEED}, {"rng", 1, 0, O_RNG}, {"guidance", 1, 0, O_GUIDANCE}, {"interpolant", 1, 0, O_INTERPOLANT}, {"request", 1, 0, O_REQUEST},
        {"backend", 1, 0, O_BACKEND}, {"precision", 1, 0, O_PRECISION}, {"threads", 1, 0, O_THREADS}, {"max-rows", 1, 0, O_ROWS}, {"help", 0, 0, O_HELP},
        {"npz", 1, 0, O_NPZ}, {"num", 1, 0, O_NUM}, {"labels", 1, 0, O_LABELS}};
    for (size_t i = 0; i < SAMPLER_FIELDS; i++) longs[PLAIN + i] = (struct option){sampler_fields[i].flag, 1, 0, O_SAMPLER + (int)i};
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        if (c == O_HELP) return fputs(help, stdout), 1;
        if (option(o, c)) return 1 + 2;
    }
    if (optind < argc) return 1 + sample_usage("not an option: ", argv[optind]);
    if (!o->model) return 1 + sample_usage("--model is missing", "");
    if (o->npz) return check_export(o) ? 1 + 2 : 0;
    if (o->num || o->labels) return 1 + sample_usage(o->num ? "--num" : "--labels", " goes with --npz only");
    if (!o->out) return 1 + sample_usage("--out is missing", "");
    const char *percent = strchr(o->out, '%');
    if (percent && (strncmp(percent, "%d", 2) || strchr(percent + 1, '%'))) return 1 + sample_usage("--out may hold one %d and no other %, it is ", o->out);
    return 0;
}

/* ---- the request ---- */

static int add_class(json_t *classes, const char *name, size_t length, int n) {
    char text[256];
    long long id;
    snprintf(text, sizeof text, "%.*s", (int)length, name);
    for (int i = 0; i < n; i++)
        if (json_array_append_new(classes, !strcmp(text, "null") ? json_null() : whole(text, 0, 1 << 30, &id) ? json_integer(id) : json_string(text))) return -1;
    return 0;
}

// The "classes" of the request: each one of the list (or of the model), n times.
static json_t *class_list(const struct sample_options *o, const struct engine_model *model) {
    json_t *classes = json_array();
    int rc = classes ? 0 : -1;
    char id[24];
    if (!o->classes)
        for (int i = 0; i < model->desc.arch.num_classes && i < 100 && rc == 0; i++)
            rc = add_class(classes, id, (size_t)snprintf(id, sizeof id, "%d", i), o->n);
    for (const char *s = o->classes; s && rc == 0;) {
        size_t length = strcspn(s, ",");
        rc = add_class(classes, s, length, o->n);
        s = s[length] ? s + length + 1 : NULL;
    }
    if (rc == 0) return classes;
    json_decref(classes);
    return NULL;
}

// What --npz decides, a request cannot; and it has a seed, so that the same command continues what it began.
static int export_fields(const struct sample_options *o, const json_t *more) {
    static const char *const taken[] = {"class", "classes", "n", "timeout_ms"};
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++)
        if (json_object_get(more, taken[i])) return sample_usage("--npz takes no such field in --request: ", taken[i]);
    if (!json_object_get(o->body, "seed")) json_object_set_new(o->body, "seed", json_integer(0));
    return json_object_set_new(o->body, "class", json_integer(0)); // stands for those that --labels gives
}

int sample_request(struct resolved *out, struct sample_options *o, const struct engine_model *model) {
    uint64_t random;
    struct http_error he;
    struct request *request = NULL;
    char *text = NULL;
    if (getrandom(&random, sizeof random, 0) != sizeof random) return fprintf(stderr, "sitd sample: no random seed to be had\n"), 1;
    if (json_object_size(o->sampler) == 0) json_object_del(o->body, "sampler");
    json_error_t je;
    json_t *more = o->request ? json_loads(o->request, JSON_REJECT_DUPLICATES, &je) : NULL;
    if (o->request && !json_is_object(more)) return json_decref(more), sample_usage("--request wants a JSON object, not ", o->request);
    if (o->npz && export_fields(o, more)) return json_decref(more), 2;
    if (more) json_object_update(o->body, more);
    json_decref(more);
    if (!json_object_get(o->body, "classes") && !json_object_get(o->body, "class"))
        json_object_set_new(o->body, "classes", class_list(o, model));
    text = json_dumps(o->body, JSON_COMPACT);
    int rc = text ? request_parse(&request, text, strlen(text), &he) : http_error_set(&he, 500, "no_memory", "", "no memory");
    if (rc == 0) rc = request_resolve(out, request, model, random >> 11, &he);
    if (rc) fprintf(stderr, "sitd sample: %s\n", he.message);
    request_free(request);
    free(text);
    return rc ? 2 : 0;
}
