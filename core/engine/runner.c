// SPDX-License-Identifier: MIT
#include "core/engine/runner.h"

#include <string.h>

#include "core/base/mem.h"
#include "core/model/dit.h"

_Static_assert(SAMPLER_COLS == KERN_COLS && SAMPLER_ASSIGN == KERN_ASSIGN, "a sampler's step fits a row update");

struct runner {
    struct kern *k;
    struct arch a;
    struct dit *dit;
    int slots, max_rows;
    size_t numel, out_ld; // floats of an image; of a row of the network's output
    float *cols;  // [slots, KERN_COLS, numel]
    float *noise; // [slots, numel], made when a slot whose noise comes from the host is first moved
    float *drawn; // [numel] host, likewise
    /* host tables of one step */
    struct kern_gather *gather;
    struct kern_row_update *update; // [slots]
    struct kern_norm *norm;         // [2*slots]
    double *norms;
    struct runner_slot **moving;
    float *t;
    int32_t *y;
    int *row_c, *row_u; // of each slot given to runner_step
};

static int kern_failed(const struct runner *r, int rc, struct err *e) {
    return rc == KERN_ENOMEM ? err_set(e, E_NOMEM, "%s: %s", r->k->name, r->k->why) : err_set(e, E_DEVICE, "%s: %s", r->k->name, r->k->why);
}

int runner_new(struct runner **out, struct kern *k, const struct arch *a, const struct tensor_table *w, int slots, int max_rows, struct err *e) {
    *out = NULL;
    struct runner *r = mem_alloc(sizeof *r);
    if (!r) return err_set(e, E_NOMEM, "no memory for a runner");
    *r = (struct runner){.k = k, .a = *a, .slots = slots, .max_rows = max_rows};
    r->numel = (size_t)a->in_channels * (size_t)a->input_size * (size_t)a->input_size;
    size_t n = (size_t)slots, rows = (size_t)max_rows;
    r->out_ld = r->numel * (size_t)(dit_channels(a) / a->in_channels); // the second half is ddpm's variance, or not read
    r->gather = mem_array(rows, sizeof *r->gather);
    r->update = mem_array(n, sizeof *r->update);
    r->norm = mem_array(2 * n, sizeof *r->norm);
    r->norms = mem_array(2 * n, sizeof *r->norms);
    r->moving = mem_array(n, sizeof *r->moving);
    r->t = mem_array(rows, sizeof *r->t);
    r->y = mem_array(rows, sizeof *r->y);
    r->row_c = mem_array(n, sizeof *r->row_c);
    r->row_u = mem_array(n, sizeof *r->row_u);
    bool all = r->gather && r->update && r->norm && r->norms && r->moving && r->t && r->y && r->row_c && r->row_u;
    int rc = all ? OK : err_set(e, E_NOMEM, "no memory for a runner");
    if (rc == OK) rc = dit_new(&r->dit, k, a, w, dit_channels(a), max_rows, e);
    if (rc == OK) {
        void *p;
        int k_rc = k->alloc(k, n * KERN_COLS * r->numel * sizeof(float), &p);
        if (k_rc) rc = kern_failed(r, k_rc, e);
        else r->cols = p;
    }
    if (rc != OK) return runner_free(r), rc;
    *out = r;
    return OK;
}

void runner_free(struct runner *r) {
    if (!r) return;
    if (r->cols) r->k->free(r->k, r->cols);
    if (r->noise) r->k->free(r->k, r->noise);
    dit_free(r->dit);
    void *host[] = {r->gather, r->update, r->norm, r->norms, r->moving, r->t, r->y, r->row_c, r->row_u, r->drawn};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) mem_free(host[i]);
    mem_free(r);
}

size_t runner_numel(const struct runner *r) { return r->numel; }
int runner_max_rows(const struct runner *r) { return r->max_rows; }
size_t runner_bytes(const struct runner *r) { return dit_bytes(r->dit) + (size_t)r->slots * KERN_COLS * r->numel * sizeof(float); }

static float *column(const struct runner *r, int slot, int col) { return r->cols + ((size_t)slot * KERN_COLS + (size_t)col) * r->numel; }

/* ---- moves ---- */

