// SPDX-License-Identifier: MIT
#include "core/base/fault.h"

#include <stdatomic.h>

static atomic_bool armed; // one load decides the normal case
static struct seam {
    atomic_long count, fail_at; // fail_at 0: disarmed
    atomic_bool for_ever;
} seams[FAULT_KINDS];

bool fault_hit(enum fault_kind kind) {
    if (!atomic_load_explicit(&armed, memory_order_relaxed)) return false;
    struct seam *s = &seams[kind];
    long count = atomic_fetch_add(&s->count, 1) + 1, at = atomic_load(&s->fail_at);
    return at && (count == at || (count > at && atomic_load(&s->for_ever)));
}

void fault_arm(enum fault_kind kind, long n, bool for_ever) {
    atomic_store(&seams[kind].count, 0);
    atomic_store(&seams[kind].for_ever, for_ever);
    atomic_store(&seams[kind].fail_at, n);
    atomic_store(&armed, true);
}

void fault_disarm(void) {
    atomic_store(&armed, false);
    for (int k = 0; k < FAULT_KINDS; k++) atomic_store(&seams[k].fail_at, 0);
}

long fault_count(enum fault_kind kind) { return atomic_load(&seams[kind].count); }
