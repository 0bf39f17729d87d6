// SPDX-License-Identifier: MIT
/*
 * near: the names closest to one that was not found, for error messages.
 *
 * Distance: insertions, deletions, substitutions and swaps of neighbours, letter case free of charge; a name that contains the
 * whole word counts as near. Feed every candidate to near_add, then read best[0..n). Words longer than NEAR_WORD get no
 * suggestions, which bounds the work that a hostile request can cause. Thread: its owner's.
 */
#ifndef SITD_NEAR_H
#define SITD_NEAR_H
#include <stddef.h>

#define NEAR_MAX 4
#define NEAR_WORD 64

struct near {
    const char *word;           // borrowed
    const char *best[NEAR_MAX]; // borrowed from near_add
    int distance[NEAR_MAX], n;
};
void near_init(struct near *, const char *word);
void near_add(struct near *, const char *candidate);
void near_text(const struct near *, char *text, size_t size); // "; did you mean a, b or c?" or ""

#endif
