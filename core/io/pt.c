// SPDX-License-Identifier: MIT
/*
 * pt
 *
 *   STEM/data.pkl      a pickle (pickle.c) of the saved value; tensors are views (storage, offset, shape, stride)
 *   STEM/data/KEY      the raw elements of storage KEY, little-endian
 *   STEM/byteorder     "little", where present
 *
 * Which dictionary: of a training checkpoint {"ema": ..., "model": ..., "opt": ..., "args": ...} the EMA, else "model", else
 * "state_dict"; a file whose top level holds tensors is itself the state dict. Everything in the chosen dictionary must be a
 * tensor under a string key: an unknown object there is an error that names it, while elsewhere (args, optimiser) it is passed
 * over. The file's own account of itself ("args": an argparse.Namespace or a dictionary, and counters such as "step" at the top
 * level) is kept as text.
 *
 * Each tensor of the chosen dictionary is checked against its storage: the storage's member must have exactly numel x size bytes,
 * and the last element that the shape and strides reach must lie inside. Contiguous tensors point into the file; others
 * (transposed, expanded) are copied straight, and all copies together may not be larger than the file and 64 MiB: a stride of 0
 * can otherwise make a terabyte of one number.
 */
#include "core/io/pt.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/jsonio.h"
#include "core/io/pickle.h"
#include "core/io/zip.h"

#define MAX_TENSORS ((size_t)1 << 18)
#define MAX_KEY ((size_t)512)
#define MAX_META ((size_t)4096) // pairs, and bytes of one value
#define EXTRA_COPIES ((size_t)64 << 20)

struct reader {
    struct pt *pt;
    struct zip zip;
    struct pickle pickle;
    const char *stem; // "sit-tiny/": everything before "data.pkl"
    size_t stem_len, budget;
    const char *part; // the one that is wanted, or NULL
    struct err *e;
};

// --- the archive

static int find_pickle(struct reader *r, const struct zip_entry **found) {
    static const char tail[] = "data.pkl";
    *found = NULL;
    for (int i = 0; i < r->zip.n; i++) {
        const struct zip_entry *z = &r->zip.entries[i];
        size_t stem = z->name_len - (sizeof tail - 1);
        if (z->name_len < sizeof tail - 1 || memcmp(z->name + stem, tail, sizeof tail - 1) != 0) continue;
        const char *slash = memchr(z->name, '/', z->name_len);
        if (stem != 0 && slash != z->name + stem - 1) continue; // only STEM/data.pkl
        if (*found) return err_set(r->e, E_FORMAT, "the zip holds two data.pkl");
        *found = z;
        r->stem = z->name;
        r->stem_len = stem;
    }
    return *found ? OK : err_set(r->e, E_FORMAT, "the zip holds no data.pkl: it was not written by torch.save");
}

static const struct zip_entry *find_member(const struct reader *r, const char *folder, const char *key, size_t key_len) {
    char name[256]; // torch's keys are small numbers, its stems file names
    if (r->stem_len + key_len > sizeof name - 32) return NULL;
    int n = snprintf(name, sizeof name, "%.*s%s%.*s", (int)r->stem_len, r->stem, folder, (int)key_len, key);
    return zip_find(&r->zip, name, (size_t)n);
}

static int check_byteorder(struct reader *r) {
    const struct zip_entry *z = find_member(r, "byteorder", "", 0);
    if (!z || (z->size == 6 && memcmp(z->data, "little", 6) == 0)) return OK;
    return err_set(r->e, E_UNSUPPORTED, "the file was written on a big-endian machine");
}

// --- one tensor

static int tensor_err(struct reader *r, int status, const struct tensor *t, const char *why) {
    return err_param(r->e, status, t->name, "tensor '%s': %s", t->name, why);
}

