// SPDX-License-Identifier: MIT
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/import.h"
#include "core/io/model_publish.h"
#include "server/cmd.h"

static const char help[] =
    "usage: sitd import FILE|FOLDER --name NAME --out DIR [options]\n\n"
    "Makes the model directory DIR/NAME from a checkpoint (.pt, safetensors, a diffusers folder): the EMA weights where there are any.\n"
    "What the tensors do not prove is taken from a flag, else from the file's own args, else from the published widths.\n\n"
    "  --name NAME               of the model: letters, digits, '-', '_' and '.'\n"
    "  --out DIR                 where model directories live\n"
    "  --family sit|dit|maskdit|sd-dit  continuous time (SiT), discrete time (DiT), EDM (MaskDiT, SD-DiT)\n"
    "  --path linear|gvp|vp      the interpolant that the model was trained on (sit)\n"
    "  --prediction velocity|noise|score\n"
    "  --time forward|reversed   noise at 0 (SiT's code, default) or at 1 (REPA) inside the network (sit)\n"
    "  --compat none|diffusers   the authors' numbers (default) or diffusers' (dit)\n"
    "  --heads N                 attention heads\n"
    "  --decoder-heads N         attention heads of the decoder (maskdit, sd-dit)\n"
    "  --classes N               classes, when the label table has no row for the null class\n"
    "  --input-size N            side of the input, when the file has no pos_embed\n"
    "  --guidance-channels N|all leading channels that guidance changes (default 3, the official rule)\n"
    "  --vae PATH                an AutoencoderKL (file, or diffusers' folder) that is put into the directory: samples become pictures\n"
    "  --latent-scale X          the network's input is the VAE's latent times X (default: the VAE's, else 0.18215 with 4 channels)\n"
    "  --latent-mean X,X,... --latent-std X,X,...  or (latent - mean)/std, a number a channel\n"
    "  --labels FILE             a line a class, synonyms behind commas; or a JSON array as in model.json\n"
    "  --step N                  training steps\n"
    "  --storage f32|f16|bf16    how matrices are stored (default: as in the file); vectors stay f32\n"
    "  --default                 served when a request names no model\n"
    "  --help\n";

#define MAX_STATISTICS 256

struct request {
    const char *file, *name, *out, *labels, *vae;
    double mean[MAX_STATISTICS], std[MAX_STATISTICS];
    struct import_flags flags;
    enum dtype storage; // DT_OTHER: as it is
    bool is_default;
};

static int fail(const struct err *e) {
    fprintf(stderr, "sitd import: %s\n", e->text);
    return status_exit_code(e->status);
}

static bool parse_number(const char *flag, const char *text, long long max, long long *v) {
    char *end;
    errno = 0;
    *v = strtoll(text, &end, 10);
    if (!errno && end != text && !*end && *v >= 0 && *v <= max) return true;
    fprintf(stderr, "sitd import: --%s '%s' is not a number within 0 to %lld\n", flag, text, max);
    return false;
}

static bool parse_storage(const char *text, enum dtype *t) {
    static const struct {
        const char *name;
        enum dtype dtype;
    } known[] = {{"f32", DT_F32}, {"f16", DT_F16}, {"bf16", DT_BF16}};
    for (int i = 0; i < 3; i++)
        if (strcmp(text, known[i].name) == 0) return *t = known[i].dtype, true;
    fprintf(stderr, "sitd import: --storage must be f32, f16 or bf16, not '%s'\n", text);
    return false;
}

// Numbers separated by commas, at most `most` of them; *n stays 0 on failure.
static bool parse_reals(const char *flag, const char *text, double *v, int most, bool positive, int *n) {
    const char *at = text;
    *n = 0;
    for (int i = 0; i < most; i++) {
        char *end;
        v[i] = strtod(at, &end);
        if (end == at || !isfinite(v[i]) || (positive && !(v[i] > 0)) || (*end && *end != ',')) break;
        if (!*end) return *n = i + 1, true;
        at = end + 1;
    }
    fprintf(stderr, "sitd import: --%s '%.60s' must be %s%s\n", flag, text, most == 1 ? "a number" : "numbers separated by commas", positive ? " above 0" : "");
    return false;
}

static bool name_ok(const char *s) {
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
    return *s && *s != '.' && strlen(s) < MODEL_NAME_SIZE && strspn(s, allowed) == strlen(s);
}

static bool parse_option(struct request *r, int c, const char *name) {
    long long v = 0;
    switch (c) {
    case 'n':
        r->name = optarg;
        return name_ok(optarg) || (fprintf(stderr, "sitd import: --name '%s' is no name for a directory\n", optarg), false);
    case 'o':
        r->out = optarg;
        return true;
    case 'f':
        r->flags.family = optarg;
        return true;
    case 'p':
        r->flags.path = optarg;
        return true;
    case 'r':
        r->flags.prediction = optarg;
        return true;
    case 'T':
        r->flags.time = optarg;
        return true;
    case 'C':
        r->flags.compat = optarg;
        return true;
    case 'D':
        return parse_number(name, optarg, 1024, &v) ? (r->flags.decoder_heads = (int)v, true) : false;
    case 'V':
        r->vae = optarg;
        return true;
    case 'S':
        return parse_reals(name, optarg, &r->flags.latent_scale, 1, true, &(int){0});
    case 'M':
        return parse_reals(name, optarg, r->mean, MAX_STATISTICS, false, &r->flags.n_mean);
    case 'N':
        return parse_reals(name, optarg, r->std, MAX_STATISTICS, true, &r->flags.n_std);
    case 'l':
        r->labels = optarg;
        return true;
    case 'd':
        r->is_default = true;
        return true;
    case 't':
        return parse_storage(optarg, &r->storage);
    case 's':
        return parse_number(name, optarg, INT64_MAX, &v) ? (r->flags.step = v, true) : false;
    case 'g':
        if (strcmp(optarg, "all") == 0) return r->flags.guide_channels = -1, true;
        return parse_number(name, optarg, 4096, &v) ? (r->flags.guide_channels = (int)v, true) : false;
    case 'H':
        return parse_number(name, optarg, 1024, &v) ? (r->flags.heads = (int)v, true) : false;
    case 'c':
        return parse_number(name, optarg, 1 << 24, &v) ? (r->flags.classes = (int)v, true) : false;
    case 'i':
        return parse_number(name, optarg, 8192, &v) ? (r->flags.input_size = (int)v, true) : false;
    default:
        return false;
    }
}

