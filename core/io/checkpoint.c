// SPDX-License-Identifier: MIT
#include "core/io/checkpoint.h"

#include <string.h>
#include <sys/stat.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/folder.h"
#include "core/io/layout.h"
#include "core/io/pt.h"
#include "core/io/safetensors.h"

#define MAX_FILE ((size_t)64 << 30)

struct parsed { // what the table points into; one of the first three is in use
    struct safetensors st;
    struct pt pt;
    struct folder folder;
    struct layout layout;
};

static bool begins(const void *bytes, size_t n, const char *magic, size_t len) {
    return n >= len && memcmp(bytes, magic, len) == 0;
}

// safetensors has no magic: a plausible header length and a '{' behind it.
static bool is_safetensors(const unsigned char *b, size_t n) {
    return n > 8 && b[8] == '{' && b[4] == 0 && b[5] == 0 && b[6] == 0 && b[7] == 0;
}

static int refuse(const void *bytes, size_t n, struct err *e) {
    static const char legacy[] =
        "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e"; // the magic number of torch.save before 1.6
    if (begins(bytes, n, legacy, sizeof legacy - 1))
        return err_set(e, E_UNSUPPORTED,
                       "this is the layout that torch.save wrote before PyTorch 1.6; convert it with a newer PyTorch: "
                       "torch.save(torch.load(old, map_location='cpu', weights_only=True), new)");
    if (begins(bytes, n, "version https://git-lfs", 23))
        return err_set(e, E_FORMAT, "this is a Git LFS pointer, not the weights: fetch the file itself (git lfs pull)");
    if (begins(bytes, n, "\x80\x02", 2) || begins(bytes, n, "\x80\x03", 2) || begins(bytes, n, "\x80\x04", 2) ||
        begins(bytes, n, "\x80\x05", 2))
        return err_set(e, E_UNSUPPORTED, "this is a bare Python pickle, not a checkpoint written by torch.save");
    return err_set(e, E_FORMAT, "this is neither a PyTorch zip (.pt) nor safetensors%s", n == 0 ? ": the file is empty" : "");
}

#define EMA "ema."

// Of sitd train's own checkpoints, which hold weights, moments and averages, the first average is taken.
static void choose_ema(struct checkpoint *c) {
    const char *kind = checkpoint_meta(c, "kind");
    int n = 0;
    if (!kind || strcmp(kind, "sitd-train") != 0) return;
    for (int i = 0; i < c->table.n; i++) {
        struct tensor t = c->table.tensors[i];
        if (strncmp(t.name, EMA, sizeof EMA - 1) != 0) continue;
        t.name += sizeof EMA - 1;
        c->table.tensors[n++] = t;
    }
    c->table.n = n;
    c->chosen = "ema";
}

static int parse(struct checkpoint *c, struct parsed *p, const void *bytes, size_t n, struct err *e) {
    if (begins(bytes, n, "PK\3\4", 4)) {
        int rc = pt_parse(&p->pt, bytes, n, e);
        c->table = p->pt.table;
        c->meta = p->pt.meta;
        c->n_meta = p->pt.n_meta;
        c->format = "torch zip";
        c->chosen = p->pt.chosen;
        return rc;
    }
    if (is_safetensors(bytes, n)) {
        int rc = safetensors_parse(&p->st, bytes, n, e);
        c->table = p->st.table;
        c->meta = p->st.meta;
        c->n_meta = p->st.n_meta;
        c->format = "safetensors";
        c->chosen = "";
        if (rc == OK) choose_ema(c);
        return rc;
    }
    return refuse(bytes, n, e);
}

static int parse_raw(struct checkpoint *c, const void *bytes, size_t n, const char *name, struct err *e) {
    *c = (struct checkpoint){.layout = ""};
    struct parsed *p = c->priv = mem_alloc(sizeof *p);
    if (!p) return err_set(e, E_NOMEM, "no memory to parse %s", name);
    int rc = parse(c, p, bytes, n, e);
    if (rc == OK) return OK;
    checkpoint_close(c);
    err_prefix(e, "%s", name);
    return rc;
}

static int settle(struct checkpoint *c, const char *name, struct err *e) {
    struct parsed *p = c->priv;
    int rc = layout_settle(&p->layout, &c->table, e);
    c->layout = p->layout.name;
    if (rc == OK && p->folder.n_shards) rc = folder_check(&p->folder, &c->table, e);
    if (rc == OK) return OK;
    checkpoint_close(c);
    err_prefix(e, "%s", name);
    return rc;
}

int checkpoint_parse(struct checkpoint *c, const void *bytes, size_t n, const char *name, struct err *e) {
    int rc = parse_raw(c, bytes, n, name, e);
    return rc == OK ? settle(c, name, e) : rc;
}

int checkpoint_open_raw(struct checkpoint *c, const char *path, struct err *e) {
    void *bytes;
    size_t n;
    *c = (struct checkpoint){0};
    int rc = file_read(&bytes, &n, path, MAX_FILE, e);
    if (rc != OK) return rc;
    rc = parse_raw(c, bytes, n, path, e);
    if (rc == OK) c->bytes = bytes;
    else mem_free(bytes);
    return rc;
}

static int open_folder(struct checkpoint *c, const char *dir, struct err *e) {
    *c = (struct checkpoint){.layout = "", .format = "diffusers folder", .chosen = ""};
    struct parsed *p = c->priv = mem_alloc(sizeof *p);
    if (!p) return err_set(e, E_NOMEM, "no memory to open %s", dir);
    int rc = folder_open(&p->folder, dir, e);
    c->table = p->folder.table;
    c->meta = p->folder.meta;
    c->n_meta = p->folder.n_meta;
    if (rc != OK) checkpoint_close(c);
    return rc;
}

int checkpoint_open(struct checkpoint *c, const char *path, struct err *e) {
    struct stat st;
    struct err local = {0};
    if (!e) e = &local;
    int rc = stat(path, &st) == 0 && S_ISDIR(st.st_mode) ? open_folder(c, path, e) : checkpoint_open_raw(c, path, e);
    return rc == OK ? settle(c, path, e) : rc;
}

void checkpoint_close(struct checkpoint *c) {
    struct parsed *p = c->priv;
    if (p) {
        safetensors_close(&p->st);
        pt_close(&p->pt);
        layout_free(&p->layout);
        folder_close(&p->folder);
    }
    mem_free(p);
    mem_free(c->bytes);
    *c = (struct checkpoint){0};
}

const char *checkpoint_meta(const struct checkpoint *c, const char *key) {
    for (int i = 0; i < c->n_meta; i++)
        if (strcmp(c->meta[i].key, key) == 0) return c->meta[i].value;
    return NULL;
}
