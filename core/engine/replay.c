// SPDX-License-Identifier: MIT
#include "core/engine/replay_int.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/mem.h"

// What a bare checkpoint tells. Cases of diffusers' weights were recorded with diffusers' numbers.
static int prove(struct replay *r, struct err *e) {
    if (arch_infer(&r->proven, r->weights, e)) return e->status;
    struct { const char *key; int *value; } said[] = {{"num_heads", &r->proven.num_heads}, {"input_size", &r->proven.input_size}};
    for (size_t i = 0; i < sizeof said / sizeof *said; i++) {
        const char *v = checkpoint_meta(&r->file, said[i].key);
        int n = v ? atoi(v) : 0;
        if (n > 0 && (i == 0 || !*said[i].value)) *said[i].value = n;
    }
    r->proven.diffusers = strcmp(r->file.layout, "diffusers") == 0;
    return OK;
}

// A file or folder that is no model directory: a network's weights, else an autoencoder's.
static int open_bare(struct replay *r, const char *path, struct err *e) {
    struct err as_network = {0}, as_vae = {0};
    int rc = checkpoint_open(&r->file, path, &as_network);
    r->weights = &r->file.table;
    if (rc == OK) rc = prove(r, &as_network);
    if (rc == OK) return OK;
    checkpoint_close(&r->file);
    r->is_vae = vae_file_open(&r->vae, path, NULL, &as_vae) == OK;
    if (r->is_vae) return OK;
    *e = as_vae.status == E_CONFLICT && strcmp(as_vae.param, "decoder.conv_in.weight") != 0 ? as_vae : as_network; // a faulty autoencoder
    return e->status;
}

static int open_dir(struct replay *r, const char *path, struct err *e) {
    const struct latent *l = &r->dir.desc.latent;
    int rc = model_dir_open(&r->dir, path, e);
    if (rc != OK) return r->is_dir = false, rc;
    r->weights = r->dir.weights;
    r->proven = r->dir.desc.arch;
    if (!l->vae_file[0]) return OK;
    char *vae = mem_printf("%s/%s", path, l->vae_file);
    rc = vae ? vae_file_open(&r->vae, vae, l->vae_sha256, e) : err_set(e, E_NOMEM, "no memory for a path");
    r->is_vae = rc == OK;
    mem_free(vae);
    return rc;
}

int replay_open(struct replay **out, struct kern *k, const char *model, int heads, struct err *e) {
    struct err local = {0};
    *out = NULL;
    if (!e) e = &local;
    struct replay *r = mem_alloc(sizeof *r);
    if (!r) return err_set(e, E_NOMEM, "no memory to replay");
    r->k = k, r->heads = heads;
    char *described = mem_printf("%s/model.json", model);
    r->is_dir = described && access(described, F_OK) == 0;
    mem_free(described);
    int rc = r->is_dir ? open_dir(r, model, e) : open_bare(r, model, e);
    if (rc != OK) return replay_close(r), rc;
    *out = r;
    return OK;
}

void replay_close(struct replay *r) {
    if (!r) return;
    runner_free(r->runner);
    if (r->is_vae) vae_file_close(&r->vae);
    if (r->is_dir) model_dir_close(&r->dir);
    else checkpoint_close(&r->file);
    mem_free(r);
}

/* ---- reading a case ---- */

const char *replay_meta(const struct recorded *c, const char *key) {
    const char *v = checkpoint_meta(&c->file, key);
    return v ? v : "";
}

int replay_number(double *out, const struct recorded *c, const char *key, struct err *e) {
    const char *v = replay_meta(c, key);
    char *end;
    *out = strtod(v, &end);
    return *v && !*end ? OK : err_param(e, E_FORMAT, key, "the case's '%s' is \"%s\", not a number", key, v);
}

int replay_tensor(float **out, struct recorded *c, const char *name, size_t count, struct err *e) {
    const struct tensor *t = tensor_find(&c->file.table, name);
    if (!t) return err_param(e, E_FORMAT, name, "the case has no tensor '%s'", name);
    if (count && t->count != count) return err_param(e, E_FORMAT, name, "the case's tensor '%s' has %zu elements, not %zu", name, t->count, count);
    mem_free(*out);
    *out = mem_array(t->count, sizeof **out);
    return *out ? tensor_to_f32(*out, t, e) : err_set(e, E_NOMEM, "no memory for the case's '%s'", name);
}

