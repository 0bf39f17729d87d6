// SPDX-License-Identifier: MIT
/*
 * model_dir: reading a model: model.json, then the file it names. Between the two a writer may have published again and a cleaner removed the old
 * weights; so when the file is gone or has another digest and model.json has changed meanwhile, the reader begins again.
 */
#include "core/io/model_dir.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/io/file.h"
#include "core/io/hash.h"

#define MAX_JSON ((size_t)16 << 20)
#define MAX_WEIGHTS ((size_t)64 << 30)
#define ATTEMPTS 3

void digest_print(char hex[DIGEST_HEX], const unsigned char sha[32]) {
    for (size_t i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", sha[i]);
}

int digest_hex(char hex[DIGEST_HEX], const void *bytes, size_t n) {
    unsigned char sha[EVP_MAX_MD_SIZE];
    if (EVP_Digest(bytes, n, sha, NULL, EVP_sha256(), NULL) != 1) return E_NOMEM;
    digest_print(hex, sha);
    return OK;
}

int model_name_check(const char *name, struct err *e) {
    bool ok = name[0] && strlen(name) < MODEL_NAME_SIZE;
    for (const char *s = name; ok && *s; s++) ok = *s >= ' ' && *s <= '~' && *s != '@';
    return ok ? OK : err_set(e, E_RANGE, "a model's name, which is its directory's, is at most %d bytes of printable ASCII without '@'", MODEL_NAME_SIZE - 1);
}

// --- reading

static char *path_of(const char *dir, const char *file, struct err *e) {
    char *path = mem_printf("%s/%s", dir, file);
    if (!path) err_set(e, E_NOMEM, "no memory for a path in %s", dir);
    return path;
}

int model_dir_desc(struct model_desc *desc, char digest[DIGEST_HEX], const char *dir, struct err *e) {
    digest[0] = 0;
    char *path = path_of(dir, "model.json", e);
    if (!path) return E_NOMEM;
    void *text = NULL;
    size_t n;
    int rc = file_read(&text, &n, path, MAX_JSON, e);
    if (rc == OK && digest_hex(digest, text, n) != OK) rc = err_set(e, E_NOMEM, "cannot hash %s", path);
    if (rc == OK && (rc = model_desc_parse(desc, text, n, e)) != OK) err_prefix(e, "%s", path);
    mem_free(text);
    mem_free(path);
    return rc;
}

struct owner { // what model_dir.weights points into
    void *bytes;
    struct checkpoint ck;
    struct hash *hash;             // of bytes
    char *path, want[DIGEST_HEX]; // as model.json says
};

static void owner_free(struct owner *o) {
    if (!o) return;
    hash_free(o->hash);
    checkpoint_close(&o->ck);
    mem_free(o->bytes);
    mem_free(o->path);
    mem_free(o);
}

static int check_digest(const struct owner *o, struct err *e) {
    char hex[DIGEST_HEX];
    if (hash_wait(o->hash, hex) != OK) return err_set(e, E_NOMEM, "cannot hash %s", o->path);
    if (strcmp(hex, o->want) == 0) return OK;
    return err_param(e, E_CONFLICT, "weights.sha256", "%s: its SHA-256 is %s, model.json says %s", o->path, hex, o->want);
}

static int use_weights(struct owner *o, size_t n, const struct model_desc *d, struct err *e) {
    struct err digest = {0};
    int rc = checkpoint_parse(&o->ck, o->bytes, n, o->path, e);
    if (rc == OK && (rc = arch_match(&d->arch, &o->ck.table, e)) != OK) err_prefix(e, "%s", o->path);
    if (rc != OK && check_digest(o, &digest) == E_CONFLICT) *e = digest, rc = E_CONFLICT;
    return rc;
}

static int read_weights(struct owner **out, const struct model_desc *d, const char *dir, struct err *e) {
    struct owner *o = mem_alloc(sizeof *o);
    size_t n;
    int rc = o && (o->path = path_of(dir, d->weights_file, e)) ? OK : err_set(e, E_NOMEM, "no memory to read %s", dir);
    if (rc == OK) rc = file_read(&o->bytes, &n, o->path, MAX_WEIGHTS, e);
    if (rc == OK) strcpy(o->want, d->weights_sha256);
    if (rc == OK) rc = hash_start(&o->hash, o->bytes, n, e);
    if (rc == OK) rc = use_weights(o, n, d, e);
    if (rc == OK) *out = o;
    else owner_free(o);
    return rc;
}

static bool desc_changed(const char *dir, const char *digest) {
    struct model_desc d;
    char now[DIGEST_HEX];
    if (model_dir_desc(&d, now, dir, NULL) != OK) return false;
    model_desc_deinit(&d);
    return strcmp(now, digest) != 0;
}

static int open_once(struct model_dir *m, const char *dir, bool verify, struct err *e) {
    struct owner *o = NULL;
    *m = (struct model_dir){0};
    int rc = model_dir_desc(&m->desc, m->digest, dir, e);
    if (rc == OK && (rc = read_weights(&o, &m->desc, dir, e)) != OK) model_desc_deinit(&m->desc);
    if (rc == OK) {
        m->weights = &o->ck.table;
        m->weights_owner = o;
        if (!verify || (rc = model_dir_verify(m, e)) == OK) return OK;
        char digest[DIGEST_HEX];
        strcpy(digest, m->digest);
        model_dir_close(m);
        strcpy(m->digest, digest);
    }
    m->desc = (struct model_desc){0};
    return rc;
}

static int open_whole(struct model_dir *m, const char *dir, bool verify, struct err *e) {
    for (int attempt = 1;; attempt++) {
        struct err here = {0};
        int rc = open_once(m, dir, verify, &here);
        bool stale = (rc == E_NOTFOUND || rc == E_CONFLICT) && m->digest[0] && attempt < ATTEMPTS && desc_changed(dir, m->digest);
        if (!stale) return rc == OK ? OK : err_param(e, rc, here.param, "%s", here.text);
    }
}

int model_dir_open(struct model_dir *m, const char *dir, struct err *e) { return open_whole(m, dir, true, e); }
int model_dir_begin(struct model_dir *m, const char *dir, struct err *e) { return open_whole(m, dir, false, e); }

int model_dir_verify(const struct model_dir *m, struct err *e) { return check_digest(m->weights_owner, e); }

void model_desc_to_vae(const struct model_desc *d, float *z, const float *sample) {
    const struct latent *l = &d->latent;
    size_t plane = (size_t)d->arch.input_size * (size_t)d->arch.input_size;
    for (int c = 0; c < d->arch.in_channels; c++) {
        float std = l->std ? (float)l->std[c] : l->scale > 0 ? (float)(1 / l->scale) : 1, mean = l->mean ? (float)l->mean[c] : 0;
        for (size_t i = (size_t)c * plane; i < (size_t)(c + 1) * plane; i++) z[i] = sample[i] * std + mean;
    }
}

void model_dir_close(struct model_dir *m) {
    owner_free(m->weights_owner);
    model_desc_deinit(&m->desc);
    *m = (struct model_dir){0};
}
