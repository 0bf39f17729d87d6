// SPDX-License-Identifier: MIT
/*
 * model_json: model.json's text to struct model_desc and back (declared in model_dir.h, format there).
 *
 * Everything is checked here, once, so that the layers above may trust a desc: required fields, types, ranges, file names,
 * unknown fields. family "sit" needs path and prediction; "dit" (discrete time, learned range), "maskdit" and "sd-dit" (EDM) have
 * neither and refuse them. What a family alone decides of the network (one-hot labels) is set here too.
 */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/jsonio.h"
#include "core/io/model_dir.h"

#define MAX_LABEL 200  // bytes of one name
#define MAX_NAMES 64   // of one class
#define MAX_KNOTS 4096 // of the loss curve

struct reader { // one JSON object with its place in the document
    json_t *obj;
    const char *at; // "architecture." or ""
    struct err *e;
};

static int refuse(struct reader *r, int status, const char *key, const char *why) {
    char shown[48], field[80];
    jsonio_printable(shown, sizeof shown, key);
    snprintf(field, sizeof field, "%s%s", r->at, shown);
    return err_param(r->e, status, field, "field '%s' %s", field, why);
}

static int only(struct reader *r, const char *const *known) {
    const char *key;
    json_t *v;
    json_object_foreach(r->obj, key, v) {
        int i = 0;
        while (known[i] && strcmp(known[i], key) != 0) i++;
        if (!known[i]) return refuse(r, E_FORMAT, key, "is not known");
    }
    return OK;
}

static int get_int(struct reader *r, const char *key, int64_t min, int64_t max, int64_t *dst) {
    json_t *v = json_object_get(r->obj, key);
    if (!v) return refuse(r, E_FORMAT, key, "is missing");
    if (!json_is_integer(v)) return refuse(r, E_FORMAT, key, "must be an integer");
    *dst = json_integer_value(v);
    if (*dst >= min && *dst <= max) return OK;
    char why[80];
    snprintf(why, sizeof why, "is %lld; allowed are %lld to %lld", (long long)*dst, (long long)min, (long long)max);
    return refuse(r, E_RANGE, key, why);
}

static int get_size(struct reader *r, const char *key, int *dst) { // arch_check knows the finer limits
    int64_t v = 0;
    int rc = get_int(r, key, 0, 1 << 24, &v);
    *dst = (int)v;
    return rc;
}

static int get_bool(struct reader *r, const char *key, bool absent, bool *dst) {
    json_t *v = json_object_get(r->obj, key);
    if (v && !json_is_boolean(v)) return refuse(r, E_FORMAT, key, "must be true or false");
    *dst = v ? json_is_true(v) : absent;
    return OK;
}

static int get_text(struct reader *r, const char *key, char *dst, size_t size) {
    json_t *v = json_object_get(r->obj, key);
    if (!v) return refuse(r, E_FORMAT, key, "is missing");
    if (!json_is_string(v)) return refuse(r, E_FORMAT, key, "must be a string");
    if (json_string_length(v) >= size) return refuse(r, E_RANGE, key, "is too long");
    snprintf(dst, size, "%s", json_string_value(v));
    return OK;
}

static int get_object(struct reader *r, const char *key, const char *at, struct reader *sub) {
    *sub = (struct reader){json_object_get(r->obj, key), at, r->e};
    if (!sub->obj) return refuse(r, E_FORMAT, key, "is missing");
    return json_is_object(sub->obj) ? OK : refuse(r, E_FORMAT, key, "must be an object");
}

static int get_choice(struct reader *r, const char *key, char *dst, size_t size, const char *const *choices, const char *why) {
    int rc = get_text(r, key, dst, size);
    if (rc != OK) return rc;
    for (int i = 0; choices[i]; i++)
        if (strcmp(dst, choices[i]) == 0) return OK;
    return refuse(r, E_UNSUPPORTED, key, why);
}

static int get_number(struct reader *r, const char *key, const json_t *v, double more_than, double *dst) {
    if (!json_is_number(v)) return refuse(r, E_FORMAT, key, "must hold numbers");
    *dst = json_number_value(v);
    return *dst > more_than && *dst <= 1e30 ? OK : refuse(r, E_RANGE, key, "holds a number out of range");
}

static bool is_masked(const char *family) { return strcmp(family, "maskdit") == 0 || strcmp(family, "sd-dit") == 0; }

