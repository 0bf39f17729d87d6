// SPDX-License-Identifier: MIT
// Which of a run's processes this is, and its place among them.
#include "core/train/parallel.h"
#include "server/cmd_train.h"

static int join(void *ctx, struct kern *k, float *grads, struct err *e) {
    struct train_ranks *r = ctx;
    return parallel_join(&r->parallel, &r->spec, k, grads, e);
}
static void leave(void *ctx) {
    struct train_ranks *r = ctx;
    parallel_free(r->parallel);
    r->parallel = NULL;
}
static void ready(void *ctx, size_t offset, size_t count) { parallel_gradients(((struct train_ranks *)ctx)->parallel, offset, count); }
static int finish(void *ctx, struct err *e) { return parallel_finish(((struct train_ranks *)ctx)->parallel, e); }
static int numbers(void *ctx, double *v, int n, struct err *e) {
    return parallel_numbers(((struct train_ranks *)ctx)->parallel, v, n, e);
}

int train_ranks_find(struct train_ranks *r, int *device, const struct train_flags *f, struct err *e) {
    int cards[64] = {0}, n = 0;
    *r = (struct train_ranks){0};
    if (f->devices[0] && (n = train_flags_devices(cards, 64, f, e)) < 0) return n;
    if (parallel_from_environment(&r->spec, e)) return e->status;
    *device = n ? cards[r->spec.local % n] : r->spec.local;
    r->start = r->spec.size == 1 ? n : 0;
    r->peers = (struct train_peers){r->spec.rank, r->spec.size, r, join, leave, ready, finish, numbers};
    return OK;
}
