// SPDX-License-Identifier: MIT
/*
 * mem: allocation with checked products and a fault seam.
 *
 * Every allocation of core/, proto/ and server/ comes through here, so that a test can make the n-th one fail
 * (mem_fail_after) and see a status instead of a crash. mem_* return NULL on failure or overflow, never abort; memory is
 * zeroed. io has the same seam for read and write in core/base/fault.h. Thread: any.
 */
#ifndef SITD_BASE_MEM_H
#define SITD_BASE_MEM_H
#include <stdbool.h>
#include <stddef.h>

void *mem_alloc(size_t bytes);                       // zeroed; bytes 0 gives a valid pointer
void *mem_array(size_t count, size_t size);          // zeroed, product checked
void *mem_resize(void *p, size_t count, size_t size); // as realloc; the grown part is not zeroed; on NULL p stays valid
void *mem_dup(const void *p, size_t bytes);
char *mem_strdup(const char *s);
char *mem_strndup(const char *s, size_t n);
char *mem_printf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void mem_free(void *p);
// Allocations that failed on this thread so far: for wrapping a library that forgets to pass a failure on.
unsigned long mem_failures(void);

bool mul_overflows(size_t a, size_t b, size_t *product); // true when a*b does not fit; else stores it
bool add_overflows(size_t a, size_t b, size_t *sum);

#endif