static int parse_block(struct arch *a, struct reader *r) {
    static const char *const blocks[] = {"adaln-zero", "adaln", "cross-attention", "in-context", NULL};
    char name[24] = "adaln-zero";
    int rc = OK;
    if (json_object_get(r->obj, "block"))
        rc = get_choice(r, "block", name, sizeof name, blocks,
                        "must be \"adaln-zero\", \"adaln\", \"cross-attention\" or \"in-context\"");
    if (rc == OK) a->block = (enum arch_block)arch_block_parse(name);
    return rc;
}

static int parse_decoder(struct arch *a, const char *family, struct reader *top) {
    static const char *const known[] = {"hidden_size", "depth", "num_heads", NULL};
    struct reader r;
    if (!json_object_get(top->obj, "decoder")) return OK;
    if (!is_masked(family)) return refuse(top, E_CONFLICT, "decoder", "does not apply to this family");
    int rc = get_object(top, "decoder", "architecture.decoder.", &r);
    if (rc == OK) rc = only(&r, known);
    if (rc == OK) rc = get_size(&r, "hidden_size", &a->decoder.hidden_size);
    if (rc == OK) rc = get_size(&r, "depth", &a->decoder.depth);
    if (rc == OK && a->decoder.depth == 0) rc = refuse(&r, E_RANGE, "depth", "is 0; leave the decoder out instead");
    return rc == OK ? get_size(&r, "num_heads", &a->decoder.num_heads) : rc;
}

static int parse_arch(struct arch *a, const char *family, struct reader *top) {
    static const char *const known[] = {"input_size",      "patch_size",  "in_channels",   "hidden_size", "depth", "num_heads",
                                        "mlp_ratio",       "num_classes", "class_dropout", "learn_sigma", "block", "decoder",
                                        "block_embedders", NULL};
    struct reader r;
    int rc = get_object(top, "architecture", "architecture.", &r);
    if (rc == OK) rc = only(&r, known);
    if (rc == OK) rc = get_size(&r, "input_size", &a->input_size);
    if (rc == OK) rc = get_size(&r, "patch_size", &a->patch_size);
    if (rc == OK) rc = get_size(&r, "in_channels", &a->in_channels);
    if (rc == OK) rc = get_size(&r, "hidden_size", &a->hidden_size);
    if (rc == OK) rc = get_size(&r, "depth", &a->depth);
    if (rc == OK) rc = get_size(&r, "num_heads", &a->num_heads);
    if (rc == OK) rc = get_size(&r, "num_classes", &a->num_classes);
    if (rc == OK) rc = get_bool(&r, "class_dropout", true, &a->class_dropout);
    if (rc == OK) rc = get_bool(&r, "learn_sigma", true, &a->learn_sigma);
    if (rc == OK) rc = get_bool(&r, "block_embedders", false, &a->block_embedders);
    if (rc == OK && a->block_embedders && strcmp(family, "dit") != 0)
        rc = refuse(&r, E_CONFLICT, "block_embedders", "does not apply to this family");
    if (rc == OK) rc = parse_block(a, &r);
    if (rc == OK) rc = parse_decoder(a, family, &r);
    a->one_hot = is_masked(family);
    json_t *ratio = json_object_get(r.obj, "mlp_ratio");
    if (rc == OK && ratio && !json_is_number(ratio)) rc = refuse(&r, E_FORMAT, "mlp_ratio", "must be a number");
    a->mlp_ratio = ratio ? json_number_value(ratio) : 4;
    return rc == OK ? arch_check(a, r.e) : rc;
}

static int parse_guidance(struct model_desc *d, struct reader *top) {
    static const char *const known[] = {"channels", NULL};
    struct reader r;
    int64_t n = 0;
    int rc = get_object(top, "guidance", "guidance.", &r);
    if (rc == OK) rc = only(&r, known);
    if (rc != OK) return rc;
    json_t *v = json_object_get(r.obj, "channels");
    if (json_is_string(v) && strcmp(json_string_value(v), "all") == 0) n = -1;
    else if (v && !json_is_integer(v)) rc = refuse(&r, E_FORMAT, "channels", "must be \"all\" or a number of leading channels");
    else rc = get_int(&r, "channels", 1, 4096, &n);
    d->guide_channels = (int)n;
    return rc;
}

static bool is_label(const json_t *v) {
    size_t n = json_string_length(v);
    return json_is_string(v) && n > 0 && n <= MAX_LABEL && jsonio_plain(json_string_value(v), n);
}

