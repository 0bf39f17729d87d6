// SPDX-License-Identifier: MIT
#include "core/engine/replay.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "core/base/mem.h"
#include "core/engine/runner.h"
#include "core/model/dit.h"

struct replay {
    struct kern *k;
    int heads;                // override, or 0
    bool is_dir;
    struct model_dir dir;     // is_dir
    struct checkpoint file;   // else
    const struct tensor_table *weights;
    struct arch proven;       // what the tensors tell
    /* the network of the last case, kept while its shape and size serve */
    struct runner *runner;
    struct arch arch;
    int slots, rows;
};

// A case opened: its tensors as float32 where they are numbers.
struct recorded {
    struct checkpoint file;
    struct arch arch;
    int n;            // images
    size_t numel;     // floats an image
    float *x, *out, *ours;
    int32_t *y;
};

int replay_open(struct replay **out, struct kern *k, const char *model, int heads, struct err *e) {
    *out = NULL;
    struct replay *r = mem_alloc(sizeof *r);
    if (!r) return err_set(e, E_NOMEM, "no memory to replay");
    r->k = k, r->heads = heads;
    struct stat st;
    r->is_dir = stat(model, &st) == 0 && S_ISDIR(st.st_mode);
    int rc = r->is_dir ? model_dir_open(&r->dir, model, e) : checkpoint_open(&r->file, model, e);
    if (rc != OK) return mem_free(r), rc;
    r->weights = r->is_dir ? r->dir.weights : &r->file.table;
    if (r->is_dir) r->proven = r->dir.desc.arch;
    else rc = arch_infer(&r->proven, r->weights, e);
    if (rc != OK) return replay_close(r), rc;
    *out = r;
    return OK;
}

void replay_close(struct replay *r) {
    if (!r) return;
    runner_free(r->runner);
    if (r->is_dir) model_dir_close(&r->dir);
    else checkpoint_close(&r->file);
    mem_free(r);
}

/* ---- reading a case ---- */

static const char *meta(const struct recorded *c, const char *key) {
    const char *v = checkpoint_meta(&c->file, key);
    return v ? v : "";
}

static int meta_number(double *out, const struct recorded *c, const char *key, struct err *e) {
    const char *v = meta(c, key);
    char *end;
    *out = strtod(v, &end);
    return *v && !*end ? OK : err_param(e, E_FORMAT, key, "the case's '%s' is \"%s\", not a number", key, v);
}

static int read_tensor(float **out, struct recorded *c, const char *name, size_t count, struct err *e) {
    const struct tensor *t = tensor_find(&c->file.table, name);
    if (!t) return err_param(e, E_FORMAT, name, "the case has no tensor '%s'", name);
    if (count && t->count != count) return err_param(e, E_FORMAT, name, "the case's tensor '%s' has %zu elements, not %zu", name, t->count, count);
    mem_free(*out);
    *out = mem_array(t->count, sizeof **out);
    return *out ? tensor_to_f32(*out, t, e) : err_set(e, E_NOMEM, "no memory for the case's '%s'", name);
}

static void recorded_close(struct recorded *c) {
    mem_free(c->x), mem_free(c->out), mem_free(c->ours), mem_free(c->y);
    checkpoint_close(&c->file);
}

