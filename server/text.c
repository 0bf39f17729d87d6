// SPDX-License-Identifier: MIT
#include "server/text.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"

static bool room_for(struct text *t, size_t n) {
    size_t need;
    if (t->failed || add_overflows(t->n, n, &need) || add_overflows(need, 1, &need)) return !(t->failed = true);
    if (need <= t->cap) return true;
    size_t cap = t->cap ? t->cap : 256;
    while (cap < need) {
        if (cap > (size_t)-1 / 2) return !(t->failed = true);
        cap *= 2;
    }
    char *p = mem_resize(t->p, cap, 1);
    if (!p) return !(t->failed = true);
    t->p = p;
    t->cap = cap;
    return true;
}

void text_add(struct text *t, const void *bytes, size_t n) {
    if (!room_for(t, n)) return;
    if (n) memcpy(t->p + t->n, bytes, n);
    t->n += n;
}

void text_printf(struct text *t, const char *fmt, ...) {
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (n < 0) t->failed = true;
    else if (room_for(t, (size_t)n)) {
        vsnprintf(t->p + t->n, (size_t)n + 1, fmt, again);
        t->n += (size_t)n;
    }
    va_end(again);
}

char *text_take(struct text *t, size_t *n) {
    text_add(t, "", 1); // the NUL, and a buffer where nothing was added
    char *p = t->failed ? NULL : t->p;
    if (n) *n = p ? t->n - 1 : 0;
    if (p) *t = (struct text){0};
    else text_deinit(t);
    return p;
}

void text_deinit(struct text *t) {
    mem_free(t->p);
    *t = (struct text){0};
}
