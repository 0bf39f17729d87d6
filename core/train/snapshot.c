// SPDX-License-Identifier: MIT
#include "core/train/snapshot.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/io/file.h"
#include "core/io/hash.h"
#include "core/io/pt.h"

#define MAX_FILE ((size_t)256 << 30)
#define BARE ": nothing to continue; to begin from its weights, use --init"
#define LABELS "y_embedder.embedding_table.weight"

static const char *const prefixes[SNAPSHOT_ARRAYS] = {"model", "exp_avg", "exp_avg_sq", "ema", "ema1", "ema2", "ema3"};

int snapshot_new(struct snapshot *s, const struct dit_train *net, int n_ema, struct err *e) {
    *s = (struct snapshot){.net = net, .n = dit_train_floats(net), .n_arrays = SNAPSHOT_EMA + n_ema, .best = INFINITY};
    for (int i = 0; i < s->n_arrays; i++)
        if (!(s->array[i] = mem_array(s->n, sizeof(float))))
            return snapshot_free(s), err_set(e, E_NOMEM, "no memory for a copy of the training state");
    return OK;
}

void snapshot_free(struct snapshot *s) {
    for (int i = 0; i < s->n_arrays; i++) mem_free(s->array[i]);
    *s = (struct snapshot){0};
}

/* ---- writing ---- */

struct listing { // the tensors of a file
    struct tensor_table table;
    char (*names)[96];
};

static void listing_free(struct listing *l) {
    mem_free(l->table.tensors);
    mem_free(l->names);
}

// Views into the snapshot under prefixed names.
static int list_arrays(struct listing *l, const struct snapshot *s, struct err *e) {
    const struct dit_param *param;
    int n = dit_train_params(s->net, &param), total = n * s->n_arrays + 1;
    *l = (struct listing){.table.tensors = mem_array((size_t)total, sizeof *l->table.tensors),
                          .names = mem_array((size_t)total, sizeof *l->names)};
    if (!l->table.tensors || !l->names) return err_set(e, E_NOMEM, "no memory for a list of %d tensors", total);
    for (int a = 0; a < s->n_arrays; a++)
        for (int i = 0; i < n; i++) {
            struct tensor *t = &l->table.tensors[l->table.n];
            char *name = l->names[l->table.n++];
            snprintf(name, sizeof *l->names, "%s.%s", prefixes[a], param[i].name);
            *t = (struct tensor){.name = name,
                                 .ndim = param[i].ndim,
                                 .data = s->array[a] + param[i].offset,
                                 .count = param[i].count,
                                 .bytes = param[i].count * sizeof(float)};
            memcpy(t->shape, param[i].shape, sizeof t->shape);
        }
    size_t bins = sizeof s->bins / sizeof(double);
    l->table.tensors[l->table.n++] = (struct tensor){.name = "loss_by_time",
                                                     .dtype = DT_F64,
                                                     .ndim = 2,
                                                     .shape = {2, OBJECTIVE_BINS},
                                                     .data = &s->bins,
                                                     .count = bins,
                                                     .bytes = sizeof s->bins};
    return OK;
}

// A sum over the arrays' bytes that does not depend on where in an array a tensor lies
static uint64_t checksum(const struct snapshot *s) {
    const struct dit_param *param;
    uint64_t sum = 0;
    int n = dit_train_params(s->net, &param);
    for (int a = 0; a < s->n_arrays; a++)
        for (int i = 0; i < n; i++) {
            uint32_t crc = hash_crc(hash_crc(0, prefixes[a], strlen(prefixes[a])), param[i].name, strlen(param[i].name));
            sum += hash_crc(crc, s->array[a] + param[i].offset, param[i].count * sizeof(float));
        }
    return sum;
}

static int to_file(void *file, const void *bytes, size_t n, struct err *e) { return file_out_write(file, bytes, n, e); }

