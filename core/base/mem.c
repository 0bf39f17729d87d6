// SPDX-License-Identifier: MIT
#include "core/base/mem.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/fault.h"

bool mul_overflows(size_t a, size_t b, size_t *product) { return __builtin_mul_overflow(a, b, product); }
bool add_overflows(size_t a, size_t b, size_t *sum) { return __builtin_add_overflow(a, b, sum); }

static _Thread_local unsigned long failures;

unsigned long mem_failures(void) { return failures; }

void *mem_alloc(size_t bytes) {
    void *p = fault_hit(FAULT_ALLOC) ? NULL : calloc(1, bytes ? bytes : 1);
    failures += !p;
    return p;
}

void *mem_array(size_t count, size_t size) {
    size_t bytes;
    return mul_overflows(count, size, &bytes) ? NULL : mem_alloc(bytes);
}

void *mem_resize(void *p, size_t count, size_t size) {
    size_t bytes;
    if (mul_overflows(count, size, &bytes)) return NULL;
    void *grown = fault_hit(FAULT_ALLOC) ? NULL : realloc(p, bytes ? bytes : 1);
    failures += !grown;
    return grown;
}

void *mem_dup(const void *p, size_t bytes) {
    void *copy = mem_alloc(bytes);
    if (copy && bytes) memcpy(copy, p, bytes);
    return copy;
}

char *mem_strndup(const char *s, size_t n) {
    n = strnlen(s, n);
    char *copy = mem_alloc(n + 1);
    if (copy) memcpy(copy, s, n);
    return copy;
}

char *mem_strdup(const char *s) { return mem_dup(s, strlen(s) + 1); }

char *mem_printf(const char *fmt, ...) {
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    char *s = n < 0 ? NULL : mem_alloc((size_t)n + 1);
    if (s) vsnprintf(s, (size_t)n + 1, fmt, again);
    va_end(ap);
    va_end(again);
    return s;
}

void mem_free(void *p) { free(p); }
