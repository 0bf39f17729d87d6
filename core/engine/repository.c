// SPDX-License-Identifier: MIT
/*
 * repository: which model directories there are.
 *
 * The folder is searched when the engine is opened, on the caller's thread, so that engine_open can say that there is nothing to
 * serve, and again at every engine_scan, on the loader's. What a later look finds changes the list of entries:
 *   - a new directory becomes an entry that the loader then loads. Until it serves, nothing else notices it;
 *   - a directory that is gone at two looks, GONE_US apart, is taken out: its name is unknown to new requests, accepted jobs
 * finish. Twice, since who replaces a directory by hand removes the old one first;
 *   - a look that fails, or that finds no model at all, changes nothing: a folder that is suddenly empty is a file system that
 * was unmounted far more often than a wish to serve nothing. Whether the folder is itself a model directory is settled at the
 * start.
 *
 * The list is changed by the loader only, under the engine's lock; the loader itself may therefore read it without.
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

#define GONE_US 2000000

/* ---- search ---- */

// 1: path/model.json is there; 0: it is not; negative: no memory
static int holds_model(const char *path) {
    char *file = mem_printf("%s/model.json", path);
    if (!file) return E_NOMEM;
    int there = access(file, F_OK) == 0;
    mem_free(file);
    return there;
}

static void entry_free(struct entry *entry) {
    if (!entry) return;
    facts_unref(entry->current);
    mem_free(entry->dir);
    mem_free(entry);
}

static void insert(struct entry **list, struct entry *entry) { // by name
    while (*list && strcmp((*list)->name, entry->name) < 0) list = &(*list)->next;
    entry->next = *list;
    *list = entry;
}

static int add_entry(struct entry **list, const char *name, const char *dir, struct err *e) {
    struct entry *entry = mem_alloc(sizeof *entry);
    if (!entry || !(entry->dir = mem_strdup(dir))) {
        entry_free(entry);
        return err_set(e, E_NOMEM, "no memory for the list of models");
    }
    int rc = model_name_check(name, e);
    if (rc) return err_prefix(e, "%s", dir), entry_free(entry), rc;
    strcpy(entry->name, name);
    insert(list, entry);
    return OK;
}

// misnamed: NULL, or where it is told of a directory whose name cannot be served, which is then passed over.
static int search_folder(struct entry **list, const char *folder, struct err *misnamed, struct err *e) {
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
        else if (there) rc = add_entry(list, entry->d_name, path, e);
        if (rc == E_RANGE && misnamed) *misnamed = *e, err_clear(e), rc = OK;
        mem_free(path);
    }
    if (!rc && errno) rc = err_set(e, E_IO, "%s: %s", folder, strerror(errno));
    closedir(d);
    return rc;
}

// A folder that is itself a model directory is served under its own name, "." and trailing slashes resolved.
static int add_itself(struct entry **list, const char *folder, struct err *e) {
    char whole[PATH_MAX];
    if (!realpath(folder, whole)) return err_set(e, E_IO, "%s: %s", folder, strerror(errno));
    const char *slash = strrchr(whole, '/');
    return add_entry(list, slash && slash[1] ? slash + 1 : "model", whole, e);
}

static void free_list(struct entry *list) {
    for (struct entry *next; list; list = next) {
        next = list->next;
        entry_free(list);
    }
}

static int search(struct entry **list, const char *folder, struct err *misnamed, struct err *e) {
    *list = NULL;
    int rc = search_folder(list, folder, misnamed, e);
    if (!rc && !*list) rc = err_set(e, E_NOTFOUND, "%s: no model directory is in it (a folder that holds model.json)", folder);
    if (rc) free_list(*list), *list = NULL;
    return rc;
}

int repository_open(struct engine *g, const char *folder, struct err *e) {
    int itself = holds_model(folder);
    if (itself < 0) return err_set(e, itself, "no memory for the list of models");
    if (itself) return add_itself(&g->entries, folder, e);
    if (!(g->folder = mem_strdup(folder))) return err_set(e, E_NOMEM, "no memory for the list of models");
    return search(&g->entries, folder, NULL, e);
}

