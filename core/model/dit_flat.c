// SPDX-License-Identifier: MIT
/*
 * dit_flat: the order of a network's tensors in a flat array, and the way between it and tables of tensors.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/model/dit_train_int.h"

#define ALIGNED 64 // floats

// Places in the order that struct dit_flat tells. Runs are without gaps.
enum { RANK_ENDS, RANK_NORM_WEIGHTS, RANK_NORM_BIASES, RANK_WIDE_WEIGHTS, RANK_WIDE_BIASES, RANK_BLOCKS };
static bool is_run(int rank) { return rank > RANK_ENDS && rank < RANK_BLOCKS; }

struct entry {
    int rank, block, listed; // block: depth for the final layer
    struct dit_param param;
};

static void place(struct entry *en, int depth) {
    const char *name = en->param.name;
    int weight = strcmp(name + strlen(name) - 5, ".bias") != 0, block = -1;
    if (strncmp(name, "final_layer.", 12) == 0) block = depth;
    else if (strncmp(name, "blocks.", 7) == 0) block = atoi(name + 7);
    en->block = block;
    if (strstr(name, ".norm")) en->rank = weight ? RANK_NORM_WEIGHTS : RANK_NORM_BIASES;
    else if (strstr(name, "adaLN_modulation") || strstr(name, "cross_attn.kv"))
        en->rank = weight ? RANK_WIDE_WEIGHTS : RANK_WIDE_BIASES;
    else en->rank = block < 0 ? RANK_ENDS : RANK_BLOCKS;
}

static int in_order(const void *a, const void *b) {
    const struct entry *x = a, *y = b;
    if (x->rank != y->rank) return x->rank - y->rank;
    return x->block != y->block ? x->block - y->block : x->listed - y->listed;
}

static int list(struct entry **out, const struct arch *a, struct err *e) {
    struct dit_param p = {0};
    int n = 0;
    bool fixed;
    for (int i = 0; arch_tensor(a, i, p.name, p.shape, &fixed); i++) n += !fixed;
    struct entry *all = *out = mem_array((size_t)n, sizeof *all);
    if (!all) return err_set(e, E_NOMEM, "no memory for a list of %d tensors", n);
    n = 0;
    for (int i = 0; (p.ndim = arch_tensor(a, i, p.name, p.shape, &fixed)); i++) {
        if (fixed) continue;
        p.count = 1;
        for (int d = 0; d < p.ndim; d++) p.count *= (size_t)p.shape[d];
        all[n] = (struct entry){.listed = i, .param = p};
        place(&all[n++], a->depth);
    }
    qsort(all, (size_t)n, sizeof *all, in_order);
    return n;
}

int dit_flat_lay(struct dit_flat *f, const struct arch *a, struct err *e) {
    struct entry *all;
    int n = list(&all, a, e), run = -1;
    if (n < 0) return n;
    f->params = mem_array((size_t)n, sizeof *f->params);
    f->blocks = mem_array((size_t)a->depth + 1, sizeof *f->blocks);
    if (!f->params || !f->blocks) return mem_free(all), err_set(e, E_NOMEM, "no memory for a list of %d tensors", n);
    for (int i = 0; i < n; i++) {
        struct dit_param *p = &f->params[i];
        *p = all[i].param;
        if (!is_run(all[i].rank) || all[i].rank != run) f->floats = KERN_ROUND_UP(f->floats, (size_t)ALIGNED);
        p->offset = f->floats;
        f->floats += p->count;
        if (all[i].rank == RANK_NORM_WEIGHTS && run != all[i].rank) f->norms = p->offset;
        if (all[i].rank == RANK_NORM_WEIGHTS) f->norms_count = f->floats - f->norms;
        if (all[i].rank == RANK_WIDE_WEIGHTS && run != all[i].rank) f->wide = p->offset;
        if (all[i].rank == RANK_WIDE_WEIGHTS) f->wide_count = f->floats - f->wide;
        bool begins = all[i].rank == RANK_BLOCKS && (run != RANK_BLOCKS || all[i].block != all[i - 1].block);
        if (begins) f->blocks[all[i].block] = p->offset;
        run = all[i].rank;
    }
    f->floats = KERN_ROUND_UP(f->floats, (size_t)ALIGNED);
    f->n = n;
    mem_free(all);
    return OK;
}

void dit_flat_deinit(struct dit_flat *f) { mem_free(f->params), mem_free(f->blocks); }

const struct dit_param *dit_flat_find(const struct dit_flat *f, const char *name) {
    for (int i = 0; i < f->n; i++)
        if (strcmp(f->params[i].name, name) == 0) return &f->params[i];
    return NULL;
}

/* ---- tables of tensors ---- */

int dit_train_import(const struct dit_train *t, float *flat, const struct tensor_table *w, struct err *e) {
    for (int i = 0; i < t->flat.n; i++) {
        const struct dit_param *p = &t->flat.params[i];
        const struct tensor *from = tensor_find(w, p->name);
        if (!from || !tensor_shape_is(from, p->ndim, p->shape))
            return err_param(e, E_CONFLICT, p->name, "tensor '%s' is missing or has another shape", p->name);
        struct tensor view = {.name = p->name, .dtype = DT_F32, .data = flat + p->offset, .count = p->count};
        if (tensor_to_f32(flat + p->offset, from, e) || tensor_check_finite(&view, e)) return e ? e->status : E_NONFINITE;
    }
    return OK;
}

int dit_train_export(const struct dit_train *t, struct tensor_table *out, const float *flat, struct err *e) {
    *out = (struct tensor_table){.tensors = mem_array((size_t)t->flat.n, sizeof *out->tensors), .n = t->flat.n};
    if (!out->tensors) return out->n = 0, err_set(e, E_NOMEM, "no memory for a list of %d tensors", t->flat.n);
    for (int i = 0; i < t->flat.n; i++) {
        const struct dit_param *p = &t->flat.params[i];
        struct tensor *to = &out->tensors[i];
        *to = (struct tensor){.name = p->name, .dtype = DT_F32, .ndim = p->ndim, .data = flat + p->offset, .count = p->count};
        memcpy(to->shape, p->shape, sizeof to->shape);
        to->bytes = p->count * sizeof(float);
    }
    return OK;
}
