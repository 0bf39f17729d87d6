// SPDX-License-Identifier: MIT
/*
 * safetensors: parse; touch every byte that the table claims; write it again and demand the same tensors. Input that begins with
 * '{' is a header without its length (which is put in front), so that the fuzzer need not guess it; its data begins behind the
 * first zero byte.
 */
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define DEMAND(cond)                                                                                                             \
    do {                                                                                                                         \
        if (!(cond)) __builtin_trap();                                                                                           \
    } while (0)

struct buffer {
    uint8_t *data;
    size_t n;
};

static int sink(void *ctx, const void *bytes, size_t n, struct err *e) {
    struct buffer *b = ctx;
    uint8_t *grown = mem_resize(b->data, b->n + n + 1, 1);
    if (!grown) return err_set(e, E_NOMEM, "no memory");
    b->data = grown;
    memcpy(b->data + b->n, bytes, n);
    b->n += n;
    return OK;
}

static unsigned touch(const struct tensor_table *t) {
    unsigned sum = 0;
    for (int i = 0; i < t->n; i++) {
        DEMAND(strlen(t->tensors[i].name) < 600);
        for (size_t k = 0; k < t->tensors[i].bytes; k++) sum += ((const uint8_t *)t->tensors[i].data)[k];
    }
    return sum;
}

static void check(const uint8_t *bytes, size_t n) {
    struct safetensors st, again;
    struct err e = {0};
    struct buffer b = {0};
    if (safetensors_parse(&st, bytes, n, &e) != OK) {
        DEMAND(e.status != OK && e.text[0] && e.status != E_INTERNAL);
        return;
    }
    unsigned sum = touch(&st.table);
    if (safetensors_write(&st.table, st.meta, st.n_meta, sink, &b, &e) == OK) {
        DEMAND(safetensors_parse(&again, b.data, b.n, &e) == OK);
        DEMAND(again.table.n == st.table.n && again.n_meta == st.n_meta && touch(&again.table) == sum);
        safetensors_close(&again);
    } else DEMAND(e.status == E_UNSUPPORTED); // a dtype that is only listed
    mem_free(b.data);
    safetensors_close(&st);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0 || data[0] != '{') {
        check(data, size);
        return 0;
    }
    const uint8_t *zero = memchr(data, 0, size);
    size_t header = zero ? (size_t)(zero - data) : size, rest = zero ? size - header - 1 : 0;
    uint8_t *file = malloc(8 + header + rest);
    for (int i = 0; i < 8; i++) file[i] = (uint8_t)((uint64_t)header >> 8 * i);
    memcpy(file + 8, data, header);
    if (rest) memcpy(file + 8 + header, zero + 1, rest);
    check(file, 8 + header + rest);
    free(file);
    return 0;
}