void recorded_close(struct recorded *c) {
    mem_free(c->x), mem_free(c->out), mem_free(c->ours), mem_free(c->y);
    checkpoint_close(&c->file);
}

static int check_fits(const struct arch *a, const struct arch *proven, struct err *e) {
    struct { const char *name; int said, is; } fields[] = {
        {"input_size", a->input_size, proven->input_size},    {"patch_size", a->patch_size, proven->patch_size},
        {"in_channels", a->in_channels, proven->in_channels}, {"hidden_size", a->hidden_size, proven->hidden_size},
        {"depth", a->depth, proven->depth},                   {"num_classes", a->num_classes, proven->num_classes},
        {"learn_sigma", a->learn_sigma, proven->learn_sigma}, {"block", a->block, proven->block},
        {"decoder.hidden_size", a->decoder.hidden_size, proven->decoder.hidden_size},
        {"decoder.depth", a->decoder.depth, proven->decoder.depth},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (fields[i].said != fields[i].is)
            return err_param(e, E_CONFLICT, fields[i].name, "the case was recorded with %s %d, the weights have %d", fields[i].name, fields[i].said,
                             fields[i].is);
    return OK;
}

// A sample has the input's channels; a network of family dit may put out twice as many.
static int read_out(struct recorded *c, struct err *e) {
    const struct tensor *t = tensor_find(&c->file.table, "out");
    if (!t || t->ndim != 4) return err_param(e, E_FORMAT, "out", "the case has no images 'out' [n, C, H, W]");
    int64_t side = c->arch.input_size, most = c->arch.in_channels * (c->arch.learn_sigma ? 2 : 1);
    bool fits = t->shape[1] == c->arch.in_channels || (!strcmp(replay_meta(c, "kind"), "forward") && t->shape[1] == most);
    int64_t shape[4] = {c->n, t->shape[1], side, side};
    if (!fits || !tensor_shape_is(t, 4, shape)) return err_param(e, E_CONFLICT, "out", "the case's 'out' does not have the network's output shape");
    c->out_numel = t->count / (size_t)c->n;
    return replay_tensor(&c->out, c, "out", t->count, e);
}

// Opens a case whose input images are in tensor `input`.
int recorded_open(struct recorded *c, const struct replay *r, const char *input, struct err *e) {
    c->arch = r->proven;
    if (*replay_meta(c, "config") && arch_parse_config(&c->arch, replay_meta(c, "config"), e)) return e->status;
    struct arch fitting = r->proven; // trained without label dropout: all rows of the label table are classes, which no tensor tells
    if (!r->is_dir && fitting.class_dropout && !fitting.one_hot && c->arch.num_classes == fitting.num_classes + 1)
        fitting.num_classes++, c->arch.class_dropout = false;
    if (check_fits(&c->arch, &fitting, e)) return e->status;
    if (r->heads) c->arch.num_heads = r->heads;
    if (c->arch.num_heads == 0) return err_param(e, E_CONFLICT, "num_heads", "nothing tells the number of heads: give --heads");
    if (arch_check(&c->arch, e)) return e->status;
    const struct tensor *t = tensor_find(&c->file.table, input);
    if (!t || t->ndim != 4) return err_param(e, E_FORMAT, input, "the case has no images '%s' [n, C, H, W]", input);
    int64_t shape[4] = {t->shape[0], c->arch.in_channels, c->arch.input_size, c->arch.input_size};
    if (!tensor_shape_is(t, 4, shape) || t->shape[0] < 1 || t->shape[0] > 4096)
        return err_param(e, E_CONFLICT, input, "the case's '%s' does not have the network's input shape", input);
    c->n = (int)t->shape[0];
    c->numel = t->count / (size_t)c->n;
    float *y = NULL;
    int rc = replay_tensor(&c->x, c, input, 0, e);
    if (rc == OK && strcmp(replay_meta(c, "kind"), "train") != 0) rc = read_out(c, e);
    if (rc == OK) rc = replay_tensor(&y, c, "y", (size_t)c->n, e);
    c->ours = mem_array((size_t)c->n * c->out_numel, sizeof *c->ours);
    c->y = mem_array((size_t)c->n, sizeof *c->y);
    if (rc == OK && (!c->ours || !c->y)) rc = err_set(e, E_NOMEM, "no memory for the case's outputs");
    int classes = c->arch.num_classes + c->arch.class_dropout;
    for (int i = 0; rc == OK && i < c->n; i++) {
        if (y[i] >= 0 && y[i] < (float)classes && y[i] == floorf(y[i])) c->y[i] = (int32_t)y[i];
        else rc = err_param(e, E_RANGE, "y", "the case's label %g is none of 0..%d", (double)y[i], classes - 1);
    }
    mem_free(y);
    return rc;
}

/* ---- comparing ---- */

void replay_compare(struct difference *d, const float *ours, const float *recorded, size_t n) {
    for (size_t i = 0; i < n; i++) {
        double diff = (double)ours[i] - (double)recorded[i];
        if (!isfinite(ours[i])) d->finite = false;
        d->diff2 += diff * diff;
        d->ref2 += (double)recorded[i] * (double)recorded[i];
        if (fabs(diff) > d->max) d->max = fabs(diff);
    }
}

void replay_conclude(struct replay_result *result, const struct difference *d, double tolerance) {
    double base = d->ref2 > 0 ? d->ref2 : 1; // an untrained network's output is all 0
    *result = (struct replay_result){.rel_l2 = sqrt(d->diff2 / base), .max_abs = d->max, .tolerance = tolerance, .finite = d->finite};
}

/* ---- kind: sample ---- */

struct sampling {
    struct sampler_spec spec;
    struct sampler_model model;
    float *noise;         // [n, draws, numel]: draw 0 is x0
    uint32_t draws;
    int slots;            // n, or 2n when the null halves of guidance count in dopri5's norm
};

// Gathers each image's draws: x0, then the recorded noise, transposed from [draw, image] to [image, draw].
static int gather_noise(struct sampling *s, struct recorded *c, struct err *e) {
    const struct tensor *t = tensor_find(&c->file.table, "noise");
    size_t image = (size_t)c->n * c->numel, recorded = t ? t->count / image : 0;
    float *flat = NULL;
    bool fits = !t || (t->ndim == 5 && t->shape[1] == c->n && t->count == recorded * image && recorded <= SAMPLER_MAX_EVALUATIONS);
    if (!fits) return err_param(e, E_FORMAT, "noise", "the case's noise is not [draws, n, C, H, W]");
    if (t && replay_tensor(&flat, c, "noise", 0, e)) return mem_free(flat), e->status;
    s->draws = (uint32_t)recorded + 1;
    s->noise = mem_array(image * s->draws, sizeof *s->noise);
    if (!s->noise) return mem_free(flat), err_set(e, E_NOMEM, "no memory for the case's noise");
    for (size_t i = 0; i < (size_t)c->n; i++)
        for (size_t d = 0; d < s->draws; d++) {
            const float *from = d == 0 ? c->x + i * c->numel : flat + ((d - 1) * (size_t)c->n + i) * c->numel;
            memcpy(s->noise + (i * s->draws + d) * c->numel, from, c->numel * sizeof *from);
        }
    mem_free(flat);
    return OK;
}

static int make_runner(struct replay *r, const struct arch *a, int slots, int rows, struct err *e) {
    // NOLINTNEXTLINE(bugprone-suspicious-memory-comparison): padding that differs only builds a runner anew
    if (r->runner && !memcmp(&r->arch, a, sizeof *a) && r->slots >= slots && r->rows >= rows) return OK;
    runner_free(r->runner);
    r->runner = NULL;
    r->arch = *a, r->slots = slots, r->rows = rows;
    return runner_new(&r->runner, r->k, a, r->weights, slots, rows, e);
}

// dopri5 as recorded: one error norm over the whole batch.
static void share_norms(struct runner_slot **s, int n) {
    for (int j = 0; n > 0 && s[0]->has_norms && j < s[0]->next.norms; j++) {
        double mean = 0;
        for (int i = 0; i < n; i++) mean += s[i]->norms[j] * s[i]->norms[j] / n;
        for (int i = 0; i < n; i++) s[i]->norms[j] = sqrt(mean);
    }
}

static int run_slots(struct replay *r, struct runner_slot **live, int n, bool shared, struct err *e) {
    for (;;) {
        int running = 0; // slots of one case have one program: they finish together
        for (int i = 0; i < n; i++) {
            if (live[i]->err.status != OK) return *e = live[i]->err, e->status;
            running += !live[i]->done;
        }
        if (running == 0) return OK;
        if (running != n) return err_set(e, E_INTERNAL, "images of one case finished at different steps");
        if (runner_step(r->runner, live, n, NULL, e)) return e->status;
        if (shared) share_norms(live, n);
        if (runner_plan(r->runner, live, n, e)) return e->status;
    }
}

static int sample(struct replay *r, struct recorded *c, const struct sampling *s, struct runner_slot *slots, struct runner_slot **live, struct err *e) {
    for (int i = 0; i < s->slots; i++) {
        int image = i % c->n;
        slots[i] = (struct runner_slot){.slot = i, .label = c->y[image], .null_of = i < c->n ? -1 : image, .noise_draws = s->draws};
        slots[i].noise = s->noise + (size_t)image * s->draws * c->numel;
        live[i] = &slots[i];
        if (runner_start(r->runner, &slots[i], &s->spec, &s->model, e)) return e->status;
    }
    if (run_slots(r, live, s->slots, s->spec.method == METHOD_DOPRI5, e)) return e->status;
    for (int i = 0; i < c->n; i++)
        if (runner_read(r->runner, i, c->ours + (size_t)i * c->numel, e)) return e->status;
    return OK;
}

static int replay_sample(struct replay *r, struct recorded *c, struct replay_result *result, struct err *e) {
    struct sampling s = {0};
    struct runner_slot *slots = NULL, **live = NULL;
    int rc = recorded_open(c, r, "x0", e);
    if (rc == OK) rc = replay_spec(&s.spec, &s.model, c, r->is_dir ? &r->dir.desc : NULL, e);
    if (rc == OK) rc = gather_noise(&s, c, e);
    bool adaptive = s.spec.method == METHOD_DOPRI5;
    s.slots = adaptive && s.spec.guidance != 1 ? 2 * c->n : c->n;
    if (rc == OK) rc = make_runner(r, &c->arch, s.slots, 2 * c->n, e);
    if (rc == OK) {
        slots = mem_array((size_t)s.slots, sizeof *slots);
        live = mem_array((size_t)s.slots, sizeof(struct runner_slot *));
        rc = slots && live ? sample(r, c, &s, slots, live, e) : err_set(e, E_NOMEM, "no memory for the case's images");
    }
    if (rc == OK) {
        struct difference d = {.finite = true};
        replay_compare(&d, c->ours, c->out, (size_t)c->n * c->numel);
        replay_conclude(result, &d, adaptive ? 1e-3 : 1e-4);
    }
    mem_free(slots), mem_free(live), mem_free(s.noise);
    return rc;
}

int replay_case(struct replay *r, const char *path, struct replay_result *result, struct err *e) {
    struct recorded c = {0};
    struct err local = {0};
    if (!e) e = &local;
    int rc = checkpoint_open(&c.file, path, e);
    if (rc != OK) return rc;
    const char *family = replay_meta(&c, "family"), *kind = replay_meta(&c, "kind");
    if (!strcmp(kind, "vae")) rc = replay_vae(r, &c, result, e);
    else if (!r->weights || !r->weights->n) rc = err_param(e, E_CONFLICT, "kind", "the case is of kind \"%s\", the model is an autoencoder", kind);
    else if (!strcmp(kind, "forward")) rc = replay_forward(r, &c, result, e);
    else if (r->is_dir && strcmp(family, r->dir.desc.family))
        rc = err_param(e, E_CONFLICT, "family", "the case is of family \"%s\", the model of \"%s\"", family, r->dir.desc.family);
    else if (!strcmp(kind, "train")) rc = replay_train(r, &c, result, e);
    else if (!strcmp(kind, "sample")) rc = replay_sample(r, &c, result, e);
    else rc = err_param(e, E_UNSUPPORTED, "kind", "the case's kind \"%s\" is not known here", kind);
    recorded_close(&c);
    return rc;
}