static int parse_label(struct model_desc *d, int i, const json_t *v, struct reader *r) {
    size_t n = json_is_array(v) ? json_array_size(v) : 1;
    if (n < 1 || n > MAX_NAMES) return refuse(r, E_RANGE, "labels", "gives a class no name, or more than 64");
    if (!(d->labels[i].names = mem_array(n, sizeof *d->labels[i].names))) return err_set(r->e, E_NOMEM, "no memory for labels");
    for (size_t k = 0; k < n; k++) {
        const json_t *name = json_is_array(v) ? json_array_get(v, k) : v;
        if (!is_label(name))
            return refuse(r, E_FORMAT, "labels", "must hold names (1 to 200 bytes, no control characters) or lists of names");
        char *copy = mem_strdup(json_string_value(name));
        if (!copy) return err_set(r->e, E_NOMEM, "no memory for labels");
        d->labels[i].names[d->labels[i].n++] = copy;
    }
    return OK;
}

static int parse_labels(struct model_desc *d, struct reader *r) {
    json_t *v = json_object_get(r->obj, "labels"), *one;
    if (!v) return OK;
    if (!json_is_array(v)) return refuse(r, E_FORMAT, "labels", "must be an array");
    if (json_array_size(v) != (size_t)d->arch.num_classes) {
        char why[80];
        snprintf(why, sizeof why, "names %zu classes; architecture.num_classes is %d", json_array_size(v), d->arch.num_classes);
        return refuse(r, E_CONFLICT, "labels", why);
    }
    if (!(d->labels = mem_array((size_t)d->arch.num_classes, sizeof *d->labels)))
        return err_set(r->e, E_NOMEM, "no memory for labels");
    size_t i;
    json_array_foreach(v, i, one) {
        int rc = parse_label(d, (int)i, one, r);
        if (rc != OK) return rc;
    }
    return OK;
}

static json_t *label_line(const char *line,
                          size_t n) { // "ankle boot, boot" -> ["ankle boot", "boot"]; NULL: no memory, or not UTF-8
    json_t *names = json_array();
    for (const char *end = line + n; line <= end;) {
        const char *comma = memchr(line, ',', (size_t)(end - line)), *stop = comma ? comma : end, *next = stop + 1;
        while (line < stop && (*line == ' ' || *line == '\t')) line++;
        while (stop > line && (stop[-1] == ' ' || stop[-1] == '\t' || stop[-1] == '\r')) stop--;
        if (json_array_append_new(names, json_stringn(line, (size_t)(stop - line))) != 0) {
            json_decref(names);
            return NULL;
        }
        line = next;
    }
    return names;
}

static int label_lines(json_t **labels, const char *text, size_t len, struct err *e) {
    *labels = json_array();
    for (const char *at = text, *end = text + len, *stop; at < end; at = stop + 1) {
        stop = memchr(at, '\n', (size_t)(end - at));
        if (!stop) stop = end;
        if (!jsonio_plain(at, (size_t)(stop - at) - (stop > at && stop[-1] == '\r')))
            return err_param(e, E_FORMAT, "labels", "line %zu of the labels holds a control character or is not UTF-8",
                             json_array_size(*labels) + 1);
        if (json_array_append_new(*labels, label_line(at, (size_t)(stop - at))) != 0)
            return err_set(e, E_NOMEM, "no memory for labels");
    }
    return OK;
}

int model_desc_labels(struct model_desc *d, const char *text, size_t len, struct err *e) {
    json_t *root = json_object(), *labels = NULL;
    struct reader r = {root, "", e};
    int rc = root ? OK : err_set(e, E_NOMEM, "no memory for labels");
    if (rc == OK && len > 0 && text[0] == '[') rc = jsonio_parse(&labels, text, len, 2, 200000, "the labels", e);
    else if (rc == OK) rc = label_lines(&labels, text, len, e);
    if (rc != OK) json_decref(labels);
    if (rc == OK && json_object_set_new(root, "labels", labels) != 0) rc = err_set(e, E_NOMEM, "no memory for labels");
    if (rc == OK) rc = parse_labels(d, &r);
    json_decref(root);
    return rc;
}

// A plain name in the same directory: no separators, not hidden (so neither "." nor ".."), printable.
static bool is_file_name(const char *s) {
    return s[0] && s[0] != '.' && !strchr(s, '/') && !strchr(s, '\\') && jsonio_plain(s, strlen(s));
}

static bool is_digest(const char *s) { return strlen(s) == 64 && strspn(s, "0123456789abcdef") == 64; }