int snapshot_write(const struct snapshot *s, const char *path, const struct train_config *c, struct err *e) {
    struct train_fact facts[TRAIN_FACTS];
    struct meta_pair meta[TRAIN_FACTS + 6];
    struct listing l;
    struct file_out out;
    char step[32], best[32], window_loss[32], window_steps[32], sum[32];
    int n = 0;
    train_config_facts(c, facts);
    snprintf(step, sizeof step, "%lld", (long long)s->step);
    snprintf(best, sizeof best, "%.17g", s->best);
    snprintf(window_loss, sizeof window_loss, "%.17g", s->window.loss);
    snprintf(window_steps, sizeof window_steps, "%lld", (long long)s->window.steps);
    snprintf(sum, sizeof sum, "%016llx", (unsigned long long)checksum(s));
    meta[n++] = (struct meta_pair){(char *)"kind", (char *)"sitd-train"};
    meta[n++] = (struct meta_pair){(char *)"checksum", sum};
    meta[n++] = (struct meta_pair){(char *)"step", step};
    meta[n++] = (struct meta_pair){(char *)"best", best};
    meta[n++] = (struct meta_pair){(char *)"window_loss", window_loss};
    meta[n++] = (struct meta_pair){(char *)"window_steps", window_steps};
    for (int i = 0; i < TRAIN_FACTS; i++) meta[n++] = (struct meta_pair){(char *)(uintptr_t)facts[i].name, facts[i].value};
    int rc = list_arrays(&l, s, e);
    if (rc == OK) rc = file_out_open(&out, path, e);
    if (rc == OK) {
        rc = safetensors_write(&l.table, meta, n, to_file, &out, e);
        if (rc == OK) rc = file_out_commit(&out, NULL, e);
        else file_out_abort(&out);
    }
    listing_free(&l);
    return rc;
}

/* ---- our own files ---- */

static const char *meta_of(const struct safetensors *f, const char *key) {
    for (int i = 0; i < f->n_meta; i++)
        if (strcmp(f->meta[i].key, key) == 0) return f->meta[i].value;
    return NULL;
}

static bool is_ours(const struct safetensors *f) {
    const char *kind = meta_of(f, "kind");
    return kind && strcmp(kind, "sitd-train") == 0;
}

static int check_facts(const struct safetensors *f, const struct train_config *c, struct err *e) {
    struct train_fact facts[TRAIN_FACTS];
    train_config_facts(c, facts);
    for (int i = 0; i < TRAIN_FACTS; i++) {
        const char *had = meta_of(f, facts[i].name);
        if (!had && i == TRAIN_FACTS - 1) break;
        if (!had) return err_param(e, E_FORMAT, facts[i].name, "it does not say its %s", facts[i].name);
        if (strcmp(had, facts[i].value))
            return err_param(e, E_CONFLICT, facts[i].name, "its run has %s = %s, this one %s: a run is continued as it was begun; --init begins another from its weights",
                             facts[i].name, had, facts[i].value);
    }
    return OK;
}

// The window is missing in older files: it begins here.
static int take_window(struct loss_window *w, const struct safetensors *f, int64_t step, struct err *e) {
    const char *loss = meta_of(f, "window_loss"), *steps = meta_of(f, "window_steps");
    *w = (struct loss_window){0};
    if (!loss || !steps) return OK;
    *w = (struct loss_window){strtod(loss, NULL), strtoll(steps, NULL, 10)};
    if (isfinite(w->loss) && w->steps >= 0 && w->steps <= step) return OK;
    return err_param(e, E_FORMAT, "window_steps", "its window of losses, '%s' in '%s' steps, cannot be", loss, steps);
}

// One tensor of each parameter under a prefix, into a flat array.
static int take_array(float *flat, const struct snapshot *s, const struct tensor_table *table, const char *prefix,
                      struct err *e) {
    const struct dit_param *param;
    int n = dit_train_params(s->net, &param);
    for (int i = 0; i < n; i++) {
        char name[96];
        snprintf(name, sizeof name, "%s.%s", prefix, param[i].name);
        const struct tensor *t = tensor_find(table, name);
        if (!t) return err_param(e, E_FORMAT, name, "tensor '%s' is missing", name);
        if (!tensor_shape_is(t, param[i].ndim, param[i].shape))
            return err_param(e, E_CONFLICT, name, "tensor '%s' has another shape than the network's", name);
        if (tensor_check_finite(t, e) || tensor_to_f32(flat + param[i].offset, t, e)) return e->status;
    }
    return OK;
}

