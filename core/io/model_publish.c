// SPDX-License-Identifier: MIT
/*
 * The weights go to a temporary name beside their place, hashed on the way, synced, renamed; then model.json, which names them
 * and holds their digest, the same way and last. A reader at any moment finds a whole model, a power cut loses nothing, and a
 * full disk leaves the old version. A weights file that an older model.json may still name is never overwritten with other bytes:
 * the new one then gets part of its digest into its name.
 *
 * Old weights are removed when no model.json has named them for KEEP_S: a reader may have read the older model.json a while ago.
 * Since when a file has not been named is kept where no other writer, restart or copy can lose it, in its time of modification:
 * who publishes sets that of the file that was named until now to model.json's own. So a file as old as model.json proves that
 * its last change was accounted for in this way. Where none is (somebody edited model.json), nothing is known but that the files
 * that it does not name have not been named since then, and that is what they are set to. All times are of the file system's
 * clock.
 */
#include "core/io/model_publish.h"

#include <dirent.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/io/file.h"

#define MAX_WEIGHTS ((size_t)64 << 30)
#define KEEP_S 600

static char *beside(const char *dir, const char *file, struct err *e) {
    char *path = mem_printf("%s/%s", dir, file);
    if (!path) err_set(e, E_NOMEM, "no memory for a path in %s", dir);
    return path;
}

/* ---- old files ---- */

struct named { // what model.json names
    char file[256];
    struct timespec since; // model.json's time
};

static bool read_named(struct named *n, const char *dir) {
    struct model_desc d;
    struct stat st;
    char digest[DIGEST_HEX], *path = beside(dir, "model.json", NULL);
    *n = (struct named){0};
    bool there = path && stat(path, &st) == 0;
    mem_free(path);
    if (!there) return false;
    n->since = st.st_mtim;
    if (model_dir_desc(&d, digest, dir, NULL) != OK) return true; // nothing that a reader could follow
    memcpy(n->file, d.weights_file, sizeof n->file);
    model_desc_deinit(&d);
    return true;
}

// Names that this file gives: weights-00000007.safetensors, weights-00000007-0a1b2c3d.safetensors, and a writer's that was
// killed.
static bool is_ours(const char *name) {
    if (!strncmp(name, "weights.tmp-", 12) || !strncmp(name, "model.json.tmp-", 15)) return true;
    if (strncmp(name, "weights-", 8) != 0) return false;
    size_t digits = strspn(name += 8, "0123456789");
    if (digits < 8) return false;
    name += digits;
    if (*name == '-' && strspn(name + 1, "0123456789abcdef") == 8) name += 9;
    return !strcmp(name, ".safetensors");
}

static bool later(struct timespec a, struct timespec b) {
    return a.tv_sec > b.tv_sec || (a.tv_sec == b.tv_sec && a.tv_nsec > b.tv_nsec);
}

static void set_time(int dir, const char *name, struct timespec t) {
    utimensat(dir, name, (struct timespec[]){{.tv_nsec = UTIME_OMIT}, t}, 0); // not ours to set: it stays longer
}

static bool is_accounted(DIR *d, struct timespec since) {
    struct stat st;
    for (struct dirent *entry; (entry = readdir(d));)
        if (is_ours(entry->d_name) && fstatat(dirfd(d), entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
            st.st_mtim.tv_sec == since.tv_sec && st.st_mtim.tv_nsec == since.tv_nsec)
            return true;
    return false;
}

static void sweep_one(int dir, const char *name, const struct named *before, const struct named *now, bool accounted) {
    struct stat st;
    if (!is_ours(name) || !strcmp(name, now->file) || fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) || !S_ISREG(st.st_mode))
        return;
    struct timespec unnamed = st.st_mtim;
    if (!strcmp(name, before->file)) unnamed = now->since;
    else if (!accounted && later(before->since, unnamed)) unnamed = before->since;
    if (later(unnamed, st.st_mtim)) set_time(dir, name, unnamed);
    if (unnamed.tv_sec <= now->since.tv_sec - KEEP_S) unlinkat(dir, name, 0);
}

// Nothing here fails a publication: what could not be removed is looked at again next time.
static void sweep(const char *path, const struct named *before) {
    struct named now;
    DIR *d = read_named(&now, path) ? opendir(path) : NULL;
    if (!d) return;
    bool accounted = is_accounted(d, before->since);
    rewinddir(d);
    for (struct dirent *entry; (entry = readdir(d));) sweep_one(dirfd(d), entry->d_name, before, &now, accounted);
    closedir(d);
}

/* ---- writing ---- */

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
    digest_print(hex, sha);
    return OK;
}

// weights-00009034.safetensors, or with part of the digest where that name already holds other bytes.
static int choose_name(struct model_desc *d, const char *dir, struct err *e) {
    void *old = NULL;
    size_t n;
    char hex[DIGEST_HEX] = "";
    struct err ignored = {0};
    snprintf(d->weights_file, sizeof d->weights_file, "weights-%08lld.safetensors", (long long)d->step);
    char *path = beside(dir, d->weights_file, e);
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
    char *path = rc == OK ? beside(dir, d->weights_file, e) : NULL;
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
    char *path = beside(dir, "weights", e);
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

static int write_json(const char *dir, const struct model_desc *d, struct err *e) {
    char *path = beside(dir, "model.json", e), *text = path ? model_desc_dump(d, e) : NULL;
    int rc = text ? file_write(path, text, strlen(text), e) : E_NOMEM;
    mem_free(text);
    mem_free(path);
    return rc;
}

// Weights whose model.json did not get written: the room may be wanted. If the rename was made and only its sync failed they
// stay.
static void take_back(const char *dir, const struct model_desc *d) {
    struct named now;
    char *path = beside(dir, d->weights_file, NULL);
    read_named(&now, dir);
    if (path && strcmp(now.file, d->weights_file) != 0) unlink(path);
    mem_free(path);
}

int model_publish(const char *dir, struct model_desc *d, const struct tensor_table *table, struct err *e) {
    struct named before;
    int rc = check_desc(d, e);
    if (rc == OK) rc = arch_match(&d->arch, table, e);
    for (int i = 0; rc == OK && i < table->n; i++) rc = tensor_check_finite(&table->tensors[i], e);
    if (rc == OK) rc = file_make_dir(dir, e);
    bool replaces = rc == OK && read_named(&before, dir);
    if (rc == OK) rc = write_weights(dir, d, table, e);
    if (rc != OK) return rc;
    rc = write_json(dir, d, e);
    if (rc != OK) take_back(dir, d);
    else if (replaces) sweep(dir, &before);
    return rc;
}