static int parse_kind(struct model_desc *d, struct reader *r) {
    static const char *const families[] = {"sit", "dit", "maskdit", "sd-dit", NULL},
                             *const paths[] = {"linear", "gvp", "vp", NULL},
                             *const predictions[] = {"velocity", "noise", "score", NULL};
    int rc =
        get_choice(r, "family", d->family, sizeof d->family, families, "must be \"sit\", \"dit\", \"maskdit\" or \"sd-dit\"");
    if (rc == OK && strcmp(d->family, "sit") == 0) {
        rc = get_choice(r, "path", d->path, sizeof d->path, paths, "must be \"linear\", \"gvp\" or \"vp\"");
        if (rc == OK)
            rc = get_choice(r, "prediction", d->prediction, sizeof d->prediction, predictions,
                            "must be \"velocity\", \"noise\" or \"score\"");
    } else if (rc == OK) {
        static const char *const continuous[] = {"path", "prediction", "time", "loss_curve"};
        char why[48];
        snprintf(why, sizeof why, "does not apply to family \"%s\"", d->family);
        for (size_t i = 0; rc == OK && i < sizeof continuous / sizeof *continuous; i++)
            if (json_object_get(r->obj, continuous[i])) rc = refuse(r, E_CONFLICT, continuous[i], why);
    }
    return rc;
}

// How the network's numbers differ from the authors': the direction of its time, diffusers' constants.
static int parse_variant(struct model_desc *d, struct reader *r) {
    static const char *const times[] = {"forward", "reversed", NULL}, *const compats[] = {"diffusers", NULL};
    char time[16] = "forward", compat[16] = "";
    int rc = OK;
    if (json_object_get(r->obj, "time"))
        rc = get_choice(r, "time", time, sizeof time, times, "must be \"forward\" or \"reversed\"");
    if (rc == OK && json_object_get(r->obj, "compat"))
        rc = get_choice(r, "compat", compat, sizeof compat, compats, "must be \"diffusers\"");
    if (rc == OK && compat[0] && strcmp(d->family, "dit") != 0)
        rc = refuse(r, E_CONFLICT, "compat", "applies to family \"dit\" only");
    d->arch.reversed = strcmp(time, "reversed") == 0;
    d->arch.negated = d->arch.reversed && strcmp(d->prediction, "velocity") == 0;
    d->arch.diffusers = compat[0] != 0;
    return rc;
}

static int parse_file(struct reader *r, char file[256], char sha256[65]) {
    static const char *const known[] = {"file", "sha256", NULL};
    int rc = only(r, known);
    if (rc == OK) rc = get_text(r, "file", file, 256);
    if (rc == OK && !is_file_name(file)) rc = refuse(r, E_FORMAT, "file", "must be the name of a file in the model's directory");
    if (rc == OK) rc = get_text(r, "sha256", sha256, 65);
    if (rc == OK && !is_digest(sha256)) rc = refuse(r, E_FORMAT, "sha256", "must be 64 lower-case hexadecimal digits");
    return rc;
}

static int parse_channels(double **dst, struct reader *r, const char *key, int channels, double more_than) {
    const json_t *v = json_object_get(r->obj, key);
    if (!v) return refuse(r, E_FORMAT, key, "is missing");
    if (!json_is_array(v) || json_array_size(v) != (size_t)channels) {
        char why[80];
        snprintf(why, sizeof why, "must be an array of a number a channel, %d", channels);
        return refuse(r, E_CONFLICT, key, why);
    }
    *dst = mem_array((size_t)channels, sizeof **dst);
    if (!*dst) return err_set(r->e, E_NOMEM, "no memory for latent statistics");
    for (int i = 0; i < channels; i++)
        if (get_number(r, key, json_array_get(v, (size_t)i), more_than, &(*dst)[i])) return r->e->status;
    return OK;
}

static int parse_latent(struct model_desc *d, struct reader *top) {
    static const char *const known[] = {"vae", "scale", "mean", "std", NULL};
    struct reader r, vae;
    struct latent *l = &d->latent;
    if (!json_object_get(top->obj, "latent")) return OK;
    int rc = get_object(top, "latent", "latent.", &r);
    if (rc == OK) rc = only(&r, known);
    if (rc == OK && json_object_get(r.obj, "vae")) {
        rc = get_object(&r, "vae", "latent.vae.", &vae);
        if (rc == OK) rc = parse_file(&vae, l->vae_file, l->vae_sha256);
    }
    if (rc != OK) return rc;
    const json_t *scale = json_object_get(r.obj, "scale");
    bool statistics = json_object_get(r.obj, "mean") || json_object_get(r.obj, "std");
    if (scale && statistics) return refuse(&r, E_CONFLICT, "scale", "and mean and std exclude each other");
    if (!scale && !statistics) return refuse(&r, E_FORMAT, "scale", "is missing (or mean and std)");
    if (scale) return get_number(&r, "scale", scale, 0, &l->scale);
    rc = parse_channels(&l->mean, &r, "mean", d->arch.in_channels, -1e30);
    return rc == OK ? parse_channels(&l->std, &r, "std", d->arch.in_channels, 0) : rc;
}

