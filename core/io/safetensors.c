// SPDX-License-Identifier: MIT
/*
 * safetensors
 *
 *   offset 0      N, u64 little-endian: length of the header
 *   offset 8      header: JSON, UTF-8, first byte '{', may end in spaces
 *                   { "__metadata__": {string: string, ...},                                    optional
 *                     NAME: {"dtype": "F32", "shape": [d0, ...], "data_offsets": [begin, end]}, ... }
 *   offset 8 + N  the tensors' bytes, little-endian, row-major; data_offsets count from here
 *
 * Refused: N above 100,000,000 or beyond the file; a header that is not one JSON object; duplicate names; unknown fields of a
 * tensor; unknown dtypes; negative, fractional or overflowing sizes; more than TENSOR_MAX_DIMS dims; end - begin != elements x
 * bits / 8; tensors that overlap, leave a hole between them, do not begin at 0 or do not end at the end of the file. So every
 * byte of the data is in exactly one tensor, and nothing can hide. Allowed: rank 0, empty tensors, any alignment, types that sitd
 * cannot compute with (they become DT_OTHER and are only listed). Names with control characters are refused too: they would end
 * up in logs.
 */
#include "core/io/safetensors.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/jsonio.h"

#define MAX_HEADER 100000000u
#define MAX_VALUES 4000000u // of JSON: some 300,000 tensors
#define MAX_NAME 512

static const struct {
    const char *name;
    enum dtype dtype;
    unsigned bits;
} types[] = {
    {"F32", DT_F32, 32},      {"F16", DT_F16, 16},          {"BF16", DT_BF16, 16},        {"F64", DT_F64, 64},
    {"I64", DT_I64, 64},      {"I32", DT_I32, 32},          {"I16", DT_I16, 16},          {"I8", DT_I8, 8},
    {"U8", DT_U8, 8},         {"BOOL", DT_BOOL, 8},         {"U16", DT_OTHER, 16},        {"U32", DT_OTHER, 32},
    {"U64", DT_OTHER, 64},    {"C64", DT_OTHER, 64},        {"F8_E5M2", DT_OTHER, 8},     {"F8_E4M3", DT_OTHER, 8},
    {"F8_E8M0", DT_OTHER, 8}, {"F8_E4M3FNUZ", DT_OTHER, 8}, {"F8_E5M2FNUZ", DT_OTHER, 8}, {"F4", DT_OTHER, 4},
    {"F6_E2M3", DT_OTHER, 6}, {"F6_E3M2", DT_OTHER, 6},
};

static int bad(struct err *e, const char *name, const char *why) {
    char shown[80];
    jsonio_printable(shown, sizeof shown, name);
    return err_param(e, E_FORMAT, shown, "tensor '%s': %s", shown, why);
}

static int read_dtype(struct tensor *t, unsigned *bits, const json_t *v, struct err *e) {
    const char *s = json_string_value(v);
    for (size_t i = 0; s && i < sizeof types / sizeof *types; i++) {
        if (strcmp(s, types[i].name) != 0) continue;
        t->dtype = types[i].dtype;
        *bits = types[i].bits;
        return OK;
    }
    return bad(e, t->name, s ? "unknown dtype" : "dtype is missing or not a string");
}

// Elements and bits of a shape. An empty tensor's other sizes must not overflow either, so that the order of sizes does not
// matter.
static bool sizes_overflow(const struct tensor *t, size_t bits, size_t *count, size_t *total) {
    bool empty = false;
    *count = 1;
    for (int i = 0; i < t->ndim; i++) {
        empty = empty || t->shape[i] == 0;
        if (t->shape[i] && mul_overflows(*count, (size_t)t->shape[i], count)) return true;
    }
    if (mul_overflows(*count, bits, total)) return true;
    if (empty) *count = *total = 0;
    return false;
}

static int read_shape(struct tensor *t, const json_t *v, struct err *e) {
    if (!json_is_array(v)) return bad(e, t->name, "shape is missing or not an array");
    if (json_array_size(v) > TENSOR_MAX_DIMS) return bad(e, t->name, "more than 8 dimensions");
    t->ndim = (int)json_array_size(v);
    for (int i = 0; i < t->ndim; i++) {
        const json_t *d = json_array_get(v, (size_t)i);
        if (!json_is_integer(d) || json_integer_value(d) < 0) return bad(e, t->name, "shape holds something else than sizes");
        t->shape[i] = json_integer_value(d);
    }
    return OK;
}