static int find_storage(struct reader *r, const struct tensor *t, const struct pstorage *s, size_t size,
                        const struct zip_entry **z, uint64_t *numel) {
    size_t bytes;
    *numel = 0;
    *z = find_member(r, "data/", s->key, s->key_len);
    if (!*z) return tensor_err(r, E_FORMAT, t, "its storage is not in the file");
    if (mul_overflows(s->numel, s->untyped ? 1 : dtype_size(s->dtype), &bytes))
        return tensor_err(r, E_FORMAT, t, "its storage's size overflows");
    if ((*z)->size != bytes) return tensor_err(r, E_FORMAT, t, "its storage has not as many bytes as data.pkl says");
    *numel = bytes / size;
    return OK;
}

// Fills count and bytes; checks that the last element reached lies in the storage.
static int check_reach(struct reader *r, struct tensor *t, const struct ptensor *p, uint64_t numel) {
    size_t last = p->offset, step;
    t->count = 1;
    for (int i = 0; i < p->ndim; i++)
        if (p->shape[i] == 0) t->count = 0;
    for (int i = 0; i < p->ndim && t->count; i++) {
        if (mul_overflows(t->count, (size_t)p->shape[i], &t->count)) return tensor_err(r, E_FORMAT, t, "its shape overflows");
        if (mul_overflows((size_t)(p->shape[i] - 1), (size_t)p->stride[i], &step) || add_overflows(last, step, &last))
            return tensor_err(r, E_FORMAT, t, "its strides overflow");
    }
    if (mul_overflows(t->count, dtype_size(t->dtype), &t->bytes)) return tensor_err(r, E_FORMAT, t, "its shape overflows");
    if (t->count ? last >= numel : p->offset > numel) return tensor_err(r, E_FORMAT, t, "it reaches beyond its storage");
    return OK;
}

static bool is_contiguous(const struct ptensor *p) {
    uint64_t want = 1;
    for (int i = p->ndim - 1; i >= 0; i--) {
        if (p->shape[i] != 1 && (uint64_t)p->stride[i] != want) return false;
        want *= (uint64_t)p->shape[i]; // cannot overflow: check_reach multiplied the same numbers
    }
    return true;
}

static void straighten(char *dst, const char *src, const struct ptensor *p, size_t count, size_t size) {
    int64_t at[TENSOR_MAX_DIMS] = {0};
    size_t from = p->offset;
    for (size_t i = 0; i < count; i++) {
        memcpy(dst + i * size, src + from * size, size);
        for (int d = p->ndim - 1; d >= 0; d--) { // an odometer over the indices
            from += (size_t)p->stride[d];
            if (++at[d] < p->shape[d]) break;
            from -= (size_t)p->stride[d] * (size_t)p->shape[d];
            at[d] = 0;
        }
    }
}

static int copy_straight(struct reader *r, struct tensor *t, const struct ptensor *p, const char *src) {
    if (t->bytes > r->budget)
        return tensor_err(r, E_RANGE, t, "with its strides it would expand to more than the file's size and 64 MiB");
    r->budget -= t->bytes;
    char *dst = mem_alloc(t->bytes);
    if (!dst) return tensor_err(r, E_NOMEM, t, "no memory to straighten it");
    r->pt->copies[r->pt->n_copies++] = dst;
    straighten(dst, src, p, t->count, dtype_size(t->dtype));
    t->data = dst;
    return OK;
}

static int read_tensor(struct reader *r, struct tensor *t, const struct ptensor *p) {
    const struct zip_entry *z;
    uint64_t numel;
    size_t size = dtype_size(p->dtype);
    t->dtype = p->dtype;
    t->ndim = p->ndim;
    memcpy(t->shape, p->shape, sizeof t->shape);
    if (size == 0) return tensor_err(r, E_UNSUPPORTED, t, "its dtype is not one that sitd reads");
    int rc = find_storage(r, t, &p->storage, size, &z, &numel);
    if (rc == OK) rc = check_reach(r, t, p, numel);
    if (rc != OK || t->count == 0) return rc;
    if (!is_contiguous(p)) return copy_straight(r, t, p, z->data);
    t->data = z->data + p->offset * size;
    return OK;
}

