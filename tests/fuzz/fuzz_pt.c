// SPDX-License-Identifier: MIT
/*
 * .pt: parse; touch every byte that the table claims. Input that does not begin with "PK" is a data.pkl: it is put into an
 * archive with one storage of 256 bytes, "data/0", so that the fuzzer reaches the unpickler without having to make zips.
 */
#include <stdlib.h>
#include <string.h>

#include "core/io/checkpoint.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define DEMAND(cond)                                                                                                             \
    do {                                                                                                                         \
        if (!(cond)) __builtin_trap();                                                                                           \
    } while (0)

static volatile unsigned seen; // keeps the reads

static void check(const uint8_t *bytes, size_t n) {
    struct checkpoint c;
    struct err e = {0};
    struct arch a;
    if (checkpoint_parse(&c, bytes, n, "input", &e) != OK) {
        DEMAND(e.status != OK && e.text[0] && e.status != E_INTERNAL);
        return;
    }
    for (int i = 0; i < c.table.n; i++) {
        const struct tensor *t = &c.table.tensors[i];
        DEMAND(t->bytes == t->count * dtype_size(t->dtype) && strlen(t->name) <= 512);
        for (size_t k = 0; k<t->bytes; k += t->bytes> 4096 ? 997 : 1) seen += ((const uint8_t *)t->data)[k];
        if (t->bytes) seen += ((const uint8_t *)t->data)[t->bytes - 1];
    }
    for (int i = 0; i < c.n_meta; i++) DEMAND(checkpoint_meta(&c, c.meta[i].key));
    arch_infer(&a, &c.table, &e);
    checkpoint_close(&c);
}

static uint8_t *put(uint8_t *p, const void *bytes, size_t n) {
    if (n) memcpy(p, bytes, n);
    return p + n;
}

static uint8_t *number(uint8_t *p, uint64_t v, int bytes) {
    for (int i = 0; i < bytes; i++) *p++ = (uint8_t)(v >> 8 * i);
    return p;
}

static uint8_t *local(uint8_t *p, const char *name, const void *bytes, size_t n) {
    p = number(put(p, "PK\3\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 26), strlen(name), 2);
    return put(put(number(p, 0, 2), name, strlen(name)), bytes, n);
}

static uint8_t *central(uint8_t *p, const char *name, size_t n, size_t at) {
    p = put(p, "PK\1\2\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20);
    p = number(number(number(p, n, 4), n, 4), strlen(name), 2);
    p = number(put(p, "\0\0\0\0\0\0\0\0\0\0\0\0", 12), at, 4);
    return put(p, name, strlen(name));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint8_t storage[256], *file = malloc(size + 1024), *p = file;
    if (size >= 2 && data[0] == 'P' && data[1] == 'K') check(data, size);
    else {
        for (int i = 0; i < 256; i++) storage[i] = (uint8_t)i;
        p = local(p, "a/data.pkl", data, size);
        size_t second = (size_t)(p - file);
        p = local(p, "a/data/0", storage, sizeof storage);
        size_t dir = (size_t)(p - file);
        p = central(central(p, "a/data.pkl", size, 0), "a/data/0", sizeof storage, second);
        size_t dir_size = (size_t)(p - file) - dir;
        p = number(number(put(p, "PK\5\6\0\0\0\0\2\0\2\0", 12), dir_size, 4), dir, 4);
        p = number(p, 0, 2);
        check(file, (size_t)(p - file));
    }
    free(file);
    return 0;
}