// t->data becomes the place among the tensors' bytes, for now.
static int read_span(struct tensor *t, const json_t *v, unsigned bits, size_t data_bytes, struct err *e) {
    const json_t *b = json_array_get(v, 0), *end = json_array_get(v, 1);
    if (!json_is_array(v) || json_array_size(v) != 2 || !json_is_integer(b) || !json_is_integer(end))
        return bad(e, t->name, "data_offsets must be two integers");
    json_int_t from = json_integer_value(b), to = json_integer_value(end);
    if (from < 0 || to < from) return bad(e, t->name, "data_offsets must be non-negative and rising");
    if ((uint64_t)to > data_bytes) return bad(e, t->name, "data_offsets reach beyond the end of the file");
    size_t want;
    if (sizes_overflow(t, bits, &t->count, &want)) return bad(e, t->name, "shape overflows");
    if (want % 8) return bad(e, t->name, "shape does not make whole bytes");
    t->bytes = (size_t)(to - from);
    if (t->bytes != want / 8) return bad(e, t->name, "shape and dtype do not need as many bytes as data_offsets give");
    t->data = (const void *)(uintptr_t)from;
    return OK;
}

static int read_tensor(struct tensor *t, json_t *entry, size_t data_bytes, struct err *e) {
    const char *key;
    json_t *v;
    unsigned bits = 0;
    if (!json_is_object(entry)) return bad(e, t->name, "its entry is not an object");
    json_object_foreach(entry, key, v) {
        if (strcmp(key, "dtype") != 0 && strcmp(key, "shape") != 0 && strcmp(key, "data_offsets") != 0)
            return bad(e, t->name, "unknown field in its entry");
    }
    int rc = read_dtype(t, &bits, json_object_get(entry, "dtype"), e);
    if (rc == OK) rc = read_shape(t, json_object_get(entry, "shape"), e);
    if (rc == OK) rc = read_span(t, json_object_get(entry, "data_offsets"), bits, data_bytes, e);
    return rc;
}

static int by_place(const void *pa, const void *pb) { // empty tensors before the one that begins at the same byte
    const struct tensor *a = pa, *b = pb;
    uintptr_t da = (uintptr_t)a->data, db = (uintptr_t)b->data;
    if (da != db) return da < db ? -1 : 1;
    return a->bytes < b->bytes ? -1 : a->bytes > b->bytes;
}

static int check_cover(const struct tensor_table *table, size_t data_bytes, struct err *e) {
    size_t at = 0;
    for (int i = 0; i < table->n; i++) {
        const struct tensor *t = &table->tensors[i];
        if ((uintptr_t)t->data < at) return bad(e, t->name, "its bytes overlap those of another tensor");
        if ((uintptr_t)t->data > at) return bad(e, t->name, "bytes before it belong to no tensor");
        at += t->bytes;
    }
    size_t left = data_bytes - at;
    return left ? err_set(e, E_FORMAT, "%zu bytes at the end of the file belong to no tensor", left) : OK;
}

// One allocation holds all names, keys and values: the JSON tree goes away after parsing.
static size_t text_size(json_t *root) {
    size_t n = 0;
    const char *key;
    json_t *v;
    json_object_foreach(root, key, v) n += strlen(key) + 1;
    json_object_foreach(json_object_get(root, "__metadata__"), key, v) n += strlen(key) + json_string_length(v) + 2;
    return n;
}

static char *keep(char **at, const char *s) {
    char *kept = *at;
    size_t n = strlen(s) + 1;
    memcpy(kept, s, n);
    *at += n;
    return kept;
}

static int read_meta(struct safetensors *st, json_t *meta, char **at, struct err *e) {
    if (!meta) return OK;
    if (!json_is_object(meta)) return err_param(e, E_FORMAT, "__metadata__", "__metadata__ is not an object");
    if (!(st->meta = mem_array(json_object_size(meta), sizeof *st->meta)))
        return err_set(e, E_NOMEM, "no memory for __metadata__");
    const char *key;
    json_t *v;
    json_object_foreach(meta, key, v) {
        if (!json_is_string(v)) return err_param(e, E_FORMAT, "__metadata__", "__metadata__ holds something else than strings");
        if (!jsonio_plain(key, strlen(key)))
            return err_param(e, E_FORMAT, "__metadata__", "a key of __metadata__ holds a control character");
        st->meta[st->n_meta].key = keep(at, key);
        st->meta[st->n_meta++].value = keep(at, json_string_value(v));
    }
    return OK;
}