// --- the chosen dictionary

static bool is_tensors(const struct pvalue *v) { // holds at least one tensor
    for (size_t i = 1; v->kind == P_DICT && i < v->u.obj->n; i += 2)
        if (v->u.obj->items[i].kind == P_TENSOR) return true;
    return false;
}

static int choose(struct reader *r, const struct pvalue **dict) {
    static const char *const keys[] = {"ema", "model", "state_dict"};
    const struct pvalue *root = &r->pickle.root;
    char what[160];
    *dict = root;
    r->pt->chosen = "";
    if (root->kind != P_DICT) {
        pickle_describe(root, what, sizeof what);
        return err_set(r->e, E_UNSUPPORTED, "the file holds %s, not a dictionary of tensors; save model.state_dict() instead",
                       what);
    }
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        if (r->part && strcmp(r->part, keys[i])) continue;
        const struct pvalue *v = pickle_get(root, keys[i]);
        if (!v || v->kind <= P_BYTES || v->kind == P_TENSOR) continue; // {"ema": 0.9999} is a setting
        if (v->kind != P_DICT) {
            pickle_describe(v, what, sizeof what);
            return err_param(r->e, E_UNSUPPORTED, keys[i],
                             "'%s' is %s, not a dictionary of tensors; save its state_dict() instead", keys[i], what);
        }
        if (v->u.obj->n == 0) continue;
        *dict = v;
        r->pt->chosen = keys[i];
        return OK;
    }
    if (r->part) return err_param(r->e, E_CONFLICT, r->part, "the file holds no '%s'", r->part);
    return is_tensors(root) ? OK
                            : err_set(r->e, E_CONFLICT,
                                      "the file holds no tensors under 'ema', 'model' or 'state_dict', nor at its top level");
}

static int check_entry(struct reader *r, const struct pvalue *key, const struct pvalue *v) {
    char what[160];
    if (key->kind != P_STR || key->u.str.n > MAX_KEY || !jsonio_plain(key->u.str.at, key->u.str.n))
        return err_set(r->e, E_FORMAT, "'%s' has a key that is no proper tensor name", r->pt->chosen);
    if (v->kind == P_TENSOR) return OK;
    pickle_describe(v, what, sizeof what);
    return err_set(r->e, E_UNSUPPORTED, "'%.*s' in '%s' is %s, not a tensor", (int)key->u.str.n, key->u.str.at, r->pt->chosen,
                   what);
}

static int read_table(struct reader *r, const struct pobj *dict, char **text) {
    struct pt *pt = r->pt;
    size_t n = dict->n / 2;
    if (n > MAX_TENSORS) return err_set(r->e, E_FORMAT, "the file holds more than 262144 tensors");
    pt->table.tensors = mem_array(n, sizeof *pt->table.tensors);
    pt->copies = mem_array(n, sizeof *pt->copies);
    if (!pt->table.tensors || !pt->copies) return err_set(r->e, E_NOMEM, "no memory for %zu tensors", n);
    int rc = OK;
    for (size_t i = 0; i < n && rc == OK; i++) {
        const struct pvalue *key = &dict->items[2 * i], *v = key + 1;
        struct tensor *t = &pt->table.tensors[pt->table.n];
        if ((rc = check_entry(r, key, v)) != OK) break;
        t->name = memcpy(*text, key->u.str.at, key->u.str.n); // zeroed memory ends it
        *text += key->u.str.n + 1;
        pt->table.n++;
        rc = read_tensor(r, t, v->u.obj->tensor);
    }
    return rc;
}

// --- what the file says of itself

