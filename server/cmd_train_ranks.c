// SPDX-License-Identifier: MIT
// Which of a run's processes this is, and its place among them.
#include "core/train/parallel.h"
#include "server/cmd_train.h"

int train_ranks_find(struct train_ranks *r, int *device, const struct train_flags *f, struct err *e) {
    int cards[64] = {0}, n = 0;
    *r = (struct train_ranks){0};
    if (f->devices[0] && (n = train_flags_devices(cards, 64, f, e)) < 0) return n;
    if (parallel_from_environment(&r->spec, e)) return e->status;
    *device = n ? cards[r->spec.local % n] : r->spec.local;
    r->start = r->spec.size == 1 ? n : 0;
    return OK;
}