static int read_root(struct safetensors *st, json_t *root, size_t data_bytes, struct err *e) {
    if (!json_is_object(root)) return err_set(e, E_FORMAT, "the header is not a JSON object");
    char *at = st->text = mem_alloc(text_size(root));
    st->table.tensors = mem_array(json_object_size(root), sizeof *st->table.tensors);
    if (!st->text || !st->table.tensors) return err_set(e, E_NOMEM, "no memory for %zu tensors", json_object_size(root));
    int rc = read_meta(st, json_object_get(root, "__metadata__"), &at, e);
    const char *key;
    json_t *v;
    json_object_foreach(root, key, v) {
        if (rc != OK || strcmp(key, "__metadata__") == 0) continue;
        if (!jsonio_plain(key, strlen(key)) || strlen(key) > MAX_NAME)
            return bad(e, key, "its name is too long or holds a control character");
        struct tensor *t = &st->table.tensors[st->table.n++];
        t->name = keep(&at, key);
        rc = read_tensor(t, v, data_bytes, e);
    }
    if (rc != OK) return rc;
    if (st->table.n) qsort(st->table.tensors, (size_t)st->table.n, sizeof *st->table.tensors, by_place);
    return check_cover(&st->table, data_bytes, e);
}

// The header's length, of a file of n bytes that begins with these eight.
static int header_length(size_t *length, const unsigned char first[8], size_t n, struct err *e) {
    uint64_t header = 0;
    for (int i = 7; i >= 0; i--) header = header << 8 | first[i];
    if (header > MAX_HEADER)
        return err_set(e, E_FORMAT, "the header would have %llu bytes; at most 100000000 are allowed",
                       (unsigned long long)header);
    if (header > n - 8) return err_set(e, E_FORMAT, "the file ends inside the header");
    *length = (size_t)header;
    return OK;
}

static int parse_header(struct safetensors *st, const char *header, size_t length, size_t data_bytes, struct err *e) {
    if (length == 0 || header[0] != '{') return err_set(e, E_FORMAT, "the header does not begin with '{'");
    json_t *root;
    int rc = jsonio_parse(&root, header, length, 3, MAX_VALUES, "the header", e);
    if (rc == OK) rc = read_root(st, root, data_bytes, e);
    json_decref(root);
    if (rc != OK) safetensors_close(st);
    return rc;
}

#define TOO_SHORT "the file is shorter than the 8 bytes that give the header's length"

int safetensors_parse(struct safetensors *st, const void *bytes, size_t n, struct err *e) {
    *st = (struct safetensors){0};
    const char *b = bytes;
    size_t length = 0;
    if (n < 8) return err_set(e, E_FORMAT, TOO_SHORT);
    int rc = header_length(&length, bytes, n, e);
    if (rc == OK) rc = parse_header(st, b + 8, length, n - 8 - length, e);
    for (int i = 0; rc == OK && i < st->table.n; i++)
        st->table.tensors[i].data = b + 8 + length + (uintptr_t)st->table.tensors[i].data;
    return rc;
}

int safetensors_read_header(struct safetensors *st, const struct file_in *f, struct err *e) {
    *st = (struct safetensors){0};
    unsigned char first[8];
    size_t length = 0;
    if (f->n < 8) return err_set(e, E_FORMAT, "%s: " TOO_SHORT, f->path);
    int rc = file_in_read(f, first, 8, 0, e);
    if (rc != OK) return rc;
    if (header_length(&length, first, f->n, e)) return err_prefix(e, "%s", f->path);
    char *header = mem_alloc(length + 1);
    if (!header) return err_set(e, E_NOMEM, "%s: no memory for its header", f->path);
    rc = file_in_read(f, header, length, 8, e);
    if (rc == OK && (rc = parse_header(st, header, length, f->n - 8 - length, e))) err_prefix(e, "%s", f->path);
    mem_free(header);
    st->begin = 8 + length;
    for (int i = 0; rc == OK && i < st->table.n; i++) st->table.tensors[i].data = NULL;
    return rc;
}

size_t safetensors_place(const struct safetensors *st, const struct tensor *t) {
    size_t place = st->begin;
    for (const struct tensor *before = st->table.tensors; before != t; before++) place += before->bytes; // no hole between them
    return place;
}

