// SPDX-License-Identifier: MIT
/*
 * events: the engine's events, from its threads to the loop. The bell says only "look"; the list holds the facts; the loop takes
 * the whole list and works outside the lock.
 */
#ifndef SITD_EVENTS_H
#define SITD_EVENTS_H
#include <pthread.h>
#include <stdatomic.h>
#include <uv.h>

#include "core/engine/engine.h"

struct event_node {
    struct event_node *next;
    struct engine_event event;
};
struct inbox {
    pthread_mutex_t lock;
    struct event_node *first, **last;
    uv_async_t *bell;
    atomic_long lost; // events that found no memory; their jobs end by their deadline
};

void inbox_init(struct inbox *, uv_async_t *bell);
void inbox_deinit(struct inbox *);                         // frees what nobody took
void inbox_post(void *inbox, const struct engine_event *); // engine_options.event; any thread
struct event_node *inbox_take(struct inbox *);             // in order; the caller frees nodes and pixels with mem_free

#endif
