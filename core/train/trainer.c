// SPDX-License-Identifier: MIT
#include "core/train/trainer.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/train/grid.h"
#include "core/train/trainer_int.h"

/* ---- a step ---- */

// Microbatch m: its images are noised, seen, judged; their gradients are added.
static int microbatch(struct trainer *t, int m, struct err *e) {
    struct kern *k = t->k;
    struct feed_batch b;
    struct objective_row *row = t->row + (size_t)m * (size_t)t->rows;
    float *xt = dit_train_x(t->net), *loss = t->loss + (size_t)m * (size_t)t->rows * 2;
    if (feed_next(t->feed, &b, e)) return t->unread = true, e->status;
    for (int i = 0; i < t->rows; i++) {
        objective_row(&t->c->objective, (uint32_t)t->step, (uint32_t)(b.first + i), b.label[i], 1.0 / t->c->batch, &row[i]);
        t->mix[i] = row[i].mix, t->judge[i] = row[i].loss, t->time[i] = row[i].t, t->label[i] = row[i].y;
    }
    int rc = k->upload(k, t->x1, b.x, (size_t)t->rows * t->numel * sizeof(float));
    if (!rc) rc = k->mix(k, xt, t->x0, t->x1, t->numel, t->mix, t->rows);
    if (rc) return trainer_kern(t, rc, e);
    if (dit_train_forward(t->net, t->rows, t->time, t->label, e)) return e->status;
    rc =
        k->loss(k, dit_train_dout(t->net), loss, dit_train_out(t->net), t->out_ld, t->x1, t->x0, xt, t->numel, t->judge, t->rows);
    if (rc) return trainer_kern(t, rc, e);
    if (t->parallel && m == t->micros - 1) dit_train_on_grads(t->net, parallel_gradients, t->parallel);
    rc = dit_train_backward(t->net, t->rows, m > 0, e);
    if (t->parallel) dit_train_on_grads(t->net, NULL, NULL);
    return rc;
}

// The pieces of the flat arrays that this process steps its shares of: alone, one, its own.
static int pieces(const struct trainer *t, const struct parallel_piece **out) {
    return t->parallel ? parallel_pieces(t->parallel, out) : (*out = &t->whole, 1);
}

// The sum of squares of all gradients, of which this process holds its shares.
static int gradient_norm(struct trainer *t, struct err *e) {
    struct kern *k = t->k;
    const struct parallel_piece *p;
    const float *grads = dit_train_grads(t->net);
    int n = pieces(t, &p), rc = k->zero(k, t->norm2, 2 * sizeof(double)); // moved2 too
    for (int i = 0; i < n && !rc; i++) {
        rc = k->sum_squares(k, t->norm2, grads + p[i].own, p[i].share);
        if (!rc && p[i].rest_count && t->ranks.rank == 0) rc = k->sum_squares(k, t->norm2, grads + p[i].rest, p[i].rest_count);
    }
    if (rc || !t->parallel) return trainer_kern(t, rc, e);
    parallel_sum(t->parallel, t->norm2, 1);
    return parallel_wait(t->parallel, e);
}

// Floats [at, at + n) of all arrays; moved2 may be NULL
static int step_floats(struct trainer *t, const struct kern_adamw *a, size_t at, size_t n, double *moved2) {
    float *ema[KERN_MAX_EMA];
    for (int i = 0; i < a->n_ema; i++) ema[i] = t->array[SNAPSHOT_EMA + i] + at;
    return t->k->adamw(t->k, t->array[SNAPSHOT_WEIGHTS] + at, t->array[SNAPSHOT_MOMENT1] + at, t->array[SNAPSHOT_MOMENT2] + at, ema,
                       dit_train_grads(t->net) + at, n, a, t->norm2, moved2);
}

// Gradients are this process's when it begins, summed over all in its shares when it ends.
static int update(struct trainer *t, struct err *e) {
    const struct train_config *c = t->c;
    const struct parallel_piece *p;
    double count = (double)(t->step + 1);
    struct kern_adamw a = {.lr = train_config_lr(c, t->step),
                           .beta1 = c->beta1,
                           .beta2 = c->beta2,
                           .eps = c->eps,
                           .decay = c->decay,
                           .bias1 = 1 - pow(c->beta1, count),
                           .bias2 = 1 - pow(c->beta2, count),
                           .grad_scale = 1,
                           .max_norm = c->clip,
                           .n_ema = c->n_ema};
    for (int i = 0; i < c->n_ema; i++) a.ema[i] = c->ema[i];
    if (t->parallel && parallel_finish(t->parallel, e)) return e->status;
    int rc = gradient_norm(t, e), n = pieces(t, &p), failed = 0;
    for (int i = 0; i < n && rc == OK && !failed; i++) {
        failed = step_floats(t, &a, p[i].own, p[i].share, t->moved2);
        if (!failed && p[i].rest_count) failed = step_floats(t, &a, p[i].rest, p[i].rest_count, t->ranks.rank == 0 ? t->moved2 : NULL);
        if (t->parallel) parallel_share(t->parallel, t->array[SNAPSHOT_WEIGHTS], i);
    }
    if (rc == OK) rc = trainer_kern(t, failed, e);
    if (rc == OK && t->parallel) rc = parallel_wait(t->parallel, e);
    return rc == OK ? dit_train_refresh(t->net, e) : rc;
}