static int take_ours(struct snapshot *s, const struct safetensors *f, const struct train_config *c, struct err *e) {
    const struct tensor *bins = tensor_find(&f->table, "loss_by_time");
    const char *step = meta_of(f, "step"), *best = meta_of(f, "best"), *sum = meta_of(f, "checksum");
    int rc = check_facts(f, c, e);
    for (int a = 0; rc == OK && a < s->n_arrays; a++) rc = take_array(s->array[a], s, &f->table, prefixes[a], e);
    if (rc != OK) return rc;
    char *end = NULL;
    if (sum && strtoull(sum, NULL, 16) != checksum(s)) return err_param(e, E_FORMAT, "checksum", "its tensors are not those that were written: the file is damaged");
    s->step = step ? strtoll(step, &end, 10) : -1;
    if (s->step < 0 || s->step > UINT32_MAX || *end) return err_param(e, E_FORMAT, "step", "its step is not a number");
    s->best = best ? strtod(best, NULL) : INFINITY;
    if (isnan(s->best)) return err_param(e, E_FORMAT, "best", "its best loss is '%s'", best);
    if (!bins || bins->dtype != DT_F64 || bins->bytes != sizeof s->bins)
        return err_param(e, E_FORMAT, "loss_by_time", "tensor 'loss_by_time' is missing or misshapen");
    if (tensor_check_finite(bins, e)) return e->status;
    memcpy(&s->bins, bins->data, sizeof s->bins);
    return take_window(&s->window, f, s->step, e);
}

/* ---- the authors' files ---- */

static int parse_part(struct pt *pt, const void *bytes, size_t n, const char *part, struct err *e) {
    struct err here = {0};
    int rc = pt_parse_part(pt, bytes, n, part, &here);
    if (rc == OK) return OK;
    return err_param(e, rc, here.param, "%s%s", here.text, rc == E_CONFLICT ? BARE : "");
}

static int take_part(float *flat, const struct snapshot *s, const void *bytes, size_t n, const char *part, const struct arch *a,
                     struct err *e) {
    struct pt pt;
    int rc = parse_part(&pt, bytes, n, part, e);
    if (rc != OK) return rc;
    rc = arch_match(a, &pt.table, e);
    for (int i = 0; rc == OK && i < pt.table.n; i++) rc = tensor_check_finite(&pt.table.tensors[i], e);
    if (rc == OK) rc = dit_train_import(s->net, flat, &pt.table, e);
    pt_close(&pt);
    return rc;
}

// The optimiser knows parameters by number, counted as state_dict has them, the frozen position table included
// (models-and-math 8.3).
static int take_moments(struct snapshot *s, const struct tensor_table *opt, const struct tensor_table *model, struct err *e) {
    const struct dit_param *param;
    int n = dit_train_params(s->net, &param);
    for (int i = 0; i < n; i++)
        for (int m = 0; m < 2; m++) {
            char key[64];
            int number = (int)(tensor_find(model, param[i].name) - model->tensors); // it is there: arch_match has passed
            snprintf(key, sizeof key, "%d.%s", number, m ? "exp_avg_sq" : "exp_avg");
            const struct tensor *t = tensor_find(opt, key);
            if (!t || !tensor_shape_is(t, param[i].ndim, param[i].shape))
                return err_param(e, E_CONFLICT, "opt", "'opt' has no moment '%s' of the shape of '%s'", key, param[i].name);
            if (tensor_check_finite(t, e) || tensor_to_f32(s->array[SNAPSHOT_MOMENT1 + m] + param[i].offset, t, e))
                return e->status;
        }
    return OK;
}

static int take_opt(struct snapshot *s, const void *bytes, size_t n, struct err *e) {
    struct pt pt, model;
    int rc = parse_part(&model, bytes, n, "model", e);
    if (rc != OK) return rc;
    rc = parse_part(&pt, bytes, n, "opt", e);
    if (rc == OK) rc = take_moments(s, &pt.table, &model.table, e);
    pt_close(&model);
    float step = -1;
    for (int i = 0; i < pt.table.n && step < 0; i++) {
        const struct tensor *t = &pt.table.tensors[i];
        if (strstr(t->name, ".step") && t->count == 1 && rc == OK) rc = tensor_to_f32(&step, t, e);
    }
    for (int i = 0; i < pt.n_meta && step < 0; i++) // old PyTorch: a plain number
        if (strstr(pt.meta[i].key, ".step")) step = strtof(pt.meta[i].value, NULL);
    if (rc == OK && !(step >= 0 && step < 16777216))
        rc = err_param(e, E_FORMAT, "opt", "'opt' does not say its step"); // float32 counts to 2^24
    if (rc == OK) s->step = (int64_t)step;
    pt_close(&pt);
    return rc;
}