void repository_close(struct engine *g) {
    free_list(g->entries);
    mem_free(g->folder);
}

struct entry *repository_find(struct engine *g, const char *name) {
    struct entry *entry = g->entries;
    while (entry && strcmp(entry->name, name) != 0) entry = entry->next;
    return entry;
}

/* ---- looking again ---- */

// One line for one state of affairs, however often it is seen.
static void complain(struct engine *g, const char *what, const struct err *err) {
    if (err->status && strcmp(g->scan_error, err->text) != 0) log_warn(what, log_str("error", err->text));
    snprintf(g->scan_error, sizeof g->scan_error, "%s", err->text);
}

static void adopt(struct engine *g, struct entry *found) { // what is new of the list, which is taken
    for (struct entry *next; found; found = next) {
        next = found->next;
        if (repository_find(g, found->name)) {
            entry_free(found);
            continue;
        }
        found->state = ENTRY_ADDED;
        log_info("model found", log_str("model", found->name));
        pthread_mutex_lock(&g->lock);
        insert(&g->entries, found);
        pthread_mutex_unlock(&g->lock);
    }
}

static void take_out(struct engine *g, struct entry *entry) {
    log_info("model unloaded: its directory is gone", log_str("model", entry->name));
    pthread_mutex_lock(&g->lock);
    struct entry **at = &g->entries;
    while (*at != entry) at = &(*at)->next;
    *at = entry->next;
    engine_retire(g, entry->current);
    entry->current = NULL;
    pthread_mutex_unlock(&g->lock);
    entry_free(entry);
}

static bool listed(const struct entry *list, const char *name) {
    while (list && strcmp(list->name, name) != 0) list = list->next;
    return list;
}

static void drop_missing(struct engine *g, const struct entry *found) {
    int64_t now = engine_now_us();
    for (struct entry *entry = g->entries, *next; entry; entry = next) {
        next = entry->next;
        if (listed(found, entry->name)) entry->gone_us = 0;
        else if (!entry->gone_us) entry->gone_us = now + GONE_US;
        else if (entry->gone_us <= now) take_out(g, entry);
    }
}

void repository_scan(struct engine *g) {
    struct entry *found;
    struct err err = {0}, misnamed = {0};
    if (!g->folder) return;
    if (search(&found, g->folder, &misnamed, &err)) {
        complain(g, "models folder cannot be read: nothing changes", &err);
        return;
    }
    complain(g, "model directory passed over", &misnamed);
    drop_missing(g, found);
    adopt(g, found);
}

/* ---- for callers ---- */

void engine_scan(struct engine *g) {
    pthread_mutex_lock(&g->lock);
    g->scan = true;
    pthread_cond_signal(&g->built);
    pthread_mutex_unlock(&g->lock);
}

int engine_reload(struct engine *g, const char *name, struct err *e) {
    pthread_mutex_lock(&g->lock);
    struct entry *entry = repository_find(g, name);
    if (entry) entry->asked = g->scan = true;
    pthread_cond_signal(&g->built);
    pthread_mutex_unlock(&g->lock);
    return entry ? OK : err_param(e, E_NOTFOUND, "model", "there is no model '%s'", name);
}

int engine_repository(struct engine *g, struct engine_entry *out, int max) {
    int n = 0;
    pthread_mutex_lock(&g->lock);
    for (const struct entry *entry = g->entries; entry && n < max; entry = entry->next, n++) {
        const struct engine_model *m = entry->current ? &entry->current->model : NULL;
        out[n] = (struct engine_entry){.state = m                              ? MODEL_SERVES
                                                : entry->state == ENTRY_FAILED ? MODEL_REFUSED
                                                                               : MODEL_LOADS,
                                       .version = m ? m->desc.step : 0};
        strcpy(out[n].name, entry->name);
        strcpy(out[n].digest, m ? m->digest : "");
        strcpy(out[n].reason, entry->reason);
    }
    pthread_mutex_unlock(&g->lock);
    return n;
}
