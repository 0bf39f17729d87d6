// SPDX-License-Identifier: MIT
// arch_check: sizes that no network of ours has (declared in model_dir.h), and the names of the conditioning designs.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/io/arch_list.h"

static const char *const block_names[BLOCK_COUNT] = {"adaln-zero", "adaln", "cross-attention", "in-context"};

const char *arch_block_name(enum arch_block b) { return block_names[b]; }

int arch_block_parse(const char *name) {
    for (int i = 0; i < BLOCK_COUNT; i++)
        if (strcmp(name, block_names[i]) == 0) return i;
    return -1;
}

static int size_in(const char *name, int64_t v, int64_t min, int64_t max, struct err *e) {
    char field[64];
    if (v >= min && v <= max) return OK;
    snprintf(field, sizeof field, "architecture.%s", name);
    return err_param(e, E_RANGE, field, "field '%s' is %lld; allowed are %lld to %lld", field, (long long)v, (long long)min,
                     (long long)max);
}

static int misfit(const char *name, const char *why, struct err *e) {
    char field[64];
    snprintf(field, sizeof field, "architecture.%s", name);
    return err_param(e, E_RANGE, field, "field '%s' %s", field, why);
}

static int check_products(const struct arch *a, struct err *e) { // every factor is known to be small: nothing overflows
    double d = a->hidden_size, p = a->patch_size, side = a->input_size / p, tokens = side * side;
    double wide = a->mlp_ratio > 6 ? a->mlp_ratio : 6, limit = 2147483648.0;
    if (tokens * d * wide > limit)
        return misfit("input_size", "makes more than 2^31 activations with this patch_size and hidden_size", e);
    if ((double)a->input_size * a->input_size * a->in_channels * 2 > limit)
        return misfit("in_channels", "makes inputs of more than 2^31 values", e);
    if (d * a->num_classes > limit) return misfit("num_classes", "makes a label table of more than 2^31 values", e);
    if (d * p * p * a->in_channels * 2 > limit)
        return misfit("patch_size", "makes a patch embedding of more than 2^31 values", e);
    if (d * d * (4 + 6 + 2 * a->mlp_ratio) * a->depth > 64 * limit)
        return misfit("depth", "makes a network of more than 2^37 weights", e);
    return OK;
}

static int check_heads(int width, int heads, const char *width_field, const char *heads_field, struct err *e) {
    if (width % 4) return misfit(width_field, "must be a multiple of 4", e);
    if (width % heads) return misfit(heads_field, "does not divide hidden_size", e);
    int head = width / heads;
    return head % 8 || head > 128 ? misfit(heads_field, "makes heads that are not 8, 16, ... 128 wide", e) : OK;
}

static int check_decoder(const struct arch *a, struct err *e) {
    if (a->block != BLOCK_ADALN_ZERO) return misfit("decoder", "goes with block \"adaln-zero\" only", e);
    int rc = size_in("decoder.hidden_size", a->decoder.hidden_size, 8, 65536, e);
    if (rc == OK) rc = size_in("decoder.depth", a->decoder.depth, 1, ARCH_MAX_DEPTH, e);
    if (rc == OK) rc = size_in("decoder.num_heads", a->decoder.num_heads, 1, 1024, e);
    if (rc != OK) return rc;
    struct arch alone = *a; // the decoder's products are bounded as an encoder's
    double mlp = a->mlp_ratio * a->decoder.hidden_size;
    if (fabs(mlp - nearbyint(mlp)) > 1e-6 * mlp) return misfit("mlp_ratio", "times decoder.hidden_size is not a whole number", e);
    alone.hidden_size = a->decoder.hidden_size, alone.depth = a->decoder.depth;
    rc = check_heads(a->decoder.hidden_size, a->decoder.num_heads, "decoder.hidden_size", "decoder.num_heads", e);
    return rc == OK ? check_products(&alone, e) : rc;
}

int arch_check(const struct arch *a, struct err *e) {
    int rc = size_in("input_size", a->input_size, 1, 8192, e);
    if (rc == OK) rc = size_in("patch_size", a->patch_size, 1, 256, e);
    if (rc == OK) rc = size_in("in_channels", a->in_channels, 1, 1024, e);
    if (rc == OK) rc = size_in("hidden_size", a->hidden_size, 8, 65536, e);
    if (rc == OK) rc = size_in("depth", a->depth, 1, ARCH_MAX_DEPTH, e);
    if (rc == OK) rc = size_in("num_heads", a->num_heads, 1, 1024, e);
    if (rc == OK) rc = size_in("num_classes", a->num_classes, 1, 1 << 24, e);
    if (rc != OK) return rc;
    double mlp = a->mlp_ratio * a->hidden_size;
    if (!(a->mlp_ratio > 0 && a->mlp_ratio <= 64)) return misfit("mlp_ratio", "must be more than 0 and at most 64", e);
    if (fabs(mlp - nearbyint(mlp)) > 1e-6 * mlp || nearbyint(mlp) < 1)
        return misfit("mlp_ratio", "times hidden_size is not a whole number", e);
    if (a->input_size % a->patch_size) return misfit("patch_size", "does not divide input_size", e);
    rc = check_heads(a->hidden_size, a->num_heads, "hidden_size", "num_heads", e);
    if (rc == OK && a->decoder.depth) rc = check_decoder(a, e);
    if (rc == OK && a->block_embedders && a->block != BLOCK_ADALN_ZERO)
        rc = misfit("block_embedders", "goes with block \"adaln-zero\" only", e);
    if (rc != OK) return rc;
    return check_products(a, e);
}