static int parse_loss_curve(struct model_desc *d, struct reader *r) {
    const json_t *v = json_object_get(r->obj, "loss_curve");
    size_t n = json_array_size(v);
    if (!v) return OK;
    if (n < 2 || n > MAX_KNOTS) return refuse(r, E_FORMAT, "loss_curve", "must be an array of 2 to 4096 pairs [t, loss]");
    if (!(d->loss_curve = mem_array(n, sizeof *d->loss_curve))) return err_set(r->e, E_NOMEM, "no memory for the loss curve");
    d->n_loss_curve = (int)n;
    double before = -1;
    for (size_t i = 0; i < n; i++) {
        const json_t *pair = json_array_get(v, i);
        struct loss_knot *k = &d->loss_curve[i];
        if (json_array_size(pair) != 2) return refuse(r, E_FORMAT, "loss_curve", "must be an array of 2 to 4096 pairs [t, loss]");
        if (get_number(r, "loss_curve", json_array_get(pair, 0), before, &k->t)) return r->e->status; // rising
        if (get_number(r, "loss_curve", json_array_get(pair, 1), 0, &k->loss)) return r->e->status;
        if (k->t < 0 || k->t > 1) return refuse(r, E_RANGE, "loss_curve", "holds a t outside 0 to 1");
        before = k->t;
    }
    return OK;
}

static int parse_root(struct model_desc *d, struct reader *r) {
    static const char *const known[] = {"format", "family",  "architecture", "path",   "prediction",
                                        "time",   "compat",  "guidance",     "latent", "loss_curve",
                                        "labels", "default", "weights",      "step",   NULL};
    struct reader weights;
    int64_t format;
    if (!json_is_object(r->obj)) return err_set(r->e, E_FORMAT, "model.json is not a JSON object");
    int rc = get_int(r, "format", 1, 1, &format);
    if (rc == OK) rc = only(r, known);
    if (rc == OK) rc = parse_kind(d, r);
    if (rc == OK) rc = parse_arch(&d->arch, d->family, r);
    if (rc == OK) rc = parse_variant(d, r);
    if (rc == OK) rc = parse_guidance(d, r);
    if (rc == OK) rc = parse_latent(d, r);
    if (rc == OK) rc = parse_loss_curve(d, r);
    if (rc == OK) rc = parse_labels(d, r);
    if (rc == OK) rc = get_bool(r, "default", false, &d->is_default);
    if (rc == OK) rc = get_object(r, "weights", "weights.", &weights);
    if (rc == OK) rc = parse_file(&weights, d->weights_file, d->weights_sha256);
    if (rc == OK && json_object_get(r->obj, "step")) rc = get_int(r, "step", 0, INT64_MAX, &d->step);
    return rc;
}

int model_desc_parse(struct model_desc *d, const char *json, size_t len, struct err *e) {
    json_t *root;
    *d = (struct model_desc){0};
    int rc = jsonio_parse(&root, json, len, 4, 200000, "model.json", e);
    if (rc != OK) return rc;
    struct reader r = {root, "", e};
    rc = parse_root(d, &r);
    json_decref(root);
    if (rc != OK) model_desc_deinit(d);
    return rc;
}

void model_desc_deinit(struct model_desc *d) {
    for (int i = 0; d->labels && i < d->arch.num_classes; i++) {
        for (int k = 0; k < d->labels[i].n; k++) mem_free(d->labels[i].names[k]);
        mem_free(d->labels[i].names);
    }
    mem_free(d->labels);
    mem_free(d->latent.mean);
    mem_free(d->latent.std);
    mem_free(d->loss_curve);
    *d = (struct model_desc){0};
}

// --- writing

static json_t *dump_labels(const struct model_desc *d) {
    json_t *all = json_array();
    bool ok = all;
    for (int i = 0; ok && i < d->arch.num_classes; i++) {
        json_t *names = d->labels[i].n == 1 ? json_string(d->labels[i].names[0]) : json_array();
        for (int k = 0; ok && d->labels[i].n > 1 && k < d->labels[i].n; k++)
            ok = json_array_append_new(names, json_string(d->labels[i].names[k])) == 0;
        ok = json_array_append_new(all, names) == 0 && ok;
    }
    if (ok) return all;
    json_decref(all);
    return NULL;
}

