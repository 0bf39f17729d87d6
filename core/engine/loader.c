// SPDX-License-Identifier: MIT
/*
 * Finding and opening model directories.
 *
 * The folder is searched when the engine is opened, on the caller's thread, so that engine_open can say that there is nothing to
 * serve and so that the set of names is fixed from the start. Reading and hashing (seconds for a large model) happen on the
 * loader's thread; then the directory goes to the worker, which alone may build a network on its kern. One model is in hand at a
 * time: the loader waits for the worker before it opens the next, so no more than one checkpoint is in host memory.
 *
 * The seam for hot reload: worker_install (worker.c) swaps entry->current whether or not there was a version before, jobs hold
 * the version that they started with, and a failed build leaves the old one. Only "which entry, again" is missing here. What must
 * change then is where the network is built: on the worker's thread a build stalls the models that run, which at start-up harms
 * nobody.
 */
#include "core/engine/engine_int.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/base/mem.h"

/* ---- search ---- */

// 1: path/model.json is there; 0: it is not; negative: no memory
static int holds_model(const char *path) {
    char *file = mem_printf("%s/model.json", path);
    if (!file) return E_NOMEM;
    int there = access(file, F_OK) == 0;
    mem_free(file);
    return there;
}

// What a request can ask for, a log and a metric can show, and `name@version` can be taken apart again.
static bool name_ok(const char *s) {
    for (; *s; s++)
        if (*s < ' ' || *s > '~' || *s == '@') return false;
    return true;
}

static int add_entry(struct engine *g, const char *name, const char *dir, struct err *e) {
    struct entry entry = {.state = ENTRY_LOADING};
    if (strlen(name) >= sizeof entry.name)
        return err_set(e, E_RANGE, "%s: a model's name has at most %zu bytes", dir, sizeof entry.name - 1);
    if (!name_ok(name)) return err_set(e, E_RANGE, "%s: a model's name is printable ASCII without '@'", dir);
    strcpy(entry.name, name);
    struct entry *grown = mem_resize(g->entries, (size_t)g->n_entries + 1, sizeof *grown);
    if (grown) g->entries = grown;
    if (!grown || !(entry.dir = mem_strdup(dir))) return err_set(e, E_NOMEM, "no memory for the list of models");
    g->entries[g->n_entries++] = entry;
    return 0;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const struct entry *)a)->name, ((const struct entry *)b)->name);
}

static int scan_folder(struct engine *g, const char *folder, struct err *e) {
    DIR *d = opendir(folder);
    if (!d)
        return err_set(e,
                       errno == ENOENT || errno == ENOTDIR ? E_NOTFOUND
                       : errno == EACCES                   ? E_PERM
                                                           : E_IO,
                       "%s: %s", folder, strerror(errno));
    int rc = 0;
    for (struct dirent *entry; !rc && (errno = 0, entry = readdir(d));) {
        if (entry->d_name[0] == '.') continue;
        char *path = mem_printf("%s/%s", folder, entry->d_name);
        int there = path ? holds_model(path) : E_NOMEM;
        if (there < 0) rc = err_set(e, there, "no memory for the list of models");
        else if (there) rc = add_entry(g, entry->d_name, path, e);
        mem_free(path);
    }
    if (!rc && errno) rc = err_set(e, E_IO, "%s: %s", folder, strerror(errno));
    closedir(d);
    return rc;
}

// A folder that is itself a model directory is served under its own name, "." and trailing slashes resolved.
static int add_itself(struct engine *g, const char *folder, struct err *e) {
    char whole[PATH_MAX];
    if (!realpath(folder, whole)) return err_set(e, E_IO, "%s: %s", folder, strerror(errno));
    const char *slash = strrchr(whole, '/');
    return add_entry(g, slash && slash[1] ? slash + 1 : "model", whole, e);
}

int loader_scan(struct engine *g, const char *folder, struct err *e) {
    int itself = holds_model(folder);
    if (itself < 0) return err_set(e, itself, "no memory for the list of models");
    int rc = itself ? add_itself(g, folder, e) : scan_folder(g, folder, e);
    if (rc) return rc;
    if (!g->n_entries) return err_set(e, E_NOTFOUND, "%s: no model directory is in it (a folder that holds model.json)", folder);
    qsort(g->entries, (size_t)g->n_entries, sizeof *g->entries, by_name);
    return 0;
}

/* ---- thread ---- */

void loader_report(struct engine *g, struct entry *entry, struct err *err) {
    err_prefix(err, "model '%s'", entry->name);
    struct engine_event ev = {.kind = EV_MODEL, .err = *err};
    snprintf(ev.model, sizeof ev.model, "%s", entry->name);
    if (err->status)
        log_error("model not loaded", log_str("model", entry->name), log_str("error", err->text), log_str("param", err->param));
    else log_info("model loaded", log_str("model", entry->name));
    engine_emit(g, &ev);
}

static void fail(struct engine *g, struct entry *entry, struct err *err) {
    pthread_mutex_lock(&g->lock);
    if (!entry->current) entry->state = ENTRY_FAILED;
    pthread_mutex_unlock(&g->lock);
    loader_report(g, entry, err);
}

// To the worker and back: returns when it has built or refused the model (and reported it), or at once if the engine is closing.
static void hand_over(struct engine *g, struct load *load) {
    pthread_mutex_lock(&g->lock);
    if (g->stop != STOP_CLOSE) {
        g->load = load;
        pthread_cond_signal(&g->bell);
        while (g->load) pthread_cond_wait(&g->built, &g->lock);
    }
    pthread_mutex_unlock(&g->lock);
}

static int open_vae(struct vae_file *vae, const char *dir, const struct latent *l, struct err *e) {
    char *path = mem_printf("%s/%s", dir, l->vae_file);
    int rc = path ? vae_file_open(vae, path, l->vae_sha256, e) : err_set(e, E_NOMEM, "no memory for a path");
    mem_free(path);
    return rc;
}

static void load_one(struct engine *g, struct entry *entry) {
    struct model_dir dir = {0};
    struct vae_file vae = {0};
    struct sampler_model sampler;
    struct err err = {0};
    int rc = model_dir_open(&dir, entry->dir, &err);
    if (rc) {
        err_set(&err, rc, "it could not be opened");
        fail(g, entry, &err);
        return;
    }
    bool has_vae = dir.desc.latent.vae_file[0];
    if (has_vae) rc = open_vae(&vae, entry->dir, &dir.desc.latent, &err);
    if (!rc) rc = served_check(&dir.desc, has_vae ? &vae.arch : NULL, &sampler, &err); // before the device is troubled
    if (rc) fail(g, entry, &err);
    else hand_over(g, &(struct load){.entry = entry, .dir = &dir, .vae = has_vae ? &vae : NULL});
    vae_file_close(&vae);
    model_dir_close(&dir);
}

static bool stopping(struct engine *g) {
    pthread_mutex_lock(&g->lock);
    bool stop = g->stop != STOP_NOT;
    pthread_mutex_unlock(&g->lock);
    return stop;
}

void *loader_main(void *arg) {
    struct engine *g = arg;
    for (int i = 0; i < g->n_entries && !stopping(g); i++) load_one(g, &g->entries[i]);
    return NULL;
}