/* ---- the writer ---- */

void trainer_tell(struct trainer *t, enum train_note kind, int64_t step, const char *text) {
    if (t->on.note) t->on.note(t->on.ctx, kind, step, text);
}

// Waits for the writer and says how it fared.
static int settle(struct trainer *t) {
    struct keeper_result r;
    char text[1200];
    if (!keeper_wait(&t->keeper, &r)) return OK;
    if (r.saved) t->saved = r.step, trainer_tell(t, NOTE_SAVED, r.step, t->keeper.last);
    if (r.published) trainer_tell(t, NOTE_PUBLISHED, r.step, t->c->publish);
    if (r.save_err.status != OK) {
        snprintf(text, sizeof text, "the checkpoint could not be written: %s. The last one: %s", r.save_err.text,
                 t->keeper.last[0] ? t->keeper.last : "none of this run");
        trainer_tell(t, NOTE_TROUBLE, r.step, text);
    }
    if (r.publish_err.status != OK) {
        snprintf(text, sizeof text, "the model could not be published: %s", r.publish_err.text);
        trainer_tell(t, NOTE_TROUBLE, r.step, text);
    }
    return r.save_err.status;
}

/* ---- what came of it ---- */

static const char *last_good(const struct trainer *t) { return t->keeper.last[0] ? t->keeper.last : "none was written"; }

// Names the first gradient that is not finite in the order in which backward made them, from the network's end on. Gradients are
// still there: the next step would write them anew.
static int blame(struct trainer *t, const char *what, struct err *e) {
    const struct dit_param *param;
    const char *name = NULL;
    int n = dit_train_params(t->net, &param), rc = OK;
    float *grads = mem_array(t->n, sizeof *grads);
    settle(t);
    if (t->parallel) parallel_gather(t->parallel, dit_train_grads(t->net), NULL); // all ranks blame
    if (grads) rc = t->k->download(t->k, grads, dit_train_grads(t->net), t->n * sizeof *grads);
    for (int i = n - 1; grads && rc == 0 && i >= 0 && !name; i--)
        if (!floats_finite(grads + param[i].offset, param[i].count)) name = param[i].name;
    if (name)
        err_param(e, E_NONFINITE, name, "step %lld: %s is not finite; first seen in the gradient of '%s'. The last good checkpoint: %s",
                  (long long)t->step + 1, what, name, last_good(t));
    else
        err_param(e, E_NONFINITE, "gradients", "step %lld: %s is not finite, though all gradients are: weights or moments were before. The last good checkpoint: %s",
                  (long long)t->step + 1, what, last_good(t));
    mem_free(grads);
    return E_NONFINITE;
}

// Reads the step's numbers back, checks and sums them.
static int account(struct trainer *t, double *step_loss, struct err *e) {
    double sums[4] = {0, 0, 0, *t->stop != 0}; // of all ranks: loss, its second part, squares of the update, a wish to stop
    int rc = t->k->download(t->k, t->host, t->norm2, trainer_numbers(t));
    if (rc) return trainer_kern(t, rc, e);
    const double norm2 = t->host[0];
    const float *loss = (const float *)(t->host + 2);
    for (int i = 0; i < t->local; i++)
        for (int j = 0; j < 2; j++) sums[j] += loss[2 * i + j] / t->c->batch;
    sums[2] = t->host[1];
    if (t->parallel && parallel_numbers(t->parallel, sums, 4, e)) return e->status;
    t->stopping = sums[3] > 0;
    if (!isfinite(sums[0] + sums[1])) return blame(t, "the loss", e);
    if (!isfinite(norm2)) return blame(t, "the gradient's norm", e);
    if (!isfinite(sums[2])) return blame(t, "the update", e);
    for (int i = 0; i < t->local; i++)
        objective_bins_add(&t->bins, t->row[i].place, loss[2 * i] * (t->c->objective.discrete ? 1 : t->row[i].velocity));
    *step_loss = sums[0] + sums[1];
    t->sum.loss += *step_loss, t->sum.mse += sums[0], t->sum.vb += sums[1];
    t->sum.grad += sqrt(norm2), t->sum.moved += sqrt(sums[2]);
    t->window.loss += *step_loss, t->window.steps++;
    return OK;
}

// By what the run's steps took until now, with all that came between them
static double seconds_left(const struct trainer *t) {
    return (clock_seconds() - t->began) / (double)(t->step - t->began_step) * (double)(t->c->steps - t->step);
}

static int one_step(struct trainer *t, struct err *e) {
    double loss = 0;
    int rc = OK;
    for (int m = 0; rc == OK && m < t->micros; m++) rc = microbatch(t, m, e);
    if (rc == OK) rc = update(t, e);
    if (rc == OK) rc = account(t, &loss, e);
    if (rc != OK) return rc;
    t->step++;
    t->held = false;
    if (t->on.step) t->on.step(t->on.ctx, t->step, loss, seconds_left(t));
    return OK;
}

