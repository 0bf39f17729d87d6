// SPDX-License-Identifier: MIT
/*
 * text: bytes that grow. A failed allocation is remembered and reported once, by text_take. Thread: its owner's.
 */
#ifndef SITD_TEXT_H
#define SITD_TEXT_H
#include <stdbool.h>
#include <stddef.h>

struct text { // start with {0}
    char *p;
    size_t n, cap;
    bool failed;
};
void text_add(struct text *, const void *bytes, size_t n);
void text_printf(struct text *, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
char *text_take(struct text *, size_t *n); // NUL-terminated, caller mem_free's; NULL on no memory (everything is freed then)
void text_deinit(struct text *);

#endif
