// SPDX-License-Identifier: MIT
/*
 * model_dir: reading and publishing a model.
 *
 * Publishing, so that a reader at any moment finds a whole model and a power cut loses nothing: the weights go to a temporary
 * name beside their place, hashed on the way, synced, renamed; then model.json, which names them and holds their digest, the same
 * way and last. A weights file that an older model.json may still name is never overwritten with other bytes: the new one then
 * gets part of its digest into its name.
 *
 * Reading: model.json, then the file it names. Between the two a writer may have published again and a cleaner removed the old
 * weights; so when the file is gone or has another digest and model.json has changed meanwhile, the reader begins again.
 */
#include "core/io/model_dir.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/io/file.h"

#define MAX_JSON ((size_t)16 << 20)
#define MAX_WEIGHTS ((size_t)64 << 30)
#define ATTEMPTS 3

static void to_hex(char hex[DIGEST_HEX], const unsigned char *sha) {
    for (size_t i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", sha[i]);
}

int digest_hex(char hex[DIGEST_HEX], const void *bytes, size_t n) {
    unsigned char sha[EVP_MAX_MD_SIZE];
    if (EVP_Digest(bytes, n, sha, NULL, EVP_sha256(), NULL) != 1) return E_NOMEM;
    to_hex(hex, sha);
    return OK;
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

static int check_digest(const struct model_desc *d, const void *bytes, size_t n, const char *path, struct err *e) {
    char hex[DIGEST_HEX];
    if (digest_hex(hex, bytes, n) != OK) return err_set(e, E_NOMEM, "cannot hash %s", path);
    if (strcmp(hex, d->weights_sha256) == 0) return OK;
    return err_param(e, E_CONFLICT, "weights.sha256", "%s: its SHA-256 is %s, model.json says %s", path, hex, d->weights_sha256);
}

struct owner { // what model_dir.weights points into
    void *bytes;
    struct checkpoint ck;
};

static void owner_free(struct owner *o) {
    if (!o) return;
    checkpoint_close(&o->ck);
    mem_free(o->bytes);
    mem_free(o);
}

static int read_weights(struct owner **out, const struct model_desc *d, const char *dir, struct err *e) {
    char *path = path_of(dir, d->weights_file, e);
    struct owner *o = mem_alloc(sizeof *o);
    size_t n;
    int rc = path && o ? OK : err_set(e, E_NOMEM, "no memory to read %s", dir);
    if (rc == OK) rc = file_read(&o->bytes, &n, path, MAX_WEIGHTS, e);
    if (rc == OK) rc = check_digest(d, o->bytes, n, path, e);
    if (rc == OK) rc = checkpoint_parse(&o->ck, o->bytes, n, path, e);
    if (rc == OK && (rc = arch_match(&d->arch, &o->ck.table, e)) != OK) err_prefix(e, "%s", path);
    mem_free(path);
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

int model_dir_open(struct model_dir *m, const char *dir, struct err *e) {
    for (int attempt = 1;; attempt++) {
        struct err here = {0};
        struct owner *o = NULL;
        *m = (struct model_dir){0};
        int rc = model_dir_desc(&m->desc, m->digest, dir, &here);
        if (rc == OK && (rc = read_weights(&o, &m->desc, dir, &here)) != OK) model_desc_deinit(&m->desc);
        if (rc == OK) {
            m->weights = &o->ck.table;
            m->weights_owner = o;
            return OK;
        }
        m->desc = (struct model_desc){0};
        bool stale = (rc == E_NOTFOUND || rc == E_CONFLICT) && m->digest[0] && attempt < ATTEMPTS && desc_changed(dir, m->digest);
        if (!stale) return err_param(e, rc, here.param, "%s", here.text);
    }
}

void model_dir_close(struct model_dir *m) {
    owner_free(m->weights_owner);
    model_desc_deinit(&m->desc);
    *m = (struct model_dir){0};
}

// --- writing

struct hashed { // a file and the digest of what went into it
    struct file_out out;
    EVP_MD_CTX *sha;
};

static int hashed_sink(void *ctx, const void *bytes, size_t n, struct err *e) {
    struct hashed *h = ctx;
    if (EVP_DigestUpdate(h->sha, bytes, n) != 1) return err_set(e, E_NOMEM, "cannot hash the weights");
    return file_out_write(&h->out, bytes, n, e);
}

static int finish_hash(struct hashed *h, char hex[DIGEST_HEX], struct err *e) {
    unsigned char sha[EVP_MAX_MD_SIZE];
    if (EVP_DigestFinal_ex(h->sha, sha, NULL) != 1) return err_set(e, E_NOMEM, "cannot hash the weights");
    to_hex(hex, sha);
    return OK;
}

// weights-00009034.safetensors, or with part of the digest where that name already holds other bytes.
static int choose_name(struct model_desc *d, const char *dir, struct err *e) {
    void *old = NULL;
    size_t n;
    char hex[DIGEST_HEX] = "";
    struct err ignored = {0};
    snprintf(d->weights_file, sizeof d->weights_file, "weights-%08lld.safetensors", (long long)d->step);
    char *path = path_of(dir, d->weights_file, e);
    if (!path) return E_NOMEM;
    int rc = file_read(&old, &n, path, MAX_WEIGHTS, &ignored);
    if (rc == OK) digest_hex(hex, old, n);
    mem_free(old);
    mem_free(path);
    if (rc != E_NOTFOUND && strcmp(hex, d->weights_sha256) != 0)
        snprintf(d->weights_file, sizeof d->weights_file, "weights-%08lld-%.8s.safetensors", (long long)d->step,
                 d->weights_sha256);
    return OK;
}

static int commit_weights(struct hashed *h, const char *dir, struct model_desc *d, struct err *e) {
    int rc = finish_hash(h, d->weights_sha256, e);
    if (rc == OK) rc = choose_name(d, dir, e);
    char *path = rc == OK ? path_of(dir, d->weights_file, e) : NULL;
    if (path) rc = file_out_commit(&h->out, path, e);
    else {
        file_out_abort(&h->out);
        if (rc == OK) rc = E_NOMEM;
    }
    mem_free(path);
    return rc;
}

static int write_weights(const char *dir, struct model_desc *d, const struct tensor_table *table, struct err *e) {
    struct hashed h = {.sha = EVP_MD_CTX_new()};
    struct meta_pair meta[] = {{(char *)"format", (char *)"pt"}, {(char *)"family", d->family}};
    char *path = path_of(dir, "weights", e);
    int rc = path && h.sha && EVP_DigestInit_ex(h.sha, EVP_sha256(), NULL) == 1
                 ? OK
                 : err_set(e, E_NOMEM, "no memory to write %s", dir);
    if (rc == OK) rc = file_out_open(&h.out, path, e);
    if (rc == OK) {
        rc = safetensors_write(table, meta, 2, hashed_sink, &h, e);
        if (rc == OK) rc = commit_weights(&h, dir, d, e);
        else file_out_abort(&h.out);
    }
    EVP_MD_CTX_free(h.sha);
    mem_free(path);
    return rc;
}

// A desc that model_desc_parse would refuse must not be published: dump it once with a stand-in for the weights, and parse that.
static int check_desc(struct model_desc *d, struct err *e) {
    struct model_desc again;
    snprintf(d->weights_file, sizeof d->weights_file, "weights.safetensors");
    memset(d->weights_sha256, '0', 64);
    d->weights_sha256[64] = 0;
    char *text = model_desc_dump(d, e);
    int rc = text ? model_desc_parse(&again, text, strlen(text), e) : E_NOMEM;
    if (rc == OK) model_desc_deinit(&again);
    mem_free(text);
    return rc;
}

int model_dir_write(const char *dir, struct model_desc *d, const struct tensor_table *table, struct err *e) {
    int rc = check_desc(d, e);
    if (rc == OK) rc = arch_match(&d->arch, table, e);
    for (int i = 0; rc == OK && i < table->n; i++) rc = tensor_check_finite(&table->tensors[i], e);
    if (rc == OK) rc = file_make_dir(dir, e);
    if (rc == OK) rc = write_weights(dir, d, table, e);
    if (rc != OK) return rc;
    char *path = path_of(dir, "model.json", e), *text = path ? model_desc_dump(d, e) : NULL;
    rc = text ? file_write(path, text, strlen(text), e) : E_NOMEM;
    mem_free(text);
    mem_free(path);
    return rc;
}