void safetensors_close(struct safetensors *st) {
    mem_free(st->table.tensors);
    mem_free(st->meta);
    mem_free(st->text);
    *st = (struct safetensors){0};
}

// --- writer

static int by_size_name(const void *pa, const void *pb) {
    const struct tensor *a = pa, *b = pb;
    size_t sa = dtype_size(a->dtype), sb = dtype_size(b->dtype);
    return sa != sb ? (sa > sb ? -1 : 1) : strcmp(a->name, b->name);
}

static json_t *entry_of(const struct tensor *t, size_t at) {
    json_t *shape = json_array();
    for (int i = 0; i < t->ndim; i++) {
        if (json_array_append_new(shape, json_integer(t->shape[i])) == 0) continue;
        json_decref(shape);
        return NULL;
    }
    return json_pack("{s:s, s:o, s:[I,I]}", "dtype", dtype_name(t->dtype), "shape", shape, "data_offsets", (json_int_t)at,
                     (json_int_t)at + (json_int_t)t->bytes);
}

static json_t *meta_of(const struct meta_pair *meta, int n_meta) {
    json_t *m = json_object();
    for (int i = 0; i < n_meta; i++) {
        if (json_object_set_new(m, meta[i].key, json_string(meta[i].value)) == 0) continue;
        json_decref(m);
        return NULL;
    }
    return m;
}

static int check_writable(const struct tensor *t, const json_t *root, struct err *e) {
    size_t count, want;
    if (dtype_size(t->dtype) == 0)
        return err_param(e, E_UNSUPPORTED, t->name, "tensor '%s' has a type that sitd does not write", t->name);
    if (json_object_get(root, t->name)) return bad(e, t->name, "appears twice");
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] < 0) return bad(e, t->name, "shape holds a negative size");
    if (sizes_overflow(t, 8 * dtype_size(t->dtype), &count, &want)) return bad(e, t->name, "shape overflows");
    return want / 8 == t->bytes && count == t->count ? OK : bad(e, t->name, "shape and bytes do not agree");
}

static int make_header(char **header, const struct tensor *order, int n, const struct meta_pair *meta, int n_meta,
                       struct err *e) {
    json_t *root = json_object();
    unsigned long failures = mem_failures();
    size_t at = 0;
    int rc = OK;
    *header = NULL;
    if (n_meta && json_object_set_new(root, "__metadata__", meta_of(meta, n_meta)) != 0)
        rc = err_set(e, E_NOMEM, "cannot hold __metadata__");
    for (int i = 0; i < n && rc == OK; i++) {
        rc = check_writable(&order[i], root, e);
        if (rc == OK && json_object_set_new(root, order[i].name, entry_of(&order[i], at)) != 0)
            rc = mem_failures() != failures ? err_set(e, E_NOMEM, "no memory for the header")
                                            : bad(e, order[i].name, "its name is not UTF-8");
        at += order[i].bytes;
    }
    if (rc == OK && !(*header = jsonio_dump(root, JSON_COMPACT))) rc = err_set(e, E_NOMEM, "no memory for the header");
    json_decref(root);
    return rc;
}

int safetensors_write(const struct tensor_table *table, const struct meta_pair *meta, int n_meta,
                      int (*sink)(void *ctx, const void *bytes, size_t n, struct err *), void *ctx, struct err *e) {
    struct tensor *order = mem_array((size_t)table->n, sizeof *order);
    if (!order) return err_set(e, E_NOMEM, "no memory for %d tensors", table->n);
    if (table->n) memcpy(order, table->tensors, (size_t)table->n * sizeof *order);
    if (table->n) qsort(order, (size_t)table->n, sizeof *order, by_size_name);
    char *header;
    int rc = make_header(&header, order, table->n, meta, n_meta, e);
    if (rc == OK) {
        size_t len = strlen(header), padded = (len + 7) / 8 * 8;
        unsigned char first[8];
        for (int i = 0; i < 8; i++) first[i] = (unsigned char)(padded >> 8 * i);
        rc = sink(ctx, first, 8, e);
        if (rc == OK) rc = sink(ctx, header, len, e);
        if (rc == OK && padded > len) rc = sink(ctx, "       ", padded - len, e);
        for (int i = 0; i < table->n && rc == OK; i++)
            if (order[i].bytes) rc = sink(ctx, order[i].data, order[i].bytes, e);
        mem_free(header);
    }
    mem_free(order);
    return rc;
}
