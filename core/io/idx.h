// SPDX-License-Identifier: MIT
/*
 * idx: the arrays of bytes that MNIST and its kin are published as (LeCun's IDX format), plain or gzipped. Thread: any (no
 * globals).
 */
#ifndef SITD_IDX_H
#define SITD_IDX_H
#include <stddef.h>
#include <stdint.h>

#include "core/base/err.h"

struct idx {
    uint8_t *data; // the caller's (mem_free), `count` bytes
    int ndim;      // 1 to 3
    int64_t shape[3];
    size_t count;
};
// Reads a whole file of unsigned bytes; rules on top of idx.c. The text names the path. E_FORMAT, E_RANGE, E_NOMEM, and as
// file_read.
int idx_read(struct idx *, const char *path, struct err *);

#endif