static void fill_update(struct kern_row_update *u, const struct runner_slot *s, int row_c, int row_u) {
    const struct sampler_step *step = &s->next;
    *u = (struct kern_row_update){.slot = s->slot, .row_c = row_c, .row_u = row_u, .seed = s->seed, .image = s->image, .draw = step->draw, .n = step->n};
    u->row_rest = s->null_of >= 0 && row_u >= 0 ? row_u : row_c;
    u->scale = (float)step->guidance;
    u->guided = s->sampler.spec.guide_channels;
    u->learned = step->learned;
    u->log_lo = (float)step->log_lo, u->log_span = (float)step->log_span;
    u->clip.c_out = (float)step->clip.c_out;
    for (int j = 0; j < KERN_COLS; j++) u->clip.c[j] = (float)step->clip.c[j];
    for (int i = 0; i < step->n; i++) {
        const struct sampler_assign *from = &step->assign[i];
        struct kern_assign *to = &u->assign[i];
        to->dst = from->dst, to->c_out = (float)from->c_out, to->c_clip = (float)from->c_clip, to->c_noise = (float)from->c_noise;
        for (int j = 0; j < KERN_COLS; j++) to->c[j] = (float)from->c[j];
    }
}

static bool wants_noise(const struct sampler_step *step) {
    for (int i = 0; i < step->n; i++)
        if (step->assign[i].c_noise != 0) return true;
    return false;
}

// Noise that the kernels do not make: recorded, or drawn as another program would.
static bool hosted(const struct runner_slot *s) { return (s->noise || s->stream) && wants_noise(&s->next); }

// The draw that the slot's step wants, to the device.
static int load_noise(struct runner *r, struct runner_slot *s, struct err *e) {
    const float *from = r->drawn;
    if (s->stream) stream_draw(s->stream, s->next.draw, r->drawn);
    else if (s->next.draw < s->noise_draws) from = s->noise + s->next.draw * r->numel;
    else return err_param(e, E_CONFLICT, "noise", "the sampler wants noise draw %u, recorded are %u", s->next.draw, s->noise_draws);
    int rc = r->k->upload(r->k, r->noise + (size_t)s->slot * r->numel, from, r->numel * sizeof(float));
    return rc ? kern_failed(r, rc, e) : OK;
}

static int room_for_noise(struct runner *r, struct err *e) {
    void *p;
    if (!r->drawn && !(r->drawn = mem_array(r->numel, sizeof *r->drawn))) return err_set(e, E_NOMEM, "no memory for noise");
    if (r->noise) return OK;
    int rc = r->k->alloc(r->k, (size_t)r->slots * r->numel * sizeof(float), &p);
    if (rc) return kern_failed(r, rc, e);
    r->noise = p;
    return OK;
}

// Fills the update table: first those with the kernels' own noise or none, *own of them, then those whose noise is on its way to the device.
static int fill_updates(struct runner *r, struct runner_slot **s, int n, const int *row_c, const int *row_u, int *own, struct err *e) {
    int at = 0, rc = OK;
    for (int i = 0; i < n; i++)
        if (!hosted(s[i])) fill_update(&r->update[at++], s[i], row_c ? row_c[i] : -1, row_u ? row_u[i] : -1);
    *own = at;
    if (at < n) rc = room_for_noise(r, e);
    for (int i = 0; i < n && rc == OK; i++) {
        if (!hosted(s[i])) continue;
        fill_update(&r->update[at++], s[i], row_c ? row_c[i] : -1, row_u ? row_u[i] : -1);
        rc = load_noise(r, s[i], e);
    }
    return rc;
}

