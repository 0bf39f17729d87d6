// SPDX-License-Identifier: MIT
/*
 * ref: the reference back end, which is the specification of every op. Naive on purpose: one loop nest an op, one thread, sums in
 * double and in index order, libm functions in double. With KERN_BF16 it rounds wherever a bfloat16 buffer is written and
 * multiplies bfloat16 weights, so that a bfloat16 back end can be held against it.
 */
#include "kernels/ref/ref.h"
#include "kernels/backend.h"

#include <stdlib.h>

#define LARGE ((size_t)64 << 20)

static int ref_use(struct kern *k) {
    (void)k;
    return KERN_OK;
}

static int ref_alloc(struct kern *k, size_t bytes, void **out) {
    size_t size = kern_alloc_size(bytes);
    // Linux promises more than there is, and kills somebody when it is used
    bool there = size && (size < LARGE || size < kern_host_memory());
    *out = there ? aligned_alloc(64, size) : NULL;
    if (!*out) return kern_fail(k, KERN_ENOMEM, "out of memory for a buffer of %zu bytes", bytes);
    memset(*out, 0, size);
    return KERN_OK;
}

static void ref_free(struct kern *k, void *p) {
    (void)k;
    free(p);
}

static int ref_upload(struct kern *k, void *dst, const void *host, size_t bytes) {
    (void)k;
    if (bytes) memcpy(dst, host, bytes);
    return KERN_OK;
}

static int ref_download(struct kern *k, void *host, const void *src, size_t bytes) {
    (void)k;
    if (bytes) memcpy(host, src, bytes);
    return KERN_OK;
}

static int ref_copy(struct kern *k, void *dst, const void *src, size_t bytes) {
    (void)k;
    memcpy(dst, src, bytes);
    return KERN_OK;
}

static int ref_rows(struct kern *k, int n, int lines, kern_rows_fn *fn, void *ctx) {
    (void)lines;
    return n > 0 ? fn(k, ctx, 0, n, 0) : KERN_OK;
}

static int ref_rows_scratch(struct kern *k, int n, int lines) {
    (void)k, (void)lines;
    return n;
}

void kern_ref_fill(struct kern *k) {
    k->use = ref_use;
    k->alloc = ref_alloc;
    k->free = ref_free;
    k->upload = ref_upload;
    k->download = ref_download;
    k->copy = ref_copy;
    k->rows = ref_rows;
    k->rows_scratch = ref_rows_scratch;
    k->linear_new = ref_linear_new;
    k->linear_free = ref_linear_free;
    k->linear = ref_linear;
    k->patchify = ref_patchify;
    k->unpatchify = ref_unpatchify;
    k->add_table = ref_add_table;
    k->timestep_embed = ref_timestep_embed;
    k->condition = ref_condition;
    k->norm_modulate = ref_norm_modulate;
    k->gate_norm = ref_gate_norm;
    k->attention = ref_attention;
    k->conv_new = ref_conv_new;
    k->conv_free = ref_conv_free;
    k->conv_strips = ref_conv_strips;
    k->conv = ref_conv;
    k->group_norm = ref_group_norm;
    k->wide_new = ref_wide_new;
    k->wide_free = ref_wide_free;
    k->wide_strips = ref_wide_strips;
    k->wide = ref_wide;

    k->set_token = ref_set_token;
    k->cross_attention = ref_cross_attention;
    k->gather = ref_gather;
    k->row_update = ref_row_update;
    k->row_norm = ref_row_norm;

    k->zero = ref_zero;
    k->linear_wrap = ref_linear_wrap;
    k->linear_refresh = ref_linear_refresh;
    k->linear_backward = ref_linear_backward;
    k->linear_gradients = ref_linear_gradients;
    k->gate_norm_backward = ref_gate_norm_backward;
    k->attention_backward = ref_attention_backward;
    k->cross_attention_backward = ref_cross_attention_backward;
    k->take_token = ref_take_token;
    k->condition_backward = ref_condition_backward;
    k->unpatchify_backward = ref_unpatchify_backward;
    k->mix = ref_mix;
    k->loss = ref_loss;
    k->sum_squares = ref_sum_squares;
    k->adamw = ref_adamw;
}
