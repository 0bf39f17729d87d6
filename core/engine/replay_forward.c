// SPDX-License-Identifier: MIT
/*
 * replay_forward: recorded evaluations of a network.
 *
 * sit and dit: out is the network's output at (x, t, y), out_null that of the null class. maskdit: the recorded x is a direction
 * of unit size; the preconditioned net was called as D(x*sigma; sigma), so F is evaluated at (c_in*x*sigma, c_noise) and out is
 * c_skip*x*sigma + c_out*F (EDM, table 1, sigma_data 0.5); out_cfg2_sigma2 has sigma 2 everywhere and guidance 2 against the zero
 * label vector over all channels.
 */
#include <math.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/engine/replay_int.h"

static int run(struct dit *m, struct replay *r, struct recorded *c, const float *x, const float *t, const int32_t *y,
               struct err *e) {
    size_t n = (size_t)c->n;
    int rc = r->k->upload(r->k, dit_x(m), x, n * c->numel * sizeof(float));
    if (rc) return err_set(e, E_DEVICE, "%s", r->k->why);
    rc = dit_forward(m, c->n, t, y, e);
    if (rc != OK) return rc;
    rc = r->k->download(r->k, c->ours, dit_out(m), n * c->out_numel * sizeof(float));
    return rc ? err_set(e, E_DEVICE, "%s", r->k->why) : OK;
}

static void all_null(struct recorded *c) {
    for (int i = 0; i < c->n; i++) c->y[i] = c->arch.num_classes;
}

static int plain(struct dit *m, struct replay *r, struct recorded *c, struct difference *d, struct err *e) {
    float *t = NULL;
    size_t all = (size_t)c->n * c->out_numel;
    int rc = replay_tensor(&t, c, "t", (size_t)c->n, e);
    if (rc == OK) rc = run(m, r, c, c->x, t, c->y, e);
    if (rc == OK) replay_compare(d, c->ours, c->out, all);
    if (rc == OK && tensor_find(&c->file.table, "out_null")) {
        rc = replay_tensor(&c->out, c, "out_null", all, e);
        all_null(c);
        if (rc == OK) rc = run(m, r, c, c->x, t, c->y, e);
        if (rc == OK) replay_compare(d, c->ours, c->out, all);
    }
    mem_free(t);
    return rc;
}

/* ---- maskdit ---- */

struct preconditioned {
    float *sigma, *t, *x, *without;
};

static void scale_inputs(const struct preconditioned *p, const struct recorded *c) {
    for (size_t i = 0; i < (size_t)c->n; i++) {
        double s = (double)p->sigma[i], c_in = 1 / sqrt(s * s + 0.25);
        p->t[i] = (float)(log(s) / 4);
        for (size_t j = 0; j < c->numel; j++) p->x[i * c->numel + j] = (float)(c_in * s * (double)c->x[i * c->numel + j]);
    }
}

// ours: F -> D
static void denoised(const struct preconditioned *p, struct recorded *c) {
    for (size_t i = 0; i < (size_t)c->n; i++) {
        double s = (double)p->sigma[i], q = s * s + 0.25, c_skip = 0.25 / q, c_out = 0.5 * s / sqrt(q);
        for (size_t j = i * c->numel; j < (i + 1) * c->numel; j++)
            c->ours[j] = (float)(c_skip * s * (double)c->x[j] + c_out * (double)c->ours[j]);
    }
}

static int guided(struct dit *m, struct replay *r, struct recorded *c, struct preconditioned *p, struct difference *d,
                  struct err *e) {
    size_t all = (size_t)c->n * c->numel;
    for (int i = 0; i < c->n; i++) p->sigma[i] = 2;
    scale_inputs(p, c);
    int rc = run(m, r, c, p->x, p->t, c->y, e);
    if (rc == OK) memcpy(p->without, c->ours, all * sizeof(float)); // the labelled half, for now
    all_null(c);
    if (rc == OK) rc = run(m, r, c, p->x, p->t, c->y, e);
    if (rc == OK) rc = replay_tensor(&c->out, c, "out_cfg2_sigma2", all, e);
    if (rc != OK) return rc;
    for (size_t i = 0; i < all; i++) c->ours[i] += 2 * (p->without[i] - c->ours[i]);
    denoised(p, c);
    replay_compare(d, c->ours, c->out, all);
    return OK;
}

static int edm(struct dit *m, struct replay *r, struct recorded *c, struct difference *d, struct err *e) {
    size_t n = (size_t)c->n, all = n * c->numel;
    struct preconditioned p = {
        .t = mem_array(n, sizeof(float)), .x = mem_array(all, sizeof(float)), .without = mem_array(all, sizeof(float))};
    int rc = p.t && p.x && p.without ? replay_tensor(&p.sigma, c, "sigma", n, e) : err_set(e, E_NOMEM, "no memory for the case");
    if (rc == OK) scale_inputs(&p, c);
    if (rc == OK) rc = run(m, r, c, p.x, p.t, c->y, e);
    if (rc == OK) {
        denoised(&p, c);
        replay_compare(d, c->ours, c->out, all);
        if (tensor_find(&c->file.table, "out_cfg2_sigma2")) rc = guided(m, r, c, &p, d, e);
    }
    mem_free(p.sigma), mem_free(p.t), mem_free(p.x), mem_free(p.without);
    return rc;
}

int replay_forward(struct replay *r, struct recorded *c, struct replay_result *result, struct err *e) {
    const char *family = replay_meta(c, "family");
    struct difference d = {.finite = true};
    struct dit *m = NULL;
    bool preconditioned = !strcmp(family, "maskdit") || !strcmp(family, "sd-dit");
    if (!preconditioned && strcmp(family, "sit") != 0 && strcmp(family, "dit") != 0)
        return err_param(e, E_UNSUPPORTED, "family", "the case's family \"%s\" is not known here", family);
    int rc = recorded_open(c, r, "x", e);
    if (rc == OK && preconditioned && c->out_numel != c->numel)
        rc = err_param(e, E_CONFLICT, "out", "the case's 'out' is not as large as its 'x'");
    size_t plane = c->numel / (size_t)(c->arch.in_channels ? c->arch.in_channels : 1);
    if (rc == OK) rc = dit_new(&m, r->k, &c->arch, r->weights, (int)(c->out_numel / plane), c->n, e);
    if (rc == OK) rc = preconditioned ? edm(m, r, c, &d, e) : plain(m, r, c, &d, e);
    if (rc == OK) replay_conclude(result, &d, 1e-5);
    dit_free(m);
    return rc;
}
