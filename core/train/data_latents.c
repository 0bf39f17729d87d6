// SPDX-License-Identifier: MIT
/*
 * Latents: shards with mean and logvar [n, C, h, w] (float32) and label [n] (int64), as sitd encode writes them. An example is
 * (mean + exp(logvar/2) noise - shift) scale, logvar clamped to -30..20 as the authors' autoencoder does, its noise Philox of (seed, position in the run): a fresh posterior sample an epoch,
 * as encoding during training would give. "mean" alone, without logvar, is taken as it is.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/safetensors.h"
#include "core/train/data_int.h"
#include "kernels/philox.h"

#define MAX_FILE ((size_t)256 << 30)

struct shard {
    void *bytes;
    struct safetensors file;
    const char *mean, *logvar, *label; // float32 or NULL; int64. Aligned to nothing
    int64_t n;
};
struct set {
    struct shard *shards;
    int n;
    double scale, shift;
};

static void set_close(void *ctx) {
    struct set *s = ctx;
    if (!s) return;
    for (int i = 0; s->shards && i < s->n; i++) safetensors_close(&s->shards[i].file), mem_free(s->shards[i].bytes);
    mem_free(s->shards);
    mem_free(s);
}

static float float_at(const char *p, size_t i) {
    float v;
    memcpy(&v, p + i * sizeof v, sizeof v);
    return v;
}
static int64_t label_at(const struct shard *s, int64_t i) {
    int64_t v;
    memcpy(&v, s->label + (size_t)i * sizeof v, sizeof v);
    return v;
}

static const char *describe(const struct shard *s, const char *key) {
    for (int i = 0; i < s->file.n_meta; i++)
        if (strcmp(s->file.meta[i].key, key) == 0) return s->file.meta[i].value;
    return NULL;
}

static int read_one(const struct data *d, int64_t index, uint64_t draw, float *x, int32_t *label, struct err *e) {
    (void)e;
    const struct set *s = d->set;
    const struct shard *shard = s->shards;
    for (; index >= shard->n; shard++) index -= shard->n;
    size_t numel = (size_t)d->info.channels * (size_t)d->info.size * (size_t)d->info.size, at = (size_t)index * numel;
    float scale = (float)s->scale, shift = (float)s->shift, z[4];
    for (size_t i = 0; i < numel; i++) {
        // a key of its own ("post"): not the noise that training adds
        if (shard->logvar && i % 4 == 0)
            philox_normal4(d->spec.seed ^ 0x706f7374, (uint32_t)draw, (uint32_t)(draw >> 32), (uint32_t)(i / 4), z);
        float v = float_at(shard->mean, at + i);
        if (shard->logvar) v += expf(0.5f * fminf(fmaxf(float_at(shard->logvar, at + i), -30), 20)) * z[i % 4];
        x[i] = (v - shift) * scale;
    }
    *label = (int32_t)label_at(shard, index);
    return OK;
}

static int check_shape(struct data *d, const struct tensor *t, const char *path, int64_t n, struct err *e) {
    char shape[64];
    tensor_shape_text(t, shape, sizeof shape);
    if (t->ndim != 4 || t->dtype != DT_F32 || t->shape[2] != t->shape[3] || t->shape[0] < 1 || t->shape[1] < 1 ||
        t->shape[1] > 1024 || t->shape[2] < 1 || t->shape[2] > 1024)
        return err_param(e, E_FORMAT, t->name, "%s: '%s' is %s %s, not float32 [n, C, I, I]", path, t->name, dtype_name(t->dtype),
                         shape);
    if (t->shape[0] != n)
        return err_param(e, E_CONFLICT, t->name, "%s: '%s' is %s, there are %lld labels", path, t->name, shape, (long long)n);
    if (d->info.size && (t->shape[1] != d->info.channels || t->shape[2] != d->info.size))
        return err_param(e, E_CONFLICT, t->name, "%s: '%s' is %s, the first shard's are [n, %d, %d, %d]", path, t->name, shape,
                         d->info.channels, d->info.size, d->info.size);
    d->info.channels = (int)t->shape[1];
    d->info.size = (int)t->shape[2];
    return tensor_check_finite(t, e) ? err_prefix(e, "%s", path) : OK;
}

static int check_labels(struct data *d, const struct shard *s, const char *path, struct err *e) {
    for (int64_t i = 0; i < s->n; i++) {
        int64_t label = label_at(s, i);
        if (label < 0 || label >= 1 << 24)
            return err_param(e, E_RANGE, "label", "%s: label %lld of example %lld is out of range", path, (long long)label,
                             (long long)i);
        if (label >= d->info.classes) d->info.classes = (int)label + 1;
    }
    return OK;
}

// Number in the file's description; all shards must say the same.
static int get_number(const struct set *set, const struct shard *s, const char *key, double usual, double *value,
                      const char *path, struct err *e) {
    const char *text = describe(s, key);
    char *end = NULL;
    double v = text ? strtod(text, &end) : usual;
    if ((text && (end == text || *end)) || !isfinite(v))
        return err_param(e, E_FORMAT, key, "%s: its %s is '%s', not a number", path, key, text);
    if (set->n > 0 && v != *value)
        return err_param(e, E_CONFLICT, key, "%s: its %s is %g, the first shard's %g", path, key, v, *value);
    *value = v;
    return OK;
}

static int add_shard(struct data *d, struct set *set, const char *path, struct err *e) {
    struct shard *s = &set->shards[set->n];
    size_t size;
    int rc = file_read(&s->bytes, &size, path, MAX_FILE, e);
    if (rc != OK) return rc;
    if (safetensors_parse(&s->file, s->bytes, size, e)) return mem_free(s->bytes), err_prefix(e, "%s", path);
    const struct tensor *mean = tensor_find(&s->file.table, "mean"), *logvar = tensor_find(&s->file.table, "logvar"),
                        *label = tensor_find(&s->file.table, "label");
    if (!mean || !label)
        rc = err_param(e, E_FORMAT, mean ? "label" : "mean", "%s holds no tensor '%s': these are not sitd encode's latents", path,
                       mean ? "label" : "mean");
    else if (label->ndim != 1 || label->dtype != DT_I64)
        rc = err_param(e, E_FORMAT, "label", "%s: 'label' is not int64 [n]", path);
    else s->n = label->shape[0];
    if (rc == OK) rc = check_shape(d, mean, path, s->n, e);
    if (rc == OK && logvar) rc = check_shape(d, logvar, path, s->n, e);
    if (rc == OK) rc = get_number(set, s, "scaling_factor", 0.18215, &set->scale, path, e);
    if (rc == OK) rc = get_number(set, s, "shift_factor", 0, &set->shift, path, e);
    set->n++; // close it in any case
    if (rc != OK) return rc;
    s->mean = mean->data, s->logvar = logvar ? logvar->data : NULL, s->label = label->data;
    d->info.n += s->n;
    return check_labels(d, s, path, e);
}

int data_latents_open(struct data *d, char **files, int n, struct err *e) {
    struct set *s = d->set = mem_alloc(sizeof *s);
    d->close = set_close;
    d->read = read_one;
    d->info.kind = "latents";
    d->info.latents = true;
    if (s) s->shards = mem_array((size_t)n, sizeof *s->shards);
    int rc = s && s->shards ? OK : err_set(e, E_NOMEM, "no memory for %d shards", n);
    for (int i = 0; rc == OK && i < n; i++) rc = add_shard(d, s, files[i], e);
    if (rc != OK) return rc;
    if (!(s->scale > 0)) return err_param(e, E_RANGE, "scaling_factor", "%s: its scaling_factor is %g", files[0], s->scale);
    d->info.scale = s->scale, d->info.shift = s->shift;
    d->info.vae = describe(&s->shards[0], "vae");
    d->info.listing = describe(&s->shards[0], "classes");
    return OK;
}