static int scalar_text(const struct pvalue *v, char *dst, size_t size) { // length, or -1 for what is no scalar
    switch (v->kind) {
    case P_BOOL:
        return snprintf(dst, size, "%s", v->u.i ? "true" : "false");
    case P_INT:
        return snprintf(dst, size, "%" PRId64, v->u.i);
    case P_REAL: {
        int n = snprintf(dst, size, "%.15g", v->u.d); // 0.1 rather than 0.10000000000000001 where that reads back the same
        return strtod(dst, NULL) == v->u.d || isnan(v->u.d) ? n : snprintf(dst, size, "%.17g", v->u.d);
    }
    case P_STR:
        if (v->u.str.n >= size || !jsonio_plain(v->u.str.at, v->u.str.n)) return -1;
        memcpy(dst, v->u.str.at, v->u.str.n);
        dst[v->u.str.n] = 0;
        return (int)v->u.str.n;
    default:
        return -1;
    }
}

static int add_meta(struct reader *r, const struct pvalue *key, const struct pvalue *v, size_t room) {
    char value[MAX_META];
    struct pt *pt = r->pt;
    if (key->kind != P_STR || key->u.str.n > MAX_KEY || !jsonio_plain(key->u.str.at, key->u.str.n) ||
        scalar_text(v, value, sizeof value) < 0)
        return OK;
    if ((size_t)pt->n_meta >= room) return OK;
    char *name = mem_strndup(key->u.str.at, key->u.str.n), *text = mem_strdup(value);
    for (int i = 0; name && i < pt->n_meta; i++) {
        if (strcmp(pt->meta[i].key, name) != 0) continue; // said twice: the first counts (args before the top level)
        mem_free(name);
        mem_free(text);
        return OK;
    }
    if (!name || !text) {
        mem_free(name);
        mem_free(text);
        return err_set(r->e, E_NOMEM, "no memory for the file's args");
    }
    pt->meta[pt->n_meta++] = (struct meta_pair){name, text};
    return OK;
}

static int read_meta(struct reader *r) {
    const struct pvalue *root = &r->pickle.root, *args = pickle_get(root, "args");
    const struct pvalue *from[] = {args, root};
    size_t room = 0;
    for (int k = 0; k < 2; k++)
        if (from[k] && (from[k]->kind == P_DICT || from[k]->kind == P_NAMESPACE)) room += from[k]->u.obj->n / 2;
    if (room > MAX_META) room = MAX_META;
    if (!(r->pt->meta = mem_array(room, sizeof *r->pt->meta))) return err_set(r->e, E_NOMEM, "no memory for the file's args");
    int rc = OK;
    for (int k = 0; k < 2; k++) {
        if (!from[k] || (from[k]->kind != P_DICT && from[k]->kind != P_NAMESPACE)) continue;
        for (size_t i = 0; rc == OK && i + 1 < from[k]->u.obj->n; i += 2)
            rc = add_meta(r, &from[k]->u.obj->items[i], &from[k]->u.obj->items[i + 1], room);
    }
    return rc;
}

// --- the optimiser's state: {number: {name: tensor or number}}

static int add_opt(struct reader *r, long long number, const struct pvalue *key, const struct pvalue *v, char **text, size_t room) {
    struct pt *pt = r->pt;
    char value[64];
    if (key->kind != P_STR || key->u.str.n > MAX_KEY || !jsonio_plain(key->u.str.at, key->u.str.n)) return OK;
    int n = sprintf(*text, "%lld.%.*s", number, (int)key->u.str.n, key->u.str.at);
    if (v->kind == P_TENSOR) {
        struct tensor *t = &pt->table.tensors[pt->table.n++];
        t->name = *text;
        *text += n + 1;
        return read_tensor(r, t, v->u.obj->tensor);
    }
    if ((size_t)pt->n_meta >= room || scalar_text(v, value, sizeof value) < 0) return OK;
    struct meta_pair pair = {mem_strdup(*text), mem_strdup(value)};
    pt->meta[pt->n_meta++] = pair;
    return pair.key && pair.value ? OK : err_set(r->e, E_NOMEM, "no memory for the optimiser's numbers");
}

