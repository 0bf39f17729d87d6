// SPDX-License-Identifier: MIT
/*
 * model_json: model.json's text to struct model_desc and back (declared in model_dir.h, format there).
 *
 * Everything is checked here, once, so that the layers above may trust a desc: required fields, types, ranges, file names,
 * unknown fields. family "sit" needs path and prediction; "dit" (discrete time, learned range) has neither and refuses them.
 */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/jsonio.h"
#include "core/io/model_dir.h"

#define MAX_LABEL 200 // bytes of one name
#define MAX_NAMES 64  // of one class

struct reader { // one JSON object with its place in the document
    json_t *obj;
    const char *at; // "architecture." or ""
    struct err *e;
};

static int refuse(struct reader *r, int status, const char *key, const char *why) {
    char shown[48], field[64];
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

static int parse_arch(struct arch *a, struct reader *top) {
    static const char *const known[] = {"input_size", "patch_size",  "in_channels",   "hidden_size", "depth", "num_heads",
                                        "mlp_ratio",  "num_classes", "class_dropout", "learn_sigma", NULL};
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

static int parse_weights(struct model_desc *d, struct reader *top) {
    static const char *const known[] = {"file", "sha256", NULL};
    struct reader r;
    int rc = get_object(top, "weights", "weights.", &r);
    if (rc == OK) rc = only(&r, known);
    if (rc == OK) rc = get_text(&r, "file", d->weights_file, sizeof d->weights_file);
    if (rc == OK && !is_file_name(d->weights_file))
        rc = refuse(&r, E_FORMAT, "file", "must be the name of a file in the model's directory");
    if (rc == OK) rc = get_text(&r, "sha256", d->weights_sha256, sizeof d->weights_sha256);
    if (rc == OK && !is_digest(d->weights_sha256))
        rc = refuse(&r, E_FORMAT, "sha256", "must be 64 lower-case hexadecimal digits");
    return rc;
}

static int parse_kind(struct model_desc *d, struct reader *r) {
    static const char *const families[] = {"sit", "dit", NULL}, *const paths[] = {"linear", "gvp", "vp", NULL},
                             *const predictions[] = {"velocity", "noise", "score", NULL};
    int rc = get_choice(r, "family", d->family, sizeof d->family, families, "must be \"sit\" or \"dit\"");
    if (rc == OK && strcmp(d->family, "sit") == 0) {
        rc = get_choice(r, "path", d->path, sizeof d->path, paths, "must be \"linear\", \"gvp\" or \"vp\"");
        if (rc == OK)
            rc = get_choice(r, "prediction", d->prediction, sizeof d->prediction, predictions,
                            "must be \"velocity\", \"noise\" or \"score\"");
    } else if (rc == OK) {
        if (json_object_get(r->obj, "path")) rc = refuse(r, E_CONFLICT, "path", "does not apply to family \"dit\"");
        else if (json_object_get(r->obj, "prediction"))
            rc = refuse(r, E_CONFLICT, "prediction", "does not apply to family \"dit\"");
    }
    return rc;
}

static int parse_root(struct model_desc *d, struct reader *r) {
    static const char *const known[] = {"format", "family",  "architecture", "path", "prediction", "guidance",
                                        "labels", "default", "weights",      "step", NULL};
    int64_t format;
    if (!json_is_object(r->obj)) return err_set(r->e, E_FORMAT, "model.json is not a JSON object");
    int rc = get_int(r, "format", 1, 1, &format);
    if (rc == OK) rc = only(r, known);
    if (rc == OK) rc = parse_kind(d, r);
    if (rc == OK) rc = parse_arch(&d->arch, r);
    if (rc == OK) rc = parse_guidance(d, r);
    if (rc == OK) rc = parse_labels(d, r);
    if (rc == OK) rc = get_bool(r, "default", false, &d->is_default);
    if (rc == OK) rc = parse_weights(d, r);
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

static json_t *dump_arch(const struct arch *a) {
    return json_pack("{s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:i, s:b, s:b}", "input_size", a->input_size, "patch_size",
                     a->patch_size, "in_channels", a->in_channels, "hidden_size", a->hidden_size, "depth", a->depth, "num_heads",
                     a->num_heads, "mlp_ratio", a->mlp_ratio, "num_classes", a->num_classes, "class_dropout", a->class_dropout,
                     "learn_sigma", a->learn_sigma);
}

static bool put(json_t *root, const char *key, json_t *v) {
    return json_object_set_new(root, key, v) == 0;
} // false also for v == NULL

char *model_desc_dump(const struct model_desc *d, struct err *e) {
    json_t *root = json_object();
    bool ok = put(root, "format", json_integer(1)) && put(root, "family", json_string(d->family)) &&
              put(root, "architecture", dump_arch(&d->arch));
    if (d->path[0]) ok = ok && put(root, "path", json_string(d->path));
    if (d->prediction[0]) ok = ok && put(root, "prediction", json_string(d->prediction));
    ok = ok && put(root, "guidance",
                   json_pack("{s:o}", "channels", d->guide_channels < 0 ? json_string("all") : json_integer(d->guide_channels)));
    if (d->labels) ok = ok && put(root, "labels", dump_labels(d));
    if (d->is_default) ok = ok && put(root, "default", json_true());
    ok = ok && put(root, "weights", json_pack("{s:s, s:s}", "file", d->weights_file, "sha256", d->weights_sha256));
    ok = ok && put(root, "step", json_integer(d->step));
    char *dumped = ok ? jsonio_dump(root, JSON_INDENT(2)) : NULL, *text = dumped ? mem_printf("%s\n", dumped) : NULL;
    mem_free(dumped);
    json_decref(root);
    if (!text) err_set(e, E_NOMEM, "model.json cannot be made: no memory, or a label that is not UTF-8");
    return text;
}
