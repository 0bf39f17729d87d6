// SPDX-License-Identifier: MIT
/*
 * replay_train: recorded losses and their gradients. A case holds images x1, their noise (x0; in DiT's cases "noise"), t, y,
 * which labels were dropped, the loss of each image and, as grad.NAME, some or all gradients of the mean loss. What is trained is
 * said by path, prediction and loss_weight in SiT's cases; DiT's have the mean squared error and, with a learned variance, the
 * bound.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/engine/replay_int.h"
#include "core/model/dit_train.h"
#include "core/train/objective.h"

struct training {
    struct dit_train *net;
    struct objective objective;
    struct kern_loss *rows;           // [n]
    float *t, *drop, *x0, *xt, *loss; // host: [n], [n], images, images, [n] recorded
    float *flat, *parts;              // host: weights, then gradients; [n, 2] ours
    float *on_x1, *on_x0, *on_loss;   // buffers
};

static int unknown(const struct recorded *c, const char *key, struct err *e) {
    return err_param(e, E_UNSUPPORTED, key, "the case's %s \"%s\" is not known", key, replay_meta(c, key));
}

static int read_objective(struct objective *o, const struct recorded *c, struct err *e) {
    const char *family = replay_meta(c, "family"), *weight = replay_meta(c, "loss_weight");
    *o = (struct objective){.discrete = !strcmp(family, "dit")};
    o->learned_range = o->discrete && c->arch.learn_sigma;
    if (o->discrete) return OK;
    if (strcmp(family, "sit") != 0)
        return err_param(e, E_UNSUPPORTED, "family", "training with a mask (family \"%s\") is not supported yet", family);
    int path = path_parse(replay_meta(c, "path")), prediction = prediction_parse(replay_meta(c, "prediction"));
    int weighting = *weight ? weighting_parse(weight) : WEIGHTING_NONE;
    if (path < 0) return unknown(c, "path", e);
    if (prediction < 0) return unknown(c, "prediction", e);
    if (weighting < 0) return unknown(c, "loss_weight", e);
    if (prediction == PRED_VELOCITY) weighting = WEIGHTING_NONE; // as the authors' code has it
    o->path = (enum path_kind)path, o->prediction = (enum prediction)prediction, o->weighting = (enum weighting)weighting;
    return OK;
}

// Times, labels as they were trained, noised images and each image's loss.
static int read_rows(struct training *s, struct recorded *c, struct err *e) {
    size_t n = (size_t)c->n, all = n * c->numel;
    const char *noise = tensor_find(&c->file.table, "x0") ? "x0" : "noise";
    if (replay_tensor(&s->t, c, "t", n, e) || replay_tensor(&s->drop, c, "drop", n, e) ||
        replay_tensor(&s->x0, c, noise, all, e) || replay_tensor(&s->loss, c, "loss", n, e))
        return e->status;
    s->xt = mem_array(all, sizeof *s->xt), s->rows = mem_array(n, sizeof *s->rows), s->parts = mem_array(2 * n, sizeof *s->parts);
    if (!s->xt || !s->rows || !s->parts) return err_set(e, E_NOMEM, "no memory for the case");
    for (size_t i = 0; i < n; i++) {
        struct objective_row row;
        float most = s->objective.discrete ? 999 : 1, whole = floorf(s->t[i]);
        if (!(s->t[i] >= 0 && s->t[i] <= most) || (s->objective.discrete && s->t[i] != whole))
            return err_param(e, E_RANGE, "t", "the case's time %g is not one that is trained", (double)s->t[i]);
        if (s->drop[i] != 0 && !c->arch.class_dropout)
            return err_param(e, E_CONFLICT, "drop", "the case drops labels, the network has no null class");
        objective_row_at(&s->objective, (double)s->t[i], c->y[i], 1.0 / c->n, &row);
        if (s->drop[i] != 0) c->y[i] = c->arch.num_classes;
        s->rows[i] = row.loss;
        for (size_t j = i * c->numel; j < (i + 1) * c->numel; j++) s->xt[j] = fmaf(row.mix.a0, s->x0[j], row.mix.a1 * c->x[j]);
    }
    return OK;
}

static int make_net(struct training *s, const struct replay *r, struct recorded *c, struct err *e) {
    struct kern *k = r->k;
    size_t images = (size_t)c->n * c->numel * sizeof(float);
    if (arch_match(&c->arch, r->weights, e) || dit_train_new(&s->net, k, &c->arch, c->n, RECOMPUTE_NONE, e)) return e->status;
    size_t floats = dit_train_floats(s->net);
    s->flat = mem_array(floats, sizeof *s->flat);
    if (!s->flat) return err_set(e, E_NOMEM, "no memory for %zu weights", floats);
    if (dit_train_import(s->net, s->flat, r->weights, e)) return e->status;
    int rc = k->upload(k, dit_train_weights(s->net), s->flat, floats * sizeof *s->flat);
    if (!rc) rc = k->alloc(k, images, (void **)&s->on_x1);
    if (!rc) rc = k->alloc(k, images, (void **)&s->on_x0);
    if (!rc) rc = k->alloc(k, 2 * (size_t)c->n * sizeof(float), (void **)&s->on_loss);
    return rc ? err_set(e, E_DEVICE, "%s", k->why) : dit_train_refresh(s->net, e);
}

static int upload_images(const struct training *s, struct kern *k, const struct recorded *c) {
    size_t images = (size_t)c->n * c->numel * sizeof(float);
    int rc = k->upload(k, s->on_x1, c->x, images);
    if (!rc) rc = k->upload(k, s->on_x0, s->x0, images);
    return rc ? rc : k->upload(k, dit_train_x(s->net), s->xt, images);
}

static int step(struct training *s, struct kern *k, const struct recorded *c, struct err *e) {
    struct dit_train *net = s->net;
    size_t out_ld = c->numel * (c->arch.learn_sigma ? 2 : 1);
    int rc = upload_images(s, k, c);
    if (!rc && dit_train_forward(net, c->n, s->t, c->y, e)) return e->status;
    if (!rc)
        rc = k->loss(k, dit_train_dout(net), s->on_loss, dit_train_out(net), out_ld, s->on_x1, s->on_x0, dit_train_x(net),
                     c->numel, s->rows, c->n);
    if (!rc && dit_train_backward(net, c->n, false, e)) return e->status;
    if (!rc) rc = k->download(k, s->parts, s->on_loss, 2 * (size_t)c->n * sizeof(float));
    if (!rc) rc = k->download(k, s->flat, dit_train_grads(net), dit_train_floats(net) * sizeof(float));
    return rc ? err_set(e, E_DEVICE, "%s", k->why) : OK;
}

// The recorded gradients one by one: the one that is farthest off stands for all.
static int compare(struct replay_result *worst, const struct training *s, struct recorded *c, struct err *e) {
    const struct dit_param *params;
    int n = dit_train_params(s->net, &params), found = 0;
    char name[72];
    float *recorded = NULL;
    for (int i = 0; i < n; i++) {
        struct difference d = {.finite = true};
        struct replay_result here;
        snprintf(name, sizeof name, "grad.%s", params[i].name);
        if (!tensor_find(&c->file.table, name)) continue;
        if (replay_tensor(&recorded, c, name, params[i].count, e)) return mem_free(recorded), e->status;
        replay_compare(&d, s->flat + params[i].offset, recorded, params[i].count);
        replay_conclude(&here, &d, 1e-4);
        snprintf(here.worst, sizeof here.worst, "%s", params[i].name);
        bool worse = !found++ || here.rel_l2 > worst->rel_l2, finite = here.finite && (found == 1 || worst->finite);
        if (worse) *worst = here;
        worst->finite = finite;
    }
    mem_free(recorded);
    return found ? OK : err_param(e, E_FORMAT, "grad", "the case has no gradients of this network");
}

static void compare_losses(struct replay_result *result, const struct training *s, const struct recorded *c) {
    struct difference d = {.finite = true};
    struct replay_result loss;
    for (int i = 0; i < c->n; i++) s->parts[i] = s->parts[2 * i] + s->parts[2 * i + 1];
    replay_compare(&d, s->parts, s->loss, (size_t)c->n);
    replay_conclude(&loss, &d, 0);
    result->loss = loss.rel_l2;
    result->finite = result->finite && loss.finite;
}

int replay_train(struct replay *r, struct recorded *c, struct replay_result *result, struct err *e) {
    struct training s = {0};
    int rc = recorded_open(c, r, "x1", e);
    if (rc == OK) rc = read_objective(&s.objective, c, e);
    if (rc == OK) rc = read_rows(&s, c, e);
    if (rc == OK) rc = make_net(&s, r, c, e);
    if (rc == OK) rc = step(&s, r->k, c, e);
    if (rc == OK) rc = compare(result, &s, c, e);
    if (rc == OK) compare_losses(result, &s, c);
    float *buffers[] = {s.on_x1, s.on_x0, s.on_loss}, *host[] = {s.t, s.drop, s.x0, s.xt, s.loss, s.flat, s.parts};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (buffers[i]) r->k->free(r->k, buffers[i]);
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) mem_free(host[i]);
    mem_free(s.rows);
    dit_train_free(s.net);
    return rc;
}
