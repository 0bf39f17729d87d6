// SPDX-License-Identifier: MIT
#include "server/events.h"

#include "core/base/mem.h"

void inbox_init(struct inbox *in, uv_async_t *bell) {
    *in = (struct inbox){.bell = bell};
    in->last = &in->first;
    pthread_mutex_init(&in->lock, NULL);
}

void inbox_deinit(struct inbox *in) {
    for (struct event_node *n = inbox_take(in), *next; n; n = next) {
        next = n->next;
        if (n->event.kind == EV_IMAGE) mem_free(n->event.image.pixels);
        mem_free(n);
    }
    pthread_mutex_destroy(&in->lock);
}

void inbox_post(void *inbox, const struct engine_event *event) {
    struct inbox *in = inbox;
    struct event_node *n = mem_alloc(sizeof *n);
    if (!n) {
        if (event->kind == EV_IMAGE) mem_free(event->image.pixels);
        atomic_fetch_add(&in->lost, 1);
        return;
    }
    n->event = *event;
    pthread_mutex_lock(&in->lock);
    *in->last = n;
    in->last = &n->next;
    pthread_mutex_unlock(&in->lock);
    uv_async_send(in->bell);
}

struct event_node *inbox_take(struct inbox *in) {
    pthread_mutex_lock(&in->lock);
    struct event_node *first = in->first;
    in->first = NULL;
    in->last = &in->first;
    pthread_mutex_unlock(&in->lock);
    return first;
}