static int check_fits(const struct arch *a, const struct arch *proven, struct err *e) {
    struct { const char *name; int said, is; } fields[] = {
        {"input_size", a->input_size, proven->input_size},    {"patch_size", a->patch_size, proven->patch_size},
        {"in_channels", a->in_channels, proven->in_channels}, {"hidden_size", a->hidden_size, proven->hidden_size},
        {"depth", a->depth, proven->depth},                   {"num_classes", a->num_classes, proven->num_classes},
        {"learn_sigma", a->learn_sigma, proven->learn_sigma},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (fields[i].said != fields[i].is)
            return err_param(e, E_CONFLICT, fields[i].name, "the case was recorded with %s %d, the weights have %d", fields[i].name, fields[i].said,
                             fields[i].is);
    return OK;
}

// Opens a case whose input images are in tensor `input`.
static int recorded_open(struct recorded *c, const struct replay *r, const char *input, struct err *e) {
    c->arch = r->proven;
    if (arch_parse_config(&c->arch, meta(c, "config"), e)) return e->status;
    if (check_fits(&c->arch, &r->proven, e)) return e->status;
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
    int rc = read_tensor(&c->x, c, input, 0, e);
    if (rc == OK) rc = read_tensor(&c->out, c, "out", t->count, e);
    if (rc == OK) rc = read_tensor(&y, c, "y", (size_t)c->n, e);
    c->ours = mem_array(t->count, sizeof *c->ours);
    c->y = mem_array((size_t)c->n, sizeof *c->y);
    if (rc == OK && (!c->ours || !c->y)) rc = err_set(e, E_NOMEM, "no memory for the case's outputs");
    int classes = c->arch.num_classes + c->arch.class_dropout;
    for (int i = 0; rc == OK && i < c->n; i++) {
        c->y[i] = (int32_t)y[i];
        if (y[i] < 0 || y[i] >= (float)classes) rc = err_param(e, E_RANGE, "y", "the case's label %g is outside 0..%d", (double)y[i], classes - 1);
    }
    mem_free(y);
    return rc;
}

/* ---- comparing ---- */

struct difference { double diff2, ref2, max; bool finite; };

static void compare(struct difference *d, const float *ours, const float *recorded, size_t n) {
    for (size_t i = 0; i < n; i++) {
        double diff = (double)ours[i] - (double)recorded[i];
        if (!isfinite(ours[i])) d->finite = false;
        d->diff2 += diff * diff;
        d->ref2 += (double)recorded[i] * (double)recorded[i];
        if (fabs(diff) > d->max) d->max = fabs(diff);
    }
}

static void conclude(struct replay_result *result, const struct difference *d, double tolerance) {
    *result = (struct replay_result){.rel_l2 = sqrt(d->diff2 / d->ref2), .max_abs = d->max, .tolerance = tolerance, .finite = d->finite};
}

/* ---- kind: forward ---- */

static int forward_rows(struct dit *m, struct replay *r, struct recorded *c, const float *t, const int32_t *y, struct err *e) {
    int rc = r->k->upload(r->k, dit_x(m), c->x, (size_t)c->n * c->numel * sizeof(float));
    if (rc) return err_set(e, E_DEVICE, "%s", r->k->why);
    rc = dit_forward(m, c->n, t, y, e);
    if (rc != OK) return rc;
    rc = r->k->download(r->k, c->ours, dit_out(m), (size_t)c->n * c->numel * sizeof(float));
    return rc ? err_set(e, E_DEVICE, "%s", r->k->why) : OK;
}

static int replay_forward(struct replay *r, struct recorded *c, struct replay_result *result, struct err *e) {
    struct difference d = {.finite = true};
    struct dit *m = NULL;
    float *t = NULL;
    int rc = recorded_open(c, r, "x", e);
    if (rc == OK) rc = read_tensor(&t, c, "t", (size_t)c->n, e);
    if (rc == OK) rc = dit_new(&m, r->k, &c->arch, r->weights, c->arch.in_channels, c->n, e);
    if (rc == OK) rc = forward_rows(m, r, c, t, c->y, e);
    if (rc == OK) {
        compare(&d, c->ours, c->out, (size_t)c->n * c->numel);
        if (tensor_find(&c->file.table, "out_null")) {
            rc = read_tensor(&c->out, c, "out_null", (size_t)c->n * c->numel, e);
            for (int i = 0; i < c->n; i++) c->y[i] = c->arch.num_classes;
            if (rc == OK) rc = forward_rows(m, r, c, t, c->y, e);
            if (rc == OK) compare(&d, c->ours, c->out, (size_t)c->n * c->numel);
        }
        conclude(result, &d, 1e-5);
    }
    dit_free(m);
    mem_free(t);
    return rc;
}

/* ---- kind: sample ---- */

struct sampling {
    struct sampler_spec spec;
    struct sampler_model model;
    float *noise;         // [n, draws, numel]: draw 0 is x0
    uint32_t draws;
    int slots;            // n, or 2n when the null halves of guidance count in dopri5's norm
};

static int setting(int index, const struct recorded *c, const char *key, struct err *e) {
    return index >= 0 ? OK : err_param(e, E_UNSUPPORTED, key, "the case's %s \"%s\" is not known", key, meta(c, key));
}

static int parse_ode(struct sampler_spec *s, const struct recorded *c, int points, struct err *e) {
    const char *method = meta(c, "method");
    int m = !strcmp(method, "heun2") ? METHOD_HEUN : sampler_method_parse(method);
    if (setting(m, c, "method", e)) return e->status;
    s->method = (enum sampler_method)m;
    s->steps = points - 1;
    if (s->method != METHOD_DOPRI5) return OK;
    return meta_number(&s->atol, c, "atol", e) || meta_number(&s->rtol, c, "rtol", e) ? e->status : OK;
}

static int parse_sde(struct sampler_spec *s, const struct recorded *c, int points, struct err *e) {
    char lower[64];
    snprintf(lower, sizeof lower, "%s", meta(c, "method"));
    for (char *p = lower; *p; p++) *p |= 0x20;
    int method = sampler_method_parse(lower);
    const char *form = meta(c, "diffusion_form");
    int w = !strcasecmp(form, "inccreasing-decreasing") ? W_INC_DEC : -1; // the recorder's spelling
    for (int i = 0; w < 0 && i < W_COUNT; i++)
        if (!strcasecmp(form, w_form_name(i))) w = i;
    int last = -1;
    for (int i = 0; i < LAST_COUNT; i++)
        if (!strcasecmp(meta(c, "last_step"), last_step_name(i))) last = i;
    if (setting(method, c, "method", e) || setting(w, c, "diffusion_form", e) || setting(last, c, "last_step", e)) return e->status;
    s->method = (enum sampler_method)method, s->w_t = (enum w_form)w, s->last = (enum last_step)last;
    s->steps = last == LAST_NONE ? points - 1 : points;
    if (meta_number(&s->w_t_scale, c, "diffusion_norm", e)) return e->status;
    return last == LAST_NONE ? OK : meta_number(&s->last_size, c, "last_step_size", e);
}

static int parse_sampling(struct sampling *s, const struct replay *r, const struct recorded *c, struct err *e) {
    double points, cfg;
    int path = path_parse(meta(c, "path")), prediction = prediction_parse(meta(c, "prediction")), type = sampler_type_parse(meta(c, "sampler"));
    if (setting(path, c, "path", e) || setting(prediction, c, "prediction", e) || setting(type, c, "sampler", e)) return e->status;
    if (meta_number(&points, c, "num_steps", e) || meta_number(&cfg, c, "cfg", e)) return e->status;
    if (!(points >= 2 && points <= SAMPLER_MAX_STEPS)) return err_param(e, E_RANGE, "num_steps", "the case's num_steps is %g", points);
    s->model = (struct sampler_model){.path = (enum path_kind)path, .prediction = (enum prediction)prediction};
    sampler_defaults(&s->spec, &s->model, (enum sampler_type)type);
    s->spec.replay = true;
    s->spec.guidance = cfg;
    int rule = r->is_dir ? r->dir.desc.guide_channels : 3; // the authors' code guides the first three channels
    s->spec.guide_channels = rule < 0 || rule > c->arch.in_channels ? c->arch.in_channels : rule;
    return s->spec.type == SAMPLER_ODE ? parse_ode(&s->spec, c, (int)points, e) : parse_sde(&s->spec, c, (int)points, e);
}

// Gathers each image's draws: x0, then the recorded noise, transposed from [draw, image] to [image, draw].
static int gather_noise(struct sampling *s, struct recorded *c, struct err *e) {
    const struct tensor *t = tensor_find(&c->file.table, "noise");
    size_t image = (size_t)c->n * c->numel, recorded = t ? t->count / image : 0;
    float *flat = NULL;
    if (t && (t->count % image || recorded > SAMPLER_MAX_EVALUATIONS)) return err_param(e, E_FORMAT, "noise", "the case's noise is not [draws, n, C, H, W]");
    if (t && read_tensor(&flat, c, "noise", 0, e)) return mem_free(flat), e->status;
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
    if (rc == OK) rc = parse_sampling(&s, r, c, e);
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
        compare(&d, c->ours, c->out, (size_t)c->n * c->numel);
        conclude(result, &d, adaptive ? 1e-3 : 1e-4);
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
    if (strcmp(meta(&c, "family"), "sit") != 0)
        rc = err_param(e, E_UNSUPPORTED, "family", "the case's family \"%s\" is not known here", meta(&c, "family"));
    else if (!strcmp(meta(&c, "kind"), "forward")) rc = replay_forward(r, &c, result, e);
    else if (!strcmp(meta(&c, "kind"), "sample")) rc = replay_sample(r, &c, result, e);
    else rc = err_param(e, E_UNSUPPORTED, "kind", "the case's kind \"%s\" is not known here", meta(&c, "kind"));
    recorded_close(&c);
    return rc;
}
