// SPDX-License-Identifier: MIT
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/model/dit.h"
#include "core/train/trainer_int.h"

int trainer_kern(struct trainer *t, int rc, struct err *e) {
    if (rc == 0) return OK;
    return err_set(e, rc == KERN_ENOMEM ? E_NOMEM : E_DEVICE, "%s: %s", t->k->name, t->k->why);
}

// Dense bfloat16 operations a second that a card's maker states; nothing is stated for the other back ends.
static double peak_of(const struct kern *k) {
    static const struct {
        const char *card;
        double peak;
    } known[] = {{"H100", 989e12}, {"H200", 989e12}, {"A100", 312e12}, {"B200", 2250e12}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (k->act == KERN_BF16 && strstr(k->device, known[i].card)) return known[i].peak;
    return 0;
}

/* ---- network ---- */

// The most rows, by halving, with which a network can be made: for a message.
static int rows_that_fit(struct trainer *t) {
    struct err ignored = {0};
    for (int rows = t->rows / 2; rows > 0; rows /= 2) {
        struct dit_train *net = NULL;
        err_clear(&ignored);
        if (t->local % rows == 0 && dit_train_new(&net, t->k, &t->c->desc.arch, rows, t->c->recompute, &ignored) == OK)
            return dit_train_free(net), rows;
    }
    return 0;
}

static int make_net(struct trainer *t, struct err *e) {
    struct err here = {0};
    int rc = dit_train_new(&t->net, t->k, &t->c->desc.arch, t->rows, t->c->recompute, &here);
    if (rc == OK) return OK;
    if (rc != E_NOMEM) return err_param(e, rc, here.param, "%s", here.text);
    int fit = rows_that_fit(t);
    if (!fit)
        return err_param(e, rc, "microbatch", "the network does not fit, not even with one image at a time (%s)", here.text);
    return err_param(e, rc, "microbatch",
                     "%d images at a time do not fit (%s); %d do: --microbatch %d makes the same step of smaller parts%s",
                     t->rows, here.text, fit, fit, t->c->recompute == RECOMPUTE_NONE ? ", and so may --recompute block" : "");
}

static int make_buffer(struct trainer *t, void *out, size_t bytes, struct err *e) {
    void *p = NULL;
    int rc = t->k->alloc(t->k, bytes, &p);
    memcpy(out, &p, sizeof p);
    return trainer_kern(t, rc, e);
}

static int make_arrays(struct trainer *t, struct err *e) {
    size_t rows = (size_t)t->rows, local = (size_t)t->local, image = rows * t->numel * sizeof(float);
    int rc = OK;
    t->array[SNAPSHOT_WEIGHTS] = dit_train_weights(t->net);
    for (int i = SNAPSHOT_MOMENT1; rc == OK && i < SNAPSHOT_EMA + t->c->n_ema; i++)
        rc = make_buffer(t, &t->array[i], t->n * sizeof(float), e);
    if (rc == OK) rc = make_buffer(t, &t->x1, image, e);
    if (rc == OK) rc = make_buffer(t, &t->x0, image, e);
    if (rc == OK) rc = make_buffer(t, &t->norm2, trainer_numbers(t), e);
    if (rc == OK) t->moved2 = t->norm2 + 1, t->loss = (float *)(t->norm2 + 2);
    t->row = mem_array(local, sizeof *t->row);
    t->mix = mem_array(rows, sizeof *t->mix);
    t->judge = mem_array(rows, sizeof *t->judge);
    t->time = mem_array(rows, sizeof *t->time);
    t->label = mem_array(rows, sizeof *t->label);
    t->host = mem_alloc(trainer_numbers(t));
    bool all = t->row && t->mix && t->judge && t->time && t->label && t->host;
    if (rc == OK && !all) rc = err_set(e, E_NOMEM, "no memory for a step of %d images", t->local);
    return rc == OK ? snapshot_new(&t->snapshot, t->net, t->c->n_ema, e) : rc;
}

/* ---- where it begins ---- */

int trainer_fill(struct trainer *t, struct err *e) {
    struct snapshot *s = &t->snapshot;
    int rc = OK;
    for (int i = 0; rc == OK && i < s->n_arrays; i++)
        rc = trainer_kern(t, t->k->download(t->k, s->array[i], t->array[i], t->n * sizeof(float)), e);
    s->step = t->step, s->bins = t->bins, s->best = t->best, s->window = t->window;
    return rc;
}

static int continue_from(struct trainer *t, const char *path, struct err *e) {
    int rc = snapshot_read(&t->snapshot, path, t->c, e);
    if (rc == OK) snprintf(t->keeper.last, sizeof t->keeper.last, "%s", path);
    return rc;
}

// The file is at fault, not the options: one before it may do.
static bool is_broken(int status) {
    return status == E_FORMAT || status == E_IO || status == E_NONFINITE || status == E_NOTFOUND;
}

// The newest checkpoint that can be read. E_NOTFOUND: there are none.
static int continue_newest(struct trainer *t, struct err *e) {
    struct err first = {0}, here = {0};
    char path[600], text[1200];
    for (int back = 0; keeper_find(t->c, back, path, NULL) == OK; back++) {
        err_clear(&here);
        int rc = continue_from(t, path, &here);
        if (rc == OK || !is_broken(rc)) return rc == OK ? OK : err_param(e, rc, here.param, "%s", here.text);
        if (!back) first = here;
        snprintf(text, sizeof text, "%s; the checkpoint before it is looked at", here.text);
        trainer_tell(t, NOTE_TROUBLE, 0, text);
    }
    if (first.status == OK) return E_NOTFOUND;
    return err_param(e, first.status, "resume",
                     "%s; nor can one before it be read. To begin anew, name another --out", first.text);
}

static int begin_from(struct trainer *t, struct err *e) {
    struct snapshot *s = &t->snapshot;
    const struct train_config *c = t->c;
    bool automatic = c->resume && strcmp(c->resume, "auto") == 0;
    if (c->resume && !automatic) return continue_from(t, c->resume, e);
    int rc = automatic ? continue_newest(t, e) : E_NOTFOUND;
    if (rc != E_NOTFOUND) return rc;
    dit_train_init(t->net, s->array[SNAPSHOT_WEIGHTS], c->objective.seed); // auto, and nothing there: the run begins
    if (c->init) return snapshot_init(s, c->init, c, e);
    for (int i = SNAPSHOT_EMA; i < s->n_arrays; i++) memcpy(s->array[i], s->array[SNAPSHOT_WEIGHTS], t->n * sizeof(float));
    return OK;
}

// Each rank reads the checkpoint that it finds; all must have found the same.
static int check_same(struct trainer *t, struct err *e) {
    double mine[1 + SNAPSHOT_ARRAYS] = {(double)t->snapshot.step}, all[1 + SNAPSHOT_ARRAYS];
    int n = 1, rc = OK;
    for (int i = 0; rc == OK && i < t->snapshot.n_arrays; i++, n++) {
        rc = t->k->zero(t->k, t->norm2, sizeof(double));
        if (!rc) rc = t->k->sum_squares(t->k, t->norm2, t->array[i], t->n);
        if (!rc) rc = t->k->download(t->k, &mine[n], t->norm2, sizeof(double));
        if (rc) return trainer_kern(t, rc, e);
    }
    memcpy(all, mine, sizeof all);
    if (parallel_numbers(t->parallel, all, n, e)) return e->status;
    for (int i = 0; i < n; i++)
        if (fabs(all[i] - t->ranks.size * mine[i]) > 1e-12 * fabs(all[i]))
            return t->well = true, err_param(e, E_CONFLICT, "out", "rank %d begins at step %lld, but not all ranks begin with its state: they need one --out, --resume and --init that all can read",
                             t->ranks.rank, (long long)t->snapshot.step);
    return OK;
}

static int begin(struct trainer *t, struct err *e) {
    struct snapshot *s = &t->snapshot;
    bool automatic = t->c->resume && strcmp(t->c->resume, "auto") == 0;
    int rc = begin_from(t, e);
    if (rc == OK && s->step > t->c->steps)
        rc = err_param(e, E_CONFLICT, "steps", "%s is of step %lld, --steps asks for a run of %lld: name more, or continue an earlier checkpoint",
                       t->keeper.last, (long long)s->step, (long long)t->c->steps);
    if (rc == OK && t->ranks.rank == 0 && !automatic) rc = keeper_check_new(t->c, s->step, e);
    for (int i = 0; rc == OK && i < s->n_arrays; i++)
        rc = trainer_kern(t, t->k->upload(t->k, t->array[i], s->array[i], t->n * sizeof(float)), e);
    if (rc == OK && t->parallel) rc = check_same(t, e);
    if (rc == OK) rc = dit_train_refresh(t->net, e);
    t->step = t->saved = t->reported = s->step;
    t->bins = s->bins;
    t->best = s->best;
    t->window = s->window;
    struct feed_spec feed = {.step = (uint64_t)t->step,
                             .batch = t->c->batch,
                             .first = t->ranks.rank * t->local,
                             .local = t->local,
                             .rows = t->rows,
                             .threads = t->c->data_threads};
    return rc == OK ? feed_open(&t->feed, t->data, &feed, e) : rc;
}

static int share_batch(struct trainer *t, struct err *e) {
    const struct train_config *c = t->c;
    if (c->batch % t->ranks.size)
        return err_param(e, E_CONFLICT, "batch", "a batch of %d is not a multiple of the %d devices; %d is", c->batch, t->ranks.size,
                         (c->batch / t->ranks.size + 1) * t->ranks.size);
    t->local = c->batch / t->ranks.size;
    t->rows = c->microbatch && c->microbatch < t->local ? c->microbatch : t->local;
    if (t->local % t->rows)
        return err_param(e, E_CONFLICT, "microbatch", "a device's %d images are not a multiple of the microbatch, %d", t->local,
                         t->rows);
    t->micros = t->local / t->rows;
    return OK;
}

static int check_data(const struct trainer *t, struct err *e) {
    const struct arch *a = &t->c->desc.arch;
    const struct data_info *d = data_info(t->data);
    if (d->channels != a->in_channels || d->size != a->input_size)
        return err_param(e, E_CONFLICT, "size", "the data is [%d, %d, %d], the network takes [%d, %d, %d]", d->channels, d->size,
                         d->size, a->in_channels, a->input_size, a->input_size);
    if (d->classes <= a->num_classes) return OK;
    return err_param(e, E_RANGE, "classes", "the data has labels up to %d, the network %d classes: --classes %d holds them",
                     d->classes - 1, a->num_classes, d->classes);
}

int trainer_new(struct trainer **out, const struct train_config *c, const struct data *data, const struct parallel_spec *ranks,
                const struct train_events *on, struct err *e) {
    char why[256];
    struct trainer *t = mem_alloc(sizeof *t);
    *out = NULL;
    if (!t) return err_set(e, E_NOMEM, "no memory for a trainer");
    const struct arch *a = &c->desc.arch;
    *t = (struct trainer){.c = c, .data = data, .on = *on, .ranks = {.size = 1}};
    if (ranks) t->ranks = *ranks;
    t->numel = (size_t)a->in_channels * (size_t)a->input_size * (size_t)a->input_size;
    int rc = train_config_check(c, e);
    if (rc == OK) rc = share_batch(t, e);
    if (rc == OK) rc = check_data(t, e);
    if (rc == OK && kern_open(&t->k, &c->kern, why, sizeof why)) rc = err_param(e, E_DEVICE, "backend", "%s", why);
    if (rc == OK) rc = make_net(t, e);
    if (rc == OK) {
        t->n = dit_train_floats(t->net);
        t->whole.share = t->n;
        t->out_ld = t->numel * (size_t)(dit_channels(a) / a->in_channels);
        t->flops = 3 * dit_flops(a) * t->local; // forward once, backward twice its products
        t->peak = peak_of(t->k);
        rc = make_arrays(t, e);
    }
    if (rc == OK && t->ranks.size > 1) rc = parallel_join(&t->parallel, &t->ranks, t->k, dit_train_grads(t->net), e);
    if (rc == OK) rc = keeper_open(&t->keeper, c, &t->snapshot, t->ranks.rank == 0, e);
    if (rc == OK && t->ranks.rank == 0) rc = keeper_publish_vae(&t->keeper, e);
    if (rc == OK) rc = begin(t, e);
    if (rc == OK) return *out = t, OK;
    trainer_free(t);
    return rc;
}

void trainer_free(struct trainer *t) {
    if (!t) return;
    keeper_close(&t->keeper);
    feed_close(t->feed);
    snapshot_free(&t->snapshot);
    void *device[] = {t->x1, t->x0, t->norm2};
    for (size_t i = 0; t->k && i < sizeof device / sizeof *device; i++)
        if (device[i]) t->k->free(t->k, device[i]);
    for (int i = SNAPSHOT_MOMENT1; i < SNAPSHOT_ARRAYS; i++)
        if (t->array[i]) t->k->free(t->k, t->array[i]);
    parallel_free(t->parallel, t->well);
    dit_train_free(t->net);
    kern_close(t->k);
    void *host[] = {t->row, t->mix, t->judge, t->time, t->label, t->host};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) mem_free(host[i]);
    mem_free(t);
}

int64_t trainer_step(const struct trainer *t) { return t->step; }
const char *trainer_device(const struct trainer *t) { return t->k->device; }
size_t trainer_params(const struct trainer *t) {
    const struct dit_param *p;
    size_t sum = 0;
    for (int i = 0, n = dit_train_params(t->net, &p); i < n; i++) sum += p[i].count;
    return sum;
}
const float *trainer_weights(struct trainer *t, int array, struct err *e) {
    struct keeper_result ignored;
    keeper_wait(&t->keeper, &ignored);
    return trainer_fill(t, e) == OK ? t->snapshot.array[array] : NULL;
}
