// SPDX-License-Identifier: MIT
#include "core/train/data.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "core/base/mem.h"
#include "core/train/data_int.h"
#include "kernels/philox.h"

/* ---- folders ---- */

bool data_ends_with(const char *path, const char *ending) {
    size_t n = strlen(path), m = strlen(ending);
    return n >= m && strcasecmp(path + n - m, ending) == 0;
}

static int by_bytes(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static int add_name(struct data_names *names, int *room, const char *folder, const char *name, bool (*pass)(const char *)) {
    char *path = mem_printf("%s/%s", folder, name);
    if (!path) return E_NOMEM;
    if (name[0] == '.' || !pass(path)) return mem_free(path), OK;
    if (names->n == *room) {
        char **grown = mem_resize(names->at, (size_t)*room * 2 + 256, sizeof *grown);
        if (!grown) return mem_free(path), E_NOMEM;
        names->at = grown;
        *room = *room * 2 + 256;
    }
    names->at[names->n++] = path;
    return OK;
}

int data_list(struct data_names *names, const char *folder, bool (*pass)(const char *path), struct err *e) {
    *names = (struct data_names){0};
    DIR *d = opendir(folder);
    if (!d) return err_set(e, errno == ENOENT || errno == ENOTDIR ? E_NOTFOUND : E_IO, "%s: %s", folder, strerror(errno));
    int rc = OK, room = 0;
    for (struct dirent *entry; rc == OK && (entry = readdir(d));) rc = add_name(names, &room, folder, entry->d_name, pass);
    closedir(d);
    if (rc != OK) return data_names_free(names), err_set(e, rc, "no memory for the names in %s", folder);
    if (names->n) qsort(names->at, (size_t)names->n, sizeof *names->at, by_bytes);
    return OK;
}

void data_names_free(struct data_names *names) {
    for (int i = 0; i < names->n; i++) mem_free(names->at[i]);
    mem_free(names->at);
    *names = (struct data_names){0};
}

/* ---- which kind it is ---- */

static bool is_folder(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}
static bool is_idx(const char *path) {
    return data_ends_with(path, "-images-idx3-ubyte") || data_ends_with(path, "-images-idx3-ubyte.gz");
}
static bool is_training_idx(const char *path) {
    const char *name = strrchr(path, '/');
    return is_idx(path) && strncmp(name ? name + 1 : path, "train-", 6) == 0;
}
static bool is_shard(const char *path) { return data_ends_with(path, ".safetensors"); }

static int open_folder(struct data *d, struct err *e) {
    struct data_names idx = {0}, shards = {0}, classes = {0};
    int rc = data_list(&idx, d->spec.path, is_training_idx, e);
    if (rc == OK) rc = data_list(&shards, d->spec.path, is_shard, e);
    if (rc == OK) rc = data_list(&classes, d->spec.path, is_folder, e);
    if (rc == OK && idx.n) rc = data_idx_open(d, idx.at[0], e);
    else if (rc == OK && shards.n) rc = data_latents_open(d, shards.at, shards.n, e);
    else if (rc == OK && classes.n) rc = data_pictures_open(d, e);
    else if (rc == OK)
        rc = err_set(e, E_NOTFOUND,
                     "%s holds no data: neither train-images-idx3-ubyte, nor .safetensors of latents, nor a folder a class",
                     d->spec.path);
    data_names_free(&idx);
    data_names_free(&shards);
    data_names_free(&classes);
    return rc;
}

static int open_any(struct data *d, struct err *e) {
    char *path = (char *)(uintptr_t)d->spec.path;
    struct stat st;
    if (stat(path, &st) != 0) return err_set(e, errno == EACCES ? E_PERM : E_NOTFOUND, "%s: %s", path, strerror(errno));
    if (S_ISDIR(st.st_mode)) return open_folder(d, e);
    if (is_idx(path)) return data_idx_open(d, path, e);
    if (is_shard(path)) return data_latents_open(d, &path, 1, e);
    return err_set(e, E_UNSUPPORTED, "%s is neither a folder, nor NAME-images-idx3-ubyte(.gz), nor .safetensors", path);
}

int data_open(struct data **out, const struct data_spec *spec, struct err *e) {
    struct err here = {0};
    struct data *d = mem_alloc(sizeof *d);
    *out = NULL;
    if (!d) return err_set(e, E_NOMEM, "no memory for a data set");
    d->spec = *spec;
    int rc = open_any(d, &here);
    const struct data_info *i = &d->info;
    if (rc == OK && spec->flip && i->latents)
        rc = err_param(
            &here, E_CONFLICT, "flip",
            "latents cannot be mirrored: without --flip, and `sitd encode --flip` encodes every picture's mirror image too");
    if (rc == OK && spec->size && i->size != spec->size)
        rc = err_set(&here, E_CONFLICT, "%s: its examples are %d wide, the network takes %d", spec->path, i->size, spec->size);
    if (rc == OK && spec->channels && i->channels != spec->channels)
        rc = err_set(&here, E_CONFLICT, "%s: its examples have %d channels, the network takes %d", spec->path, i->channels,
                     spec->channels);
    if (rc == OK) return *out = d, OK;
    data_close(d);
    return err_param(e, rc, here.param[0] ? here.param : "data", "%s", here.text);
}

void data_close(struct data *d) {
    if (!d) return;
    if (d->close) d->close(d->set);
    for (int i = 0; d->info.names && i < d->info.classes; i++) mem_free(d->info.names[i]);
    mem_free(d->info.names);
    mem_free(d);
}

const struct data_info *data_info(const struct data *d) { return &d->info; }

/* ---- order ---- */

/*
 * A Feistel network of six rounds over 2*half bits, the smallest even number of bits that holds n, with Philox as its round
 * function; results beyond n walk on along their cycle, at most three times on average (Black and Rogaway 2002).
 */
uint64_t data_order(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t place) {
    int half = 1;
    while (half < 32 && (uint64_t)1 << (2 * half) < n) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1, x = place;
    do {
        uint64_t left = x >> half, right = x & mask;
        for (uint32_t round = 0; round < 6; round++) {
            uint32_t block[4] = {(uint32_t)right, round, (uint32_t)epoch, 2}; // 2: of the order, 1 is the objective's
            philox_rounds(block, (uint32_t)seed, (uint32_t)(seed >> 32));
            uint64_t next = left ^ (block[0] & mask);
            left = right;
            right = next;
        }
        x = left << half | right;
    } while (x >= n);
    return x;
}

static void mirror(float *x, int lines, int side) {
    for (int l = 0; l < lines; l++)
        for (float *a = x + (size_t)l * (size_t)side, *b = a + side - 1; a < b; a++, b--) {
            float keep = *a;
            *a = *b;
            *b = keep;
        }
}

int data_example(const struct data *d, uint64_t position, float *x, int32_t *label, struct err *e) {
    uint64_t n = (uint64_t)d->info.n, index = data_order(d->spec.seed, position / n, n, position % n);
    int rc = d->read(d, (int64_t)index, position, x, label, e);
    if (rc != OK || !d->spec.flip) return rc;
    uint32_t block[4] = {(uint32_t)position, (uint32_t)(position >> 32), 0, 3}; // 3: of the flip
    philox_rounds(block, (uint32_t)d->spec.seed, (uint32_t)(d->spec.seed >> 32));
    if (block[0] >> 31) mirror(x, d->info.channels * d->info.size, d->info.size);
    return OK;
}

void data_planes(float *x, const uint8_t *pixels, int w, int h, int from, int channels) {
    size_t plane = (size_t)w * (size_t)h;
    for (size_t i = 0; i < plane; i++)
        for (int c = 0; c < channels; c++) {
            const uint8_t *p = pixels + i * (size_t)from;
            float v = from == 1 ? p[0] : channels == 1 ? (float)(p[0] + p[1] + p[2]) / 3.0f : p[c];
            x[(size_t)c * plane + i] = v / 127.5f - 1.0f;
        }
}
