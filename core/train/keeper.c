// SPDX-License-Identifier: MIT
#include "core/train/keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/import.h"
#include "core/io/model_publish.h"
#include "core/train/data_int.h"

#define NAME "step-%08lld.safetensors"

static char *folder_of(const struct train_config *c, struct err *e) {
    char *folder = mem_printf("%s/checkpoints", c->out);
    if (!folder) err_set(e, E_NOMEM, "no memory for a path");
    return folder;
}

// The step in a checkpoint's name, or -1.
static long long step_of(const char *path) {
    const char *name = strrchr(path, '/');
    long long step;
    int end = 0;
    return name && sscanf(name + 1, NAME "%n", &step, &end) == 1 && end && !name[1 + end] ? step : -1;
}
static bool is_checkpoint(const char *path) { return step_of(path) >= 0; }
static bool is_leftover(const char *path) { return strstr(path, "/step-") && strstr(path, ".safetensors.tmp-"); }

// Two runs in one folder would remove each other's files. Where the file system knows no locks there is none.
// option: that names the folder, as `named`
static int lock(int *fd, const char *folder, const char *option, const char *named, struct err *e) {
    *fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (*fd < 0 || flock(*fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return OK;
    return err_param(e, E_BUSY, option, "another process trains into %s: wait for its end or name another --%s", named, option);
}

static bool holds_model(const char *path) {
    char *file = mem_printf("%s/model.json", path);
    bool there = file && access(file, F_OK) == 0;
    mem_free(file);
    return there;
}

// A directory that can be had is better made sure of now than after hours. One that holds models is the folder that a daemon looks
// through: a model.json right in it would hide them.
static int prepare_publish(const char *dir, struct err *e) {
    struct data_names models = {0};
    int rc = file_make_dir(dir, e);
    if (rc == OK && !holds_model(dir)) rc = data_list(&models, dir, holds_model, e);
    if (models.n)
        rc = err_param(e, E_CONFLICT, "publish", "%s is a folder of models: name the model's own directory, as %s/NAME", dir, dir);
    data_names_free(&models);
    return rc;
}

int keeper_open(struct keeper *k, const struct train_config *c, const struct snapshot *s, bool first, struct err *e) {
    *k = (struct keeper){.config = c, .snapshot = s, .lock = -1, .publish_lock = -1};
    struct data_names left = {0};
    if (!first) return OK;
    char *folder = folder_of(c, e);
    int rc = folder ? file_make_dir(folder, e) : E_NOMEM;
    if (rc == OK) rc = lock(&k->lock, folder, "out", c->out, e);
    if (rc == OK && c->publish) rc = prepare_publish(c->publish, e);
    if (rc == OK && c->publish) rc = lock(&k->publish_lock, c->publish, "publish", c->publish, e);
    if (rc == OK) rc = data_list(&left, folder, is_leftover, e);
    for (int i = 0; i < left.n; i++) unlink(left.at[i]);
    data_names_free(&left);
    mem_free(folder);
    return rc;
}

void keeper_close(struct keeper *k) {
    struct keeper_result ignored;
    if (!k->snapshot) return;
    keeper_wait(k, &ignored);
    if (k->lock >= 0) close(k->lock);
    if (k->publish_lock >= 0) close(k->publish_lock);
    k->lock = k->publish_lock = -1;
}

int keeper_find(const struct train_config *c, int back, char *path, struct err *e) {
    struct data_names names = {0};
    struct err none = {0};
    char *folder = folder_of(c, e);
    if (!folder) return E_NOMEM;
    int rc = data_list(&names, folder, is_checkpoint, &none);
    if (rc == OK && back < names.n)
        snprintf(path, 600, "%s", names.at[names.n - 1 - back]); // eight digits: their order is the steps'
    else rc = err_param(e, E_NOTFOUND, "resume", "%s holds no checkpoint to continue", folder);
    data_names_free(&names);
    mem_free(folder);
    return rc;
}

int keeper_publish_vae(struct keeper *k, struct err *e) {
    const struct train_config *c = k->config;
    struct model_desc d = c->desc;
    struct vae_file f;
    if (!c->publish || !c->vae) return OK;
    int rc = vae_file_open(&f, c->vae, NULL, e);
    if (rc == OK) rc = import_vae(&d, c->publish, &f, e);
    if (rc == OK) k->vae = d.latent;
    vae_file_close(&f);
    return rc;
}

int keeper_check_new(const struct train_config *c, int64_t step, struct err *e) {
    char path[600];
    if (keeper_find(c, 0, path, NULL) != OK || step_of(path) <= step) return OK;
    return err_param(e, E_CONFLICT, "out",
                     "%s is there, of a step beyond %lld, where this run begins: --resume auto continues it; a new run needs another "
                     "--out, or these checkpoints elsewhere",
                     path, (long long)step);
}

/* ---- the work ---- */

// All but the newest `keep` up to the step that was just written, and those of every keep_every-th step.
static void remove_old(const struct train_config *c, int64_t step) {
    struct data_names names = {0};
    char *folder = folder_of(c, NULL);
    int n = 0;
    if (folder && data_list(&names, folder, is_checkpoint, NULL) == OK)
        while (n < names.n && step_of(names.at[n]) <= step) n++;
    for (int i = 0; i < n - c->keep; i++)
        if (!c->keep_every || step_of(names.at[i]) % c->keep_every) unlink(names.at[i]);
    data_names_free(&names);
    mem_free(folder);
}

static void publish(struct keeper *k) {
    struct tensor_table table = {0};
    struct import_table stored = {0};
    const struct snapshot *s = k->snapshot;
    struct err *e = &k->publish_err;
    k->desc = k->config->desc; // its labels stay the configuration's
    k->desc.step = s->step;
    memcpy(k->desc.latent.vae_file, k->vae.vae_file, sizeof k->vae.vae_file);
    memcpy(k->desc.latent.vae_sha256, k->vae.vae_sha256, sizeof k->vae.vae_sha256);
    if (!k->config->objective.discrete && (k->desc.n_loss_curve = objective_bins_curve(&s->bins, k->curve)) > 1)
        k->desc.loss_curve = k->curve;
    else k->desc.n_loss_curve = 0;
    if (dit_train_export(s->net, &table, s->array[SNAPSHOT_EMA], e) == OK &&
        import_convert(&stored, &table, k->config->publish_storage, e) == OK)
        model_publish(k->config->publish, &k->desc, &stored.table, e);
    import_free(&stored);
    mem_free(table.tensors);
}

static void *work(void *ctx) {
    struct keeper *k = ctx;
    if (k->save && snapshot_write(k->snapshot, k->path, k->config, &k->save_err) == OK)
        remove_old(k->config, k->snapshot->step);
    if (k->publish) publish(k);
    return NULL;
}

void keeper_start(struct keeper *k, bool save, bool want_publish) {
    err_clear(&k->save_err);
    err_clear(&k->publish_err);
    k->save = save, k->publish = want_publish;
    snprintf(k->path, sizeof k->path, "%s/checkpoints/" NAME, k->config->out, (long long)k->snapshot->step);
    k->running = save || want_publish;
    if (!k->running || (!fault_hit(FAULT_THREAD) && pthread_create(&k->thread, NULL, work, k) == 0)) return;
    work(k); // no thread to be had: the run waits for the disk instead
    k->thread = pthread_self();
}

bool keeper_wait(struct keeper *k, struct keeper_result *r) {
    *r = (struct keeper_result){.step = k->snapshot->step};
    if (!k->running) return false;
    if (!pthread_equal(k->thread, pthread_self())) pthread_join(k->thread, NULL);
    k->running = false;
    r->saved = k->save && k->save_err.status == OK, r->save_err = k->save_err;
    r->published = k->publish && k->publish_err.status == OK, r->publish_err = k->publish_err;
    if (r->saved) memcpy(k->last, k->path, sizeof k->last);
    return true;
}
