// SPDX-License-Identifier: MIT
/*
 * fault: the seams at which tests make the world fail.
 *
 * A seam asks fault_hit(kind) before it does its work; true means "pretend that it failed". fault_arm(kind, n) makes the n-th
 * following hit of that kind in this process fail (n = 1: the next), and every later one too when `for_ever`. Disarmed (the
 * normal state) a hit costs one relaxed load. Thread: any.
 */
#ifndef SITD_BASE_FAULT_H
#define SITD_BASE_FAULT_H
#include <stdbool.h>

// FAULT_ROOM: there is no free memory for another version of a model.
enum fault_kind { FAULT_ALLOC, FAULT_READ, FAULT_WRITE, FAULT_KERNEL, FAULT_THREAD, FAULT_ROOM, FAULT_KINDS };

bool fault_hit(enum fault_kind kind);
void fault_arm(enum fault_kind kind, long n, bool for_ever);
void fault_disarm(void);
long fault_count(enum fault_kind kind); // hits seen since the last arm of that kind; tests use it to know when to stop

#endif
