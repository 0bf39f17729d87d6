// SPDX-License-Identifier: MIT
/*
 * A ring of slots; microbatch q lives in slot q % SLOTS. Workers take the next number that is not begun, once its slot is free;
 * the reader takes numbers in order. One lock, two conditions.
 */
#include "core/train/feed.h"

#include <pthread.h>

#include "core/base/fault.h"
#include "core/base/mem.h"

struct slot {
    float *x;
    int32_t *label;
    bool ready;
    struct err err;
};

struct feed {
    const struct data *data;
    struct feed_spec spec;
    size_t numel;
    struct slot *slots;
    int n_slots, n_threads;
    pthread_t *threads;
    pthread_mutex_t lock;
    pthread_cond_t work, filled; // a slot is free, or stop; a slot is ready
    uint64_t begun, given;       // microbatches, from the first of the run
    bool stop;
};

static uint64_t position_of(const struct feed *f, uint64_t q) {
    uint64_t micros = (uint64_t)(f->spec.local / f->spec.rows), step = f->spec.step + q / micros;
    return step * (uint64_t)f->spec.batch + (uint64_t)f->spec.first + q % micros * (uint64_t)f->spec.rows;
}

static void fill(const struct feed *f, struct slot *s, uint64_t q) {
    err_clear(&s->err);
    for (int i = 0; i < f->spec.rows && s->err.status == OK; i++)
        data_example(f->data, position_of(f, q) + (uint64_t)i, s->x + (size_t)i * f->numel, &s->label[i], &s->err);
}

static void *run(void *ctx) {
    struct feed *f = ctx;
    pthread_mutex_lock(&f->lock);
    for (;;) {
        // the slot that the reader holds is given-1's: it becomes free with the next call
        while (!f->stop && f->begun + 1 >= f->given + (uint64_t)f->n_slots) pthread_cond_wait(&f->work, &f->lock);
        if (f->stop) break;
        uint64_t q = f->begun++;
        struct slot *s = &f->slots[q % (uint64_t)f->n_slots];
        s->ready = false;
        pthread_mutex_unlock(&f->lock);
        fill(f, s, q);
        pthread_mutex_lock(&f->lock);
        s->ready = true;
        pthread_cond_broadcast(&f->filled);
    }
    pthread_mutex_unlock(&f->lock);
    return NULL;
}

static int make_slots(struct feed *f, struct err *e) {
    f->slots = mem_array((size_t)f->n_slots, sizeof *f->slots);
    f->threads = mem_array((size_t)f->spec.threads, sizeof *f->threads);
    bool ok = f->slots && f->threads;
    for (int i = 0; ok && i < f->n_slots; i++) {
        f->slots[i].x = mem_array((size_t)f->spec.rows * f->numel, sizeof(float));
        f->slots[i].label = mem_array((size_t)f->spec.rows, sizeof(int32_t));
        ok = f->slots[i].x && f->slots[i].label;
    }
    return ok ? OK : err_set(e, E_NOMEM, "no memory for batches of %d examples", f->spec.rows);
}

int feed_open(struct feed **out, const struct data *data, const struct feed_spec *spec, struct err *e) {
    struct feed *f = mem_alloc(sizeof *f);
    const struct data_info *info = data_info(data);
    *out = NULL;
    if (!f) return err_set(e, E_NOMEM, "no memory for a feed");
    *f = (struct feed){.data = data, .spec = *spec, .n_slots = spec->threads + 3};
    f->numel = (size_t)info->channels * (size_t)info->size * (size_t)info->size;
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->work, NULL);
    pthread_cond_init(&f->filled, NULL);
    int rc = make_slots(f, e);
    for (; rc == OK && f->n_threads < spec->threads; f->n_threads++)
        if (fault_hit(FAULT_THREAD) || pthread_create(&f->threads[f->n_threads], NULL, run, f)) {
            rc = err_set(e, E_INTERNAL, "no thread to be had for reading data");
            break;
        }
    if (rc == OK) return *out = f, OK;
    feed_close(f);
    return rc;
}

void feed_close(struct feed *f) {
    if (!f) return;
    pthread_mutex_lock(&f->lock);
    f->stop = true;
    pthread_cond_broadcast(&f->work);
    pthread_mutex_unlock(&f->lock);
    for (int i = 0; i < f->n_threads; i++) pthread_join(f->threads[i], NULL);
    for (int i = 0; f->slots && i < f->n_slots; i++) mem_free(f->slots[i].x), mem_free(f->slots[i].label);
    mem_free(f->slots);
    mem_free(f->threads);
    pthread_mutex_destroy(&f->lock);
    pthread_cond_destroy(&f->work);
    pthread_cond_destroy(&f->filled);
    mem_free(f);
}

int feed_next(struct feed *f, struct feed_batch *b, struct err *e) {
    pthread_mutex_lock(&f->lock);
    uint64_t q = f->given++, micros = (uint64_t)(f->spec.local / f->spec.rows);
    struct slot *s = &f->slots[q % (uint64_t)f->n_slots];
    pthread_cond_broadcast(&f->work);
    while (f->begun <= q || !s->ready) pthread_cond_wait(&f->filled, &f->lock);
    pthread_mutex_unlock(&f->lock);
    *b = (struct feed_batch){s->x, s->label, f->spec.first + (int)(q % micros) * f->spec.rows};
    return s->err.status == OK ? OK : err_param(e, s->err.status, s->err.param, "%s", s->err.text);
}