static bool put(json_t *root, const char *key, json_t *v) {
    return json_object_set_new(root, key, v) == 0;
} // false also for v == NULL

static json_t *dump_arch(const struct arch *a) {
    json_t *root = json_pack("{s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:i, s:b, s:b}", "input_size", a->input_size, "patch_size",
                             a->patch_size, "in_channels", a->in_channels, "hidden_size", a->hidden_size, "depth", a->depth,
                             "num_heads", a->num_heads, "mlp_ratio", a->mlp_ratio, "num_classes", a->num_classes, "class_dropout",
                             a->class_dropout, "learn_sigma", a->learn_sigma);
    bool ok = root;
    if (a->block != BLOCK_ADALN_ZERO) ok = ok && put(root, "block", json_string(arch_block_name(a->block)));
    if (a->block_embedders) ok = ok && put(root, "block_embedders", json_true());
    if (a->decoder.depth)
        ok = ok && put(root, "decoder",
                       json_pack("{s:i, s:i, s:i}", "hidden_size", a->decoder.hidden_size, "depth", a->decoder.depth, "num_heads",
                                 a->decoder.num_heads));
    if (ok) return root;
    json_decref(root);
    return NULL;
}

static json_t *dump_numbers(const double *v, int n) {
    json_t *all = json_array();
    for (int i = 0; all && i < n; i++)
        if (json_array_append_new(all, json_real(v[i])) != 0) return json_decref(all), NULL;
    return all;
}

static json_t *dump_latent(const struct latent *l, int channels) {
    json_t *root = json_object();
    bool ok = root;
    if (l->vae_file[0]) ok = ok && put(root, "vae", json_pack("{s:s, s:s}", "file", l->vae_file, "sha256", l->vae_sha256));
    if (l->mean)
        ok = ok && put(root, "mean", dump_numbers(l->mean, channels)) && put(root, "std", dump_numbers(l->std, channels));
    else ok = ok && put(root, "scale", json_real(l->scale));
    if (ok) return root;
    json_decref(root);
    return NULL;
}

static json_t *dump_loss_curve(const struct model_desc *d) {
    json_t *all = json_array();
    for (int i = 0; all && i < d->n_loss_curve; i++)
        if (json_array_append_new(all, dump_numbers((const double[]){d->loss_curve[i].t, d->loss_curve[i].loss}, 2)) != 0)
            return json_decref(all), NULL;
    return all;
}

char *model_desc_dump(const struct model_desc *d, struct err *e) {
    json_t *root = json_object();
    bool ok = put(root, "format", json_integer(1)) && put(root, "family", json_string(d->family)) &&
              put(root, "architecture", dump_arch(&d->arch));
    if (d->path[0]) ok = ok && put(root, "path", json_string(d->path));
    if (d->prediction[0]) ok = ok && put(root, "prediction", json_string(d->prediction));
    if (d->arch.reversed) ok = ok && put(root, "time", json_string("reversed"));
    if (d->arch.diffusers) ok = ok && put(root, "compat", json_string("diffusers"));
    if (d->latent.scale > 0 || d->latent.mean) ok = ok && put(root, "latent", dump_latent(&d->latent, d->arch.in_channels));
    if (d->loss_curve) ok = ok && put(root, "loss_curve", dump_loss_curve(d));
    ok = ok && put(root, "guidance",
                   json_pack("{s:o}", "channels", d->guide_channels < 0 ? json_string("all") : json_integer(d->guide_channels)));
    if (d->labels) ok = ok && put(root, "labels", dump_labels(d));
    if (d->is_default) ok = ok && put(root, "default", json_true());
    ok = ok && put(root, "weights", json_pack("{s:s, s:s}", "file", d->weights_file, "sha256", d->weights_sha256));
    ok = ok && put(root, "step", json_integer(d->step));
    char *dumped = ok ? jsonio_dump(root, JSON_INDENT(2) | JSON_REAL_PRECISION(15)) : NULL,
         *text = dumped ? mem_printf("%s\n", dumped) : NULL;
    mem_free(dumped);
    json_decref(root);
    if (!text) err_set(e, E_NOMEM, "model.json cannot be made: no memory, or a label that is not UTF-8");
    return text;
}