/* ---- by the step's number ---- */

static bool due(const struct trainer *t, int64_t every) { return every > 0 && (t->step % every == 0 || t->step == t->c->steps); }

static void report(struct trainer *t) {
    double n = (double)(t->step - t->reported), images = n * t->c->batch, now = clock_seconds(), seconds = now - t->reported_at;
    if (n == 0) return;
    struct train_stats s = {.step = t->step,
                            .loss = t->sum.loss / n,
                            .mse = t->sum.mse / n,
                            .vb = t->sum.vb / n,
                            .grad_norm = t->sum.grad / n,
                            .update_norm = t->sum.moved / n};
    s.epoch = (double)t->step * t->c->batch / (double)data_info(t->data)->n;
    s.lr = train_config_lr(t->c, t->step - 1);
    s.images_per_second = images / seconds;
    s.mfu = t->peak > 0 ? t->flops * n / seconds / t->peak : 0;
    s.seconds_left = seconds_left(t);
    s.loss_by_time = t->bins.loss;
    memset(&t->sum, 0, sizeof t->sum);
    t->reported = t->step, t->reported_at = now;
    if (t->on.stats) t->on.stats(t->on.ctx, &s);
}

// The snapshot becomes this step's. Every rank takes part, since moments and averages lie in shares; rank 0 has it then.
static int hold(struct trainer *t, struct err *e) {
    settle(t);
    if (t->held) return OK;
    t->held = true;
    for (int i = SNAPSHOT_MOMENT1; t->parallel && i < t->snapshot.n_arrays; i++)
        if (parallel_gather(t->parallel, t->array[i], e)) return e->status;
    return t->ranks.rank == 0 ? trainer_fill(t, e) : OK;
}

static bool want_publish(struct trainer *t) {
    if (!t->c->publish || !due(t, t->c->publish_every) || t->window.steps == 0) return false;
    double loss = t->window.loss / (double)t->window.steps;
    bool better = loss < t->best;
    t->window = (struct loss_window){0};
    if (better) t->best = loss;
    return better || !t->c->publish_improved;
}

static int pictures(struct trainer *t, struct err *e) {
    struct tensor_table table = {0};
    struct err here = {0};
    char path[600];
    snprintf(path, sizeof path, "%s/samples", t->c->out);
    int rc = file_make_dir(path, &here);
    snprintf(path, sizeof path, "%s/samples/step-%08lld.png", t->c->out, (long long)t->step);
    if (rc == OK) rc = dit_train_export(t->net, &table, t->snapshot.array[SNAPSHOT_EMA], &here);
    if (rc == OK) rc = grid_write(path, t->c, t->k, &table, t->c->vae, t->stop, &here);
    mem_free(table.tensors);
    if (rc == E_DEVICE) return err_set(e, rc, "%s", here.text);
    trainer_tell(t, rc == OK ? NOTE_PICTURES : NOTE_TROUBLE, t->step, rc == OK ? path : here.text);
    return OK;
}

static int after_step(struct trainer *t, bool last, struct err *e) {
    bool save = due(t, t->c->save_every) || last, show = due(t, t->c->sample_every), publish = want_publish(t); // alike on all ranks
    if (due(t, t->c->log_every) || last) report(t);
    if (!save && !show && !publish) return OK;
    if (hold(t, e)) return e->status;
    if (t->ranks.rank != 0) return OK;
    keeper_start(&t->keeper, save, publish);
    return show ? pictures(t, e) : OK; // beside the writer: both only read
}

// After a signal behind the last look, or data at fault. With other ranks only what they have already given can be saved.
static int save_last(struct trainer *t, struct err *e) {
    if (t->saved == t->step || t->ranks.rank != 0 || (t->parallel && !t->held)) return OK;
    if (hold(t, e)) return e->status;
    keeper_start(&t->keeper, true, false);
    return settle(t);
}

int trainer_run(struct trainer *t, const volatile sig_atomic_t *stop, struct err *e) {
    struct err here = {0}, last = {0};
    int rc = OK;
    t->stop = stop;
    t->stopping = t->ranks.size == 1 && *stop;
    t->began = t->reported_at = clock_seconds(), t->began_step = t->step;
    while (rc == OK && t->step < t->c->steps && !t->stopping) {
        rc = one_step(t, &here);
        if (t->ranks.size == 1 && *stop) t->stopping = true;
        if (rc == OK) rc = after_step(t, t->step == t->c->steps || t->stopping, &here);
    }
    int saved = settle(t);
    if (saved == OK && (rc == OK || t->unread)) saved = save_last(t, &last);
    t->well = rc == OK || (rc == E_NONFINITE && !t->unread); // by numbers that all ranks have
    if (rc == E_NONFINITE && !t->unread) return err_param(e, rc, here.param, "%s", here.text);
    if (rc != OK)
        return err_param(e, rc, here.param, "step %lld: %s. The last good checkpoint: %s", (long long)t->step + 1, here.text,
                         last_good(t));
    return saved != OK ? err_set(e, saved, "%s", last.status ? last.text : "the last checkpoint could not be written") : OK;
}
