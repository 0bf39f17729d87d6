// SPDX-License-Identifier: MIT
/*
 * arch_random: weights of any published or custom size without a checkpoint (declared in checkpoint.h).
 */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "kernels/kern.h"
#include "kernels/philox.h"

#define SPREAD 0.02f

struct random_weights { // one allocation a kind
    char (*names)[64];
    float *data;
};

static void fill(float *data, size_t count, uint64_t seed, uint32_t tensor) {
    for (size_t i = 0; i < count; i += 4) {
        float four[4];
        philox_normal4(seed, tensor, 0, (uint32_t)(i / 4), four);
        for (size_t j = 0; j < 4 && i + j < count; j++) data[i + j] = SPREAD * four[j];
    }
}

// Tensors are filled by several threads: XL's take one core a quarter of a minute.
struct filling {
    struct tensor_table *t;
    uint64_t seed;
    atomic_int next;
};

static void *fill_some(void *arg) {
    struct filling *f = arg;
    for (int i; (i = atomic_fetch_add(&f->next, 1)) < f->t->n;)
        fill((float *)f->t->tensors[i].data, f->t->tensors[i].count, f->seed, (uint32_t)i);
    return NULL;
}

static void fill_all(struct tensor_table *t, uint64_t seed) {
    enum { MOST = 16 };
    pthread_t threads[MOST];
    struct filling f = {.t = t, .seed = seed};
    int n = 0, want = kern_threads_allowed() - 1;
    while (n < want && n < MOST && pthread_create(&threads[n], NULL, fill_some, &f) == 0) n++;
    fill_some(&f);
    while (n > 0) pthread_join(threads[--n], NULL);
}

static size_t elements(const int64_t *shape, int n) {
    size_t count = 1;
    for (int i = 0; i < n; i++) count *= (size_t)shape[i]; // arch_check bounds every tensor
    return count;
}

int arch_random(struct arch_weights *w, const struct arch *a, uint64_t seed, struct err *e) {
    char name[64];
    int64_t shape[TENSOR_MAX_DIMS];
    size_t total = 0;
    int n = 0, at_list = 0;
    bool fixed;
    *w = (struct arch_weights){0};
    if (arch_check(a, e)) return e ? e->status : E_RANGE;
    for (int rank, i = 0; (rank = arch_tensor(a, i, name, shape, &fixed)); i++)
        if (!fixed) n++, total += elements(shape, rank);
    struct random_weights *r = mem_alloc(sizeof *r);
    w->priv = r;
    w->table.tensors = mem_array((size_t)n, sizeof *w->table.tensors);
    if (r) r->names = mem_array((size_t)n, sizeof *r->names), r->data = mem_array(total, sizeof *r->data);
    if (!r || !w->table.tensors || !r->names || !r->data)
        return arch_weights_free(w), err_set(e, E_NOMEM, "no memory for %zu random weights", total);
    float *at = r->data;
    for (int i = 0; i < n; i++) {
        struct tensor *t = &w->table.tensors[i];
        *t = (struct tensor){.name = r->names[i], .dtype = DT_F32, .data = at};
        do t->ndim = arch_tensor(a, at_list++, r->names[i], t->shape, &fixed);
        while (fixed);
        t->count = elements(t->shape, t->ndim), t->bytes = t->count * sizeof(float);
        at += t->count;
    }
    w->table.n = n;
    fill_all(&w->table, seed);
    return OK;
}

void arch_weights_free(struct arch_weights *w) {
    struct random_weights *r = w->priv;
    if (r) mem_free(r->names), mem_free(r->data);
    mem_free(r);
    mem_free(w->table.tensors);
    *w = (struct arch_weights){0};
}