static int read_opt(struct reader *r) {
    const struct pvalue *opt = pickle_get(&r->pickle.root, "opt"), *state = opt && opt->kind == P_DICT ? pickle_get(opt, "state") : NULL;
    struct pt *pt = r->pt;
    size_t n = 0, text = 1;
    if (!state || state->kind != P_DICT) return err_param(r->e, E_CONFLICT, "opt", "the file holds no optimiser's state ('opt')");
    for (size_t i = 1; i < state->u.obj->n; i += 2) {
        const struct pvalue *of = &state->u.obj->items[i];
        for (size_t k = 0; of->kind == P_DICT && k < of->u.obj->n; k += 2, n++)
            text += (of->u.obj->items[k].kind == P_STR ? of->u.obj->items[k].u.str.n : 0) + 32;
    }
    if (n > MAX_TENSORS) return err_set(r->e, E_FORMAT, "the optimiser's state holds more than 262144 values");
    pt->chosen = "opt";
    pt->table.tensors = mem_array(n, sizeof *pt->table.tensors);
    pt->copies = mem_array(n, sizeof *pt->copies);
    pt->meta = mem_array(n, sizeof *pt->meta);
    char *at = pt->text = mem_alloc(text);
    if (!pt->table.tensors || !pt->copies || !pt->meta || !at) return err_set(r->e, E_NOMEM, "no memory for the optimiser's state");
    int rc = OK;
    for (size_t i = 0; rc == OK && i < state->u.obj->n; i += 2) {
        const struct pvalue *number = &state->u.obj->items[i], *of = number + 1;
        if (number->kind != P_INT || of->kind != P_DICT) return err_param(r->e, E_FORMAT, "opt", "the optimiser's state is not a dictionary by number");
        for (size_t k = 0; rc == OK && k < of->u.obj->n; k += 2) rc = add_opt(r, (long long)number->u.i, &of->u.obj->items[k], &of->u.obj->items[k + 1], &at, n);
    }
    return rc;
}

static int read_pickle(struct reader *r) {
    const struct pvalue *dict;
    if (r->part && strcmp(r->part, "opt") == 0) return read_opt(r);
    int rc = choose(r, &dict);
    if (rc != OK) return rc;
    size_t text = 0;
    for (size_t i = 0; i < dict->u.obj->n; i += 2)
        text += (dict->u.obj->items[i].kind == P_STR ? dict->u.obj->items[i].u.str.n : 0) + 1;
    char *at = r->pt->text = mem_alloc(text);
    if (!at) return err_set(r->e, E_NOMEM, "no memory for the tensors' names");
    rc = read_table(r, dict->u.obj, &at);
    return rc == OK ? read_meta(r) : rc;
}

int pt_parse(struct pt *pt, const void *bytes, size_t n, struct err *e) { return pt_parse_part(pt, bytes, n, NULL, e); }

int pt_parse_part(struct pt *pt, const void *bytes, size_t n, const char *part, struct err *e) {
    struct reader r = {.pt = pt, .part = part, .e = e, .budget = n + EXTRA_COPIES};
    const struct zip_entry *pkl;
    *pt = (struct pt){0};
    int rc = zip_parse(&r.zip, bytes, n, e);
    if (rc == OK) rc = find_pickle(&r, &pkl);
    if (rc == OK) rc = check_byteorder(&r);
    if (rc == OK) rc = pickle_parse(&r.pickle, pkl->data, pkl->size, e);
    if (rc == OK) rc = read_pickle(&r);
    pickle_close(&r.pickle);
    zip_close(&r.zip);
    if (rc != OK) pt_close(pt);
    return rc;
}

void pt_close(struct pt *pt) {
    for (int i = 0; i < pt->n_meta; i++) {
        mem_free(pt->meta[i].key);
        mem_free(pt->meta[i].value);
    }
    for (int i = 0; i < pt->n_copies; i++) mem_free(pt->copies[i]);
    mem_free(pt->meta);
    mem_free(pt->copies);
    mem_free(pt->table.tensors);
    mem_free(pt->text);
    *pt = (struct pt){0};
}