static int take_authors(struct snapshot *s, const void *bytes, size_t n, const struct train_config *c, struct err *e) {
    const struct arch *a = &c->desc.arch;
    int rc = take_part(s->array[SNAPSHOT_WEIGHTS], s, bytes, n, "model", a, e);
    for (int i = SNAPSHOT_EMA; rc == OK && i < s->n_arrays; i++) rc = take_part(s->array[i], s, bytes, n, "ema", a, e);
    return rc == OK ? take_opt(s, bytes, n, e) : rc;
}

int snapshot_read(struct snapshot *s, const char *path, const struct train_config *c, struct err *e) {
    struct err here = {0};
    struct safetensors f;
    void *bytes;
    size_t n;
    int rc = file_read(&bytes, &n, path, MAX_FILE, e);
    if (rc != OK) return rc;
    if (n > 4 && memcmp(bytes, "PK\3\4", 4) == 0) rc = take_authors(s, bytes, n, c, &here);
    else if ((rc = safetensors_parse(&f, bytes, n, &here)) == OK) {
        rc = is_ours(&f)
                 ? take_ours(s, &f, c, &here)
                 : err_set(&here, E_UNSUPPORTED, "it is no training state" BARE);
        safetensors_close(&f);
    }
    mem_free(bytes);
    return rc == OK ? OK : err_param(e, rc, here.param, "%s: %s", path, here.text);
}

/* ---- fine-tuning ---- */

// The label table is replaced where it does not fit.
static int take_weights(struct snapshot *s, const struct tensor_table *from, const struct arch *a, struct err *e) {
    struct tensor_table table = {.tensors = mem_array((size_t)from->n + 1, sizeof *table.tensors)};
    const struct dit_param *param;
    int n = dit_train_params(s->net, &param), rc = OK;
    float *flat = s->array[SNAPSHOT_WEIGHTS];
    if (!table.tensors) return err_set(e, E_NOMEM, "no memory for a list of tensors");
    for (int i = 0; i < from->n; i++) {
        struct tensor t = from->tensors[i];
        for (int p = 0; p < n && strcmp(t.name, LABELS) == 0; p++)
            if (strcmp(param[p].name, LABELS) == 0 && t.ndim == 2 && t.shape[0] != param[p].shape[0])
                t.dtype = DT_F32, t.shape[0] = param[p].shape[0], t.data = flat + param[p].offset, t.count = param[p].count,
                t.bytes = t.count * sizeof(float);
        table.tensors[table.n++] = t;
    }
    rc = arch_match(a, &table, e);
    for (int i = 0; rc == OK && i < table.n; i++) rc = tensor_check_finite(&table.tensors[i], e);
    if (rc == OK) rc = dit_train_import(s->net, s->array[SNAPSHOT_EMA], &table, e); // not onto what the label table's view is of
    if (rc == OK) memcpy(flat, s->array[SNAPSHOT_EMA], s->n * sizeof *flat);
    for (int i = SNAPSHOT_EMA + 1; rc == OK && i < s->n_arrays; i++) memcpy(s->array[i], flat, s->n * sizeof *flat);
    mem_free(table.tensors);
    return rc;
}

int snapshot_init(struct snapshot *s, const char *path, const struct train_config *c, struct err *e) {
    struct err here = {0};
    struct checkpoint ck;
    int rc = checkpoint_open(&ck, path, e);
    if (rc != OK) return rc;
    rc = take_weights(s, &ck.table, &c->desc.arch, &here);
    checkpoint_close(&ck);
    return rc == OK ? OK : err_param(e, rc, here.param, "%s: %s", path, here.text);
}