// Moves the columns of n slots by their planned steps and takes the norms that those ask for. row_c, row_u NULL: steps without evaluation.
static int move(struct runner *r, struct runner_slot **s, int n, const int *row_c, const int *row_u, struct err *e) {
    if (n == 0) return OK;
    int own, norms = 0, rc = fill_updates(r, s, n, row_c, row_u, &own, e);
    if (rc != OK) return rc;
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < s[i]->next.norms; j++) {
            const struct sampler_norm *from = &s[i]->next.norm[j];
            struct kern_norm *to = &r->norm[norms++];
            *to = (struct kern_norm){.slot = s[i]->slot, .a = from->a, .b = from->b, .atol = from->atol, .rtol = from->rtol};
            for (int c = 0; c < KERN_COLS; c++) to->c[c] = (float)from->c[c];
        }
    }
    size_t plane = (size_t)r->a.input_size * (size_t)r->a.input_size;
    if (own) rc = r->k->row_update(r->k, r->cols, r->numel, plane, dit_out(r->dit), r->out_ld, NULL, r->update, own);
    if (rc == 0 && own < n) rc = r->k->row_update(r->k, r->cols, r->numel, plane, dit_out(r->dit), r->out_ld, r->noise, r->update + own, n - own);
    if (rc == 0 && norms) rc = r->k->row_norm(r->k, r->norms, r->cols, r->numel, r->norm, norms);
    if (rc) return kern_failed(r, rc, e);
    for (int i = 0, at = 0; i < n; i++) {
        s[i]->has_norms = s[i]->next.norms > 0;
        for (int j = 0; j < s[i]->next.norms; j++) s[i]->norms[j] = r->norms[at++];
    }
    return OK;
}

/* ---- planning and evaluation ---- */

int runner_plan(struct runner *r, struct runner_slot **slots, int n, struct err *e) {
    int moving = n;
    if (n > r->slots) return err_set(e, E_INTERNAL, "%d slots to plan, there are %d", n, r->slots);
    memcpy(r->moving, slots, (size_t)n * sizeof *slots);
    while (moving > 0) { // ask each slot; carry out what needs no network; ask those again
        int kept = 0;
        for (int i = 0; i < moving; i++) {
            struct runner_slot *s = r->moving[i];
            int rc = sampler_next(&s->sampler, s->has_norms ? s->norms : NULL, &s->next, &s->err);
            s->has_norms = false;
            if (rc <= 0) s->done = true;
            else if (!s->next.evaluate) r->moving[kept++] = s;
        }
        moving = kept;
        int rc = move(r, r->moving, moving, NULL, NULL, e);
        if (rc != OK) return rc;
    }
    return OK;
}

int runner_start(struct runner *r, struct runner_slot *s, const struct sampler_spec *spec, const struct sampler_model *model, struct err *e) {
    s->done = s->has_norms = false;
    err_clear(&s->err);
    if (s->slot < 0 || s->slot >= r->slots) return err_set(e, E_INTERNAL, "slot %d, there are %d", s->slot, r->slots);
    if (model->learned_variance && !r->a.learn_sigma) return err_set(e, E_INTERNAL, "a learned variance of a network that has none");
    int rc = sampler_start(&s->sampler, spec, model, false, e);
    return rc == OK ? runner_plan(r, &s, 1, e) : rc;
}

int runner_step(struct runner *r, struct runner_slot **slots, int n, int *rows, struct err *e) {
    int used = 0, null_class = r->a.num_classes;
    for (int i = 0; i < n; i++) {
        struct runner_slot *s = slots[i];
        if (s->null_of >= 0) {
            r->row_c[i] = r->row_c[s->null_of], r->row_u[i] = r->row_u[s->null_of];
            continue;
        }
        bool guided = s->next.guidance != 1 && s->label != null_class; // the null class guided by itself is itself
        if (used + 1 + guided > r->max_rows) return err_set(e, E_INTERNAL, "a step of more than %d rows", r->max_rows);
        for (int half = 0; half <= guided; half++, used++) {
            r->gather[used] = (struct kern_gather){.slot = s->slot, .col = s->next.in, .scale = (float)s->next.in_scale};
            r->t[used] = (float)s->next.t;
            r->y[used] = half ? null_class : s->label;
        }
        r->row_c[i] = used - 1 - guided;
        r->row_u[i] = guided ? used - 1 : -1;
    }
    if (rows) *rows = used;
    int rc = r->k->gather(r->k, dit_x(r->dit), r->cols, r->numel, r->gather, used);
    if (rc) return kern_failed(r, rc, e);
    rc = dit_forward(r->dit, used, r->t, r->y, e);
    if (rc == OK) rc = move(r, slots, n, r->row_c, r->row_u, e);
    if (rc == OK && r->k->pace && (rc = r->k->pace(r->k)) != 0) rc = kern_failed(r, rc, e);
    return rc;
}

int runner_read(struct runner *r, int slot, float *x, struct err *e) {
    int rc = r->k->download(r->k, x, column(r, slot, SAMPLER_X), r->numel * sizeof(float));
    return rc ? kern_failed(r, rc, e) : OK;
}