static int parse(struct request *r, int argc, char **argv) { // -1: go on; else the exit code
    static const struct option options[] = {{"name", required_argument, NULL, 'n'},
                                            {"out", required_argument, NULL, 'o'},
                                            {"family", required_argument, NULL, 'f'},
                                            {"path", required_argument, NULL, 'p'},
                                            {"prediction", required_argument, NULL, 'r'},
                                            {"heads", required_argument, NULL, 'H'},
                                            {"classes", required_argument, NULL, 'c'},
                                            {"input-size", required_argument, NULL, 'i'},
                                            {"guidance-channels", required_argument, NULL, 'g'},
                                            {"time", required_argument, NULL, 'T'},
                                            {"compat", required_argument, NULL, 'C'},
                                            {"decoder-heads", required_argument, NULL, 'D'},
                                            {"vae", required_argument, NULL, 'V'},
                                            {"latent-scale", required_argument, NULL, 'S'},
                                            {"latent-mean", required_argument, NULL, 'M'},
                                            {"latent-std", required_argument, NULL, 'N'},
                                            {"labels", required_argument, NULL, 'l'},
                                            {"step", required_argument, NULL, 's'},
                                            {"storage", required_argument, NULL, 't'},
                                            {"default", no_argument, NULL, 'd'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    *r = (struct request){.flags = {.step = -1}, .storage = DT_OTHER};
    r->flags.latent_mean = r->mean;
    r->flags.latent_std = r->std;
    for (int c, at = 0; (c = getopt_long(argc, argv, "h", options, &at)) != -1;) {
        if (c == 'h') return fputs(help, stdout) < 0;
        if (!parse_option(r, c, options[at].name)) return 2;
    }
    if (optind + 1 != argc || !r->name || !r->out) {
        fprintf(stderr, "sitd import: needs one FILE, --name and --out (see --help)\n");
        return 2;
    }
    r->file = argv[optind];
    return -1;
}

static int read_labels(struct model_desc *d, const char *path, struct err *e) {
    void *text;
    size_t n;
    if (!path) return OK;
    int rc = file_read(&text, &n, path, 1 << 24, e);
    if (rc != OK) return rc;
    if ((rc = model_desc_labels(d, text, n, e)) != OK) err_prefix(e, "%s", path);
    mem_free(text);
    return rc;
}

static int publish(const struct request *r, const struct checkpoint *c, struct model_desc *d, struct err *e) {
    struct import_table it;
    char *dir = mem_printf("%s/%s", r->out, r->name);
    if (!dir) return err_set(e, E_NOMEM, "no memory");
    int rc = r->flags.vae ? import_vae(d, dir, r->flags.vae, e) : OK;
    if (rc == OK && (rc = import_convert(&it, &c->table, r->storage, e)) == OK) {
        rc = model_publish(dir, d, &it.table, e);
        size_t bytes = 0;
        for (int i = 0; i < it.table.n; i++) bytes += it.table.tensors[i].bytes;
        if (rc == OK)
            printf("%s/%s: %d tensors, %.1f MB, step %lld, SHA-256 %s\n", dir, d->weights_file, it.table.n, (double)bytes / 1e6,
                   (long long)d->step, d->weights_sha256);
        import_free(&it);
    }
    mem_free(dir);
    return rc;
}

static int describe_and_publish(struct request *r, const struct checkpoint *c, struct err *e) {
    struct model_desc d;
    struct import_fact facts[IMPORT_FACTS];
    int n = 0, rc = import_describe(&d, facts, &n, c, &r->flags, e);
    if (rc == OK) rc = import_require(facts, n, e);
    if (rc == OK) rc = arch_check(&d.arch, e);
    if (rc == OK) rc = read_labels(&d, r->labels, e);
    d.is_default = r->is_default;
    if (rc == OK) rc = publish(r, c, &d, e);
    for (int i = 0; i < n && rc == OK; i++) printf("  %-18s %-10s from %s\n", facts[i].field, facts[i].value, facts[i].source);
    if (rc == OK && !r->flags.vae && d.arch.in_channels != 1 && d.arch.in_channels != 3)
        fprintf(stderr, "sitd import: its samples have %d channels: to serve pictures of them, import it again with --vae\n", d.arch.in_channels);
    model_desc_deinit(&d);
    return rc;
}

static int import(struct request *r, struct err *e) {
    struct checkpoint c;
    struct vae_file vae;
    int rc = checkpoint_open(&c, r->file, e);
    if (rc != OK) return rc;
    if (r->vae) rc = vae_file_open(&vae, r->vae, NULL, e);
    if (r->vae && rc == OK) r->flags.vae = &vae;
    if (rc == OK) rc = describe_and_publish(r, &c, e);
    if (r->flags.vae) vae_file_close(&vae);
    checkpoint_close(&c);
    return rc;
}

int cmd_import(int argc, char **argv) {
    struct request r;
    struct err e = {0};
    int code = parse(&r, argc, argv);
    if (code >= 0) return code;
    return import(&r, &e) == OK ? 0 : fail(&e);
}
