// SPDX-License-Identifier: MIT
#include "proto/near.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int min(int a, int b) { return a < b ? a : b; }

// Optimal string alignment distance. Both at most NEAR_WORD long.
static int distance(const char *a, const char *b) {
    int la = (int)strlen(a), lb = (int)strlen(b), rows[3][NEAR_WORD + 1];
    int *old = rows[0], *above = rows[1], *row = rows[2];
    for (int j = 0; j <= lb; j++) above[j] = old[j] = j;
    for (int i = 1; i <= la; i++) {
        row[0] = i;
        for (int j = 1; j <= lb; j++) {
            int x = tolower((unsigned char)a[i - 1]), y = tolower((unsigned char)b[j - 1]);
            row[j] = min(min(above[j], row[j - 1]) + 1, above[j - 1] + (x != y));
            if (i > 1 && j > 1 && x == tolower((unsigned char)b[j - 2]) && y == tolower((unsigned char)a[i - 2]))
                row[j] = min(row[j], old[j - 2] + 1);
        }
        int *spare = old;
        old = above, above = row, row = spare;
    }
    return above[lb];
}

void near_init(struct near *n, const char *word) { *n = (struct near){.word = word}; }

void near_add(struct near *n, const char *candidate) {
    size_t length = strlen(n->word), other = strlen(candidate);
    if (length == 0 || length > NEAR_WORD || other > NEAR_WORD) return;
    int allowed = length < 4 ? 1 : length < 8 ? 2 : 3, d = allowed + 1;
    if (labs((long)length - (long)other) <= allowed) d = distance(n->word, candidate);
    if (length >= 3 && strcasestr(candidate, n->word)) d = min(d, allowed); // "boot" finds "ankle boot"
    if (d > allowed) return;
    int at = n->n;
    for (int i = 0; i < n->n; i++) {
        if (strcmp(n->best[i], candidate) == 0) return;
        if (d < n->distance[i]) at = min(at, i);
    }
    if (at == NEAR_MAX) return;
    if (n->n < NEAR_MAX) n->n++;
    for (int i = n->n - 1; i > at; i--) n->best[i] = n->best[i - 1], n->distance[i] = n->distance[i - 1];
    n->best[at] = candidate;
    n->distance[at] = d;
}

void near_text(const struct near *n, char *text, size_t size) {
    size_t len = 0;
    int shown = n->n;
    text[0] = 0;
    while (shown > 1 && n->distance[0] == 0 && n->distance[shown - 1] > 0)
        shown--; // only the letter case was wrong: that one it is
    for (int i = 0; i < shown && len < size; i++)
        len += (size_t)snprintf(text + len, size - len, "%s\"%s\"",
                                i == 0           ? "; did you mean "
                                : i == shown - 1 ? " or "
                                                 : ", ",
                                n->best[i]);
    if (shown && len < size) snprintf(text + len, size - len, "?");
}
