// SPDX-License-Identifier: MIT
#include "core/io/checkpoint.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/pt.h"
#include "core/io/safetensors.h"

#define MAX_FILE ((size_t)64 << 30)

struct parsed { // what the table points into; one of the two is in use
    struct safetensors st;
    struct pt pt;
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

// "module." is left by DataParallel and DDP, "_orig_mod." by torch.compile; they may be nested.
static const char *bare_name(const char *name) {
    for (;;) {
        if (strncmp(name, "module.", 7) == 0) name += 7;
        else if (strncmp(name, "_orig_mod.", 10) == 0) name += 10;
        else return name;
    }
}

static int by_name(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

static int strip_prefixes(struct tensor_table *table, struct err *e) {
    const char **names = mem_array((size_t)table->n, sizeof *names);
    if (!names) return err_set(e, E_NOMEM, "no memory for %d names", table->n);
    for (int i = 0; i < table->n; i++) names[i] = table->tensors[i].name = bare_name(table->tensors[i].name);
    if (table->n) qsort(names, (size_t)table->n, sizeof *names, by_name);
    int rc = OK;
    for (int i = 1; i < table->n && rc == OK; i++)
        if (strcmp(names[i - 1], names[i]) == 0)
            rc = err_param(e, E_FORMAT, names[i], "tensor '%s' appears twice once 'module.' and '_orig_mod.' are taken off",
                           names[i]);
    mem_free(names);
    return rc;
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
        return rc;
    }
    return refuse(bytes, n, e);
}

int checkpoint_parse(struct checkpoint *c, const void *bytes, size_t n, const char *name, struct err *e) {
    *c = (struct checkpoint){0};
    struct parsed *p = c->priv = mem_alloc(sizeof *p);
    if (!p) return err_set(e, E_NOMEM, "no memory to parse %s", name);
    int rc = parse(c, p, bytes, n, e);
    if (rc == OK) rc = strip_prefixes(&c->table, e);
    if (rc == OK) return OK;
    checkpoint_close(c);
    err_prefix(e, "%s", name);
    return rc;
}

int checkpoint_open(struct checkpoint *c, const char *path, struct err *e) {
    void *bytes;
    size_t n;
    *c = (struct checkpoint){0};
    int rc = file_read(&bytes, &n, path, MAX_FILE, e);
    if (rc != OK) return rc;
    rc = checkpoint_parse(c, bytes, n, path, e);
    if (rc == OK) c->bytes = bytes;
    else mem_free(bytes);
    return rc;
}

void checkpoint_close(struct checkpoint *c) {
    struct parsed *p = c->priv;
    if (p) {
        safetensors_close(&p->st);
        pt_close(&p->pt);
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
