// SPDX-License-Identifier: MIT
/*
 * Latents: shards with mean and logvar [n, C, h, w] (float32) and label [n] (int64), as sitd encode writes them. An example is
 * (mean + exp(logvar/2) noise - shift) scale, logvar clamped to -30..20 as the authors' autoencoder does, its noise Philox of (seed, position in the run): a fresh posterior sample an epoch,
 * as encoding during training would give. "mean" alone, without logvar, is taken as it is.
 *
 * Headers and labels are read at open, examples when they are wanted: of ImageNet's 42 GB at 256 px a process holds nothing, and the
 * system's cache holds them once for all processes. So what is not finite is found when its example's turn comes.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/safetensors.h"
#include "core/train/data_int.h"
#include "kernels/philox.h"

#define PIECE 4096 // numbers of a log-variance at a time; a multiple of 4

struct shard {
    struct file_in file;
    struct safetensors header;
    size_t mean, logvar; // float32, at which byte of the file; logvar 0: there is none
    int64_t *label, n;   // [n]
};
struct set {
    struct shard *shards;
    int n;
    double scale, shift;
};

static void shard_close(struct shard *s) {
    safetensors_close(&s->header);
    file_in_close(&s->file);
    mem_free(s->label);
}

static void set_close(void *ctx) {
    struct set *s = ctx;
    if (!s) return;
    for (int i = 0; s->shards && i < s->n; i++) shard_close(&s->shards[i]);
    mem_free(s->shards);
    mem_free(s);
}

static const char *describe(const struct shard *s, const char *key) {
    for (int i = 0; i < s->header.n_meta; i++)
        if (strcmp(s->header.meta[i].key, key) == 0) return s->header.meta[i].value;
    return NULL;
}

// Numbers [at, at + n) of a tensor of the shard that begins at byte `place`
static int read_floats(const struct shard *s, float *x, size_t n, const char *name, size_t place, size_t at, struct err *e) {
    int rc = file_in_read(&s->file, x, n * sizeof *x, place + at * sizeof *x, e);
    if (rc != OK || floats_finite(x, n)) return rc;
    return err_param(e, E_NONFINITE, name, "%s: tensor '%s' holds NaN or infinity between elements %zu and %zu", s->file.path, name, at,
                     at + n - 1);
}

static int read_one(const struct data *d, int64_t index, uint64_t draw, float *x, int32_t *label, struct err *e) {
    const struct set *s = d->set;
    const struct shard *shard = s->shards;
    for (; index >= shard->n; shard++) index -= shard->n;
    size_t numel = (size_t)d->info.channels * (size_t)d->info.size * (size_t)d->info.size, at = (size_t)index * numel;
    float scale = (float)s->scale, shift = (float)s->shift, z[4], logvar[PIECE];
    if (read_floats(shard, x, numel, "mean", shard->mean, at, e)) return e->status;
    for (size_t i = 0; i < numel; i++) {
        if (shard->logvar && i % PIECE == 0 &&
            read_floats(shard, logvar, numel - i < PIECE ? numel - i : PIECE, "logvar", shard->logvar, at + i, e))
            return e->status;
        // a key of its own ("post"): not the noise that training adds
        if (shard->logvar && i % 4 == 0)
            philox_normal4(d->spec.seed ^ 0x706f7374, (uint32_t)draw, (uint32_t)(draw >> 32), (uint32_t)(i / 4), z);
        if (shard->logvar) x[i] += expf(0.5f * fminf(fmaxf(logvar[i % PIECE], -30), 20)) * z[i % 4];
        x[i] = (x[i] - shift) * scale;
    }
    *label = (int32_t)shard->label[index];
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
    return OK;
}

static int read_labels(struct data *d, struct shard *s, const struct tensor *t, const char *path, struct err *e) {
    s->label = mem_array((size_t)s->n, sizeof *s->label);
    if (!s->label) return err_set(e, E_NOMEM, "no memory for the labels of %s", path);
    if (file_in_read(&s->file, s->label, t->bytes, safetensors_place(&s->header, t), e)) return e->status;
    for (int64_t i = 0; i < s->n; i++) {
        int64_t label = s->label[i];
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
    int rc = file_in_open(&s->file, path, e);
    if (rc != OK) return rc;
    if (safetensors_read_header(&s->header, &s->file, e)) return file_in_close(&s->file), e->status;
    const struct tensor_table *table = &s->header.table;
    const struct tensor *mean = tensor_find(table, "mean"), *logvar = tensor_find(table, "logvar"), *label = tensor_find(table, "label");
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
    s->mean = safetensors_place(&s->header, mean), s->logvar = logvar ? safetensors_place(&s->header, logvar) : 0;
    d->info.n += s->n;
    return read_labels(d, s, label, path, e);
}

/*
 * Files called NAME-00001-of-00003.safetensors and so on are one set: all of it must be there, and no other of that name. files: in the order of
 * their names' bytes.
 */
static int check_sets(char **files, int n, struct err *e) {
    int due = 1, of = 0;
    for (int i = 0; i <= n; i++) {
        static const char form[] = "-00000-of-00000.safetensors";
        size_t length = i < n ? strlen(files[i]) : 0, tail = sizeof form - 1;
        const char *end = length > tail ? files[i] + length - tail : "";
        int no = 0, all = 0, used = 0;
        bool numbered = sscanf(end, "-%5d-of-%5d.safetensors%n", &no, &all, &used) == 2 && used == (int)tail;
        if (due > 1 && !(numbered && no == due && all == of))
            return err_param(e, E_CONFLICT, "data", "%s: shard %d of %d was due behind it: shards are missing, or two sets are mixed", files[i - 1], due, of);
        if (numbered && due == 1 && no != 1)
            return err_param(e, E_CONFLICT, "data", "%s: the shards before it are missing", files[i]);
        of = all, due = numbered && no < all ? no + 1 : 1;
    }
    return OK;
}

int data_latents_open(struct data *d, char **files, int n, struct err *e) {
    struct set *s = d->set = mem_alloc(sizeof *s);
    d->close = set_close;
    d->read = read_one;
    d->info.kind = "latents";
    d->info.latents = true;
    if (s) s->shards = mem_array((size_t)n, sizeof *s->shards);
    int rc = s && s->shards ? OK : err_set(e, E_NOMEM, "no memory for %d shards", n);
    if (rc == OK && strcmp(files[0], d->spec.path) != 0) rc = check_sets(files, n, e); // a shard alone may be named
    for (int i = 0; rc == OK && i < n; i++) rc = add_shard(d, s, files[i], e);
    if (rc != OK) return rc;
    if (!(s->scale > 0)) return err_param(e, E_RANGE, "scaling_factor", "%s: its scaling_factor is %g", files[0], s->scale);
    d->info.scale = s->scale, d->info.shift = s->shift;
    d->info.vae = describe(&s->shards[0], "vae");
    d->info.listing = describe(&s->shards[0], "classes");
    return OK;
}
