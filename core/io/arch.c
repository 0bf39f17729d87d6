// SPDX-License-Identifier: MIT
/*
 * arch: what the tensors of a DiT or SiT checkpoint must be (declared in model_dir.h and checkpoint.h).
 *
 * One list says every tensor's name and shape (models-and-math 1.10; facebookresearch/DiT and willisma/SiT models.py use the same
 * keys); inferring, checking and counting all read it. A shape is a string, a letter a dimension: 1 one   d width   2 3 6 that
 * many widths   m width of the MLP   C channels in   p patch side   F the 256 timestep features R rows of the label table
 * (classes and the null)   O p*p*channels out   T tokens pos_embed may be absent: it is fixed (sin-cos) and can be computed.
 * Tensors under "projectors." (REPA's training heads, unused when sampling) are ignored. Anything else that is not in the list is
 * an error: weights that nobody uses mean another network.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"

struct slot {
    const char *name, *shape;
};

static const struct slot outer[] = {
    {"pos_embed", "1Td"}, // first: the one that may be absent
    {"x_embedder.proj.weight", "dCpp"},
    {"x_embedder.proj.bias", "d"},
    {"t_embedder.mlp.0.weight", "dF"},
    {"t_embedder.mlp.0.bias", "d"},
    {"t_embedder.mlp.2.weight", "dd"},
    {"t_embedder.mlp.2.bias", "d"},
    {"y_embedder.embedding_table.weight", "Rd"},
    {"final_layer.linear.weight", "Od"},
    {"final_layer.linear.bias", "O"},
    {"final_layer.adaLN_modulation.1.weight", "2d"},
    {"final_layer.adaLN_modulation.1.bias", "2"},
};
static const struct slot inner[] = {
    // below blocks.N.
    {"attn.qkv.weight", "3d"},        {"attn.qkv.bias", "3"},   {"attn.proj.weight", "dd"},
    {"attn.proj.bias", "d"},          {"mlp.fc1.weight", "md"}, {"mlp.fc1.bias", "m"},
    {"mlp.fc2.weight", "dm"},         {"mlp.fc2.bias", "d"},    {"adaLN_modulation.1.weight", "6d"},
    {"adaLN_modulation.1.bias", "6"},
};
enum { OUTER = sizeof outer / sizeof *outer, INNER = sizeof inner / sizeof *inner, MAX_DEPTH = 1024 };

static const struct { int width, heads; } published[] = {{384, 6}, {768, 12}, {1024, 16}, {1152, 16}, {1280, 16}};

static int64_t dim_of(char c, const struct arch *a) {
    int64_t d = a->hidden_size, p = a->patch_size, g = p ? a->input_size / p : 0;
    switch (c) {
    case 'd':
        return d;
    case '2':
        return 2 * d;
    case '3':
        return 3 * d;
    case '6':
        return 6 * d;
    case 'm':
        return (int64_t)llround(a->mlp_ratio * (double)d);
    case 'C':
        return a->in_channels;
    case 'p':
        return p;
    case 'F':
        return 256;
    case 'R':
        return a->num_classes + a->class_dropout;
    case 'O':
        return p * p * a->in_channels * (1 + a->learn_sigma);
    case 'T':
        return g * g;
    default:
        return 1;
    }
}

// Number of a tensor in the list (blocks after the outer ones), -1 when it has no place. *slot gets its name and shape.
static long place_of(const char *name, const struct slot **slot) {
    if (strncmp(name, "blocks.", 7) != 0) {
        for (int i = 0; i < OUTER; i++)
            if (strcmp(name, outer[i].name) == 0) return *slot = &outer[i], i;
        return -1;
    }
    const char *p = name + 7;
    long block = 0;
    if (*p == '0' && p[1] != '.') return -1; // "blocks.00." would be a second name for block 0
    for (; *p >= '0' && *p <= '9'; p++)
        if ((block = block * 10 + (*p - '0')) >= MAX_DEPTH) return -1;
    if (p == name + 7 || *p++ != '.') return -1;
    for (int i = 0; i < INNER; i++)
        if (strcmp(p, inner[i].name) == 0) return *slot = &inner[i], OUTER + block * INNER + i;
    return -1;
}

static int check_shape(const struct arch *a, const struct tensor *t, const char *shape, struct err *e) {
    int64_t want[TENSOR_MAX_DIMS];
    int n = (int)strlen(shape);
    for (int i = 0; i < n; i++) want[i] = dim_of(shape[i], a);
    if (shape[1] == 'T' && a->input_size == 0 && t->ndim == 3) want[1] = t->shape[1]; // input size unknown: nothing to compare
    if (!tensor_shape_is(t, n, want)) {
        struct tensor expected = {.ndim = n};
        char has[96], wants[96];
        memcpy(expected.shape, want, (size_t)n * sizeof *want);
        tensor_shape_text(t, has, sizeof has);
        tensor_shape_text(&expected, wants, sizeof wants);
        return err_param(e, E_CONFLICT, t->name, "tensor '%s' has shape %s; this network needs %s", t->name, has, wants);
    }
    if (t->dtype != DT_F32 && t->dtype != DT_F16 && t->dtype != DT_BF16 && t->dtype != DT_F64)
        return err_param(e, E_UNSUPPORTED, t->name, "tensor '%s' has dtype %s; weights must be F32, F16, BF16 or F64", t->name,
                         dtype_name(t->dtype));
    return OK;
}

static int name_of(long place, char *dst, size_t size) {
    if (place < OUTER) return snprintf(dst, size, "%s", outer[place].name);
    return snprintf(dst, size, "blocks.%ld.%s", (place - OUTER) / INNER, inner[(place - OUTER) % INNER].name);
}

static int check_tensor(const struct arch *a, const struct tensor *t, bool *seen, long places, struct err *e) {
    const struct slot *slot = NULL;
    if (strncmp(t->name, "projectors.", 11) == 0) return OK;
    long place = place_of(t->name, &slot);
    if (place < 0) return err_param(e, E_CONFLICT, t->name, "tensor '%s' has no place in a DiT or SiT network", t->name);
    if (place >= places)
        return err_param(e, E_CONFLICT, t->name, "tensor '%s': this network has %d blocks only", t->name, a->depth);
    if (seen[place]) return err_param(e, E_CONFLICT, t->name, "tensor '%s' appears twice", t->name);
    seen[place] = true;
    return check_shape(a, t, slot->shape, e);
}

int arch_tensor(const struct arch *a, long index, char name[64], int64_t shape[TENSOR_MAX_DIMS]) {
    if (index < 0 || index >= OUTER + (long)a->depth * INNER) return 0;
    const char *letters = index < OUTER ? outer[index].shape : inner[(index - OUTER) % INNER].shape;
    name_of(index, name, 64);
    int n = (int)strlen(letters);
    for (int i = 0; i < n; i++) shape[i] = dim_of(letters[i], a);
    return n;
}

int arch_match(const struct arch *a, const struct tensor_table *table, struct err *e) {
    if (a->depth < 0 || a->depth > MAX_DEPTH)
        return err_param(e, E_RANGE, "architecture.depth", "depth %d is out of range", a->depth);
    long places = OUTER + (long)a->depth * INNER;
    bool *seen = mem_array((size_t)places, sizeof *seen);
    if (!seen) return err_set(e, E_NOMEM, "no memory to check the tensors");
    int rc = OK;
    for (int i = 0; i < table->n && rc == OK; i++) rc = check_tensor(a, &table->tensors[i], seen, places, e);
    for (long p = 1; p < places && rc == OK; p++) {
        char name[64];
        if (seen[p]) continue;
        name_of(p, name, sizeof name);
        rc = err_param(e, E_CONFLICT, name, "tensor '%s' is missing", name);
    }
    mem_free(seen);
    return rc;
}

// --- inference

static const struct tensor *need(const struct tensor_table *table, const char *name, int ndim, struct err *e) {
    const struct tensor *t = tensor_find(table, name);
    if (!t) {
        const char *hint = "";
        for (int i = 0; i < table->n; i++) {
            const char *n = table->tensors[i].name;
            if (strncmp(n, "transformer_blocks.", 19) == 0)
                hint = " (these are diffusers' key names, which sitd does not read yet)";
            if (strncmp(n, "model.decoder_", 14) == 0) hint = " (this is a MaskDiT checkpoint, which sitd does not read yet)";
        }
        err_param(e, E_CONFLICT, name, "tensor '%s' is missing%s", name, hint);
        return NULL;
    }
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] < 1 || t->shape[i] > 1 << 24) ndim = -1;
    if (t->ndim == ndim) return t;
    char shape[96];
    tensor_shape_text(t, shape, sizeof shape);
    err_param(e, E_CONFLICT, name, "tensor '%s' has shape %s, which no DiT or SiT network has", name, shape);
    return NULL;
}

static int infer_depth(const struct tensor_table *table) {
    long most = 0;
    const struct slot *slot;
    for (int i = 0; i < table->n; i++) {
        long p = place_of(table->tensors[i].name, &slot);
        if (p >= OUTER && (p - OUTER) / INNER + 1 > most) most = (p - OUTER) / INNER + 1;
    }
    return (int)most;
}

static int infer_input(struct arch *a, const struct tensor_table *table, struct err *e) {
    if (!tensor_find(table, "pos_embed")) return OK; // input_size stays 0: unknown
    const struct tensor *pos = need(table, "pos_embed", 3, e);
    if (!pos) return E_CONFLICT;
    int64_t side = (int64_t)llround(sqrt((double)pos->shape[1]));
    if (side * side != pos->shape[1])
        return err_param(e, E_CONFLICT, "pos_embed", "tensor 'pos_embed' holds %lld tokens, which is not a square",
                         (long long)pos->shape[1]);
    a->input_size = (int)side * a->patch_size;
    return OK;
}

int arch_heads(int hidden_size) {
    for (size_t i = 0; i < sizeof published / sizeof *published; i++)
        if (published[i].width == hidden_size) return published[i].heads;
    return 0;
}

int arch_infer(struct arch *a, const struct tensor_table *table, struct err *e) {
    *a = (struct arch){0};
    const struct tensor *x = need(table, "x_embedder.proj.weight", 4, e),
                        *y = need(table, "y_embedder.embedding_table.weight", 2, e),
                        *fc1 = need(table, "blocks.0.mlp.fc1.weight", 2, e),
                        *out = need(table, "final_layer.linear.weight", 2, e);
    if (!x || !y || !fc1 || !out) return E_CONFLICT;
    if (x->shape[2] != x->shape[3] || x->shape[2] > 256 || x->shape[1] > 1024) // what follows multiplies these
        return err_param(e, E_CONFLICT, x->name, "tensor '%s' is not a patch embedding of square patches up to 256", x->name);
    a->hidden_size = (int)x->shape[0];
    a->in_channels = (int)x->shape[1];
    a->patch_size = (int)x->shape[2];
    a->depth = infer_depth(table);
    a->num_heads = arch_heads(a->hidden_size);
    a->mlp_ratio = (double)fc1->shape[0] / a->hidden_size;
    a->class_dropout = y->shape[0] > 1;
    a->num_classes = (int)y->shape[0] - a->class_dropout;
    int64_t per_channel = x->shape[2] * x->shape[2] * x->shape[1];
    a->learn_sigma = out->shape[0] == 2 * per_channel;
    int rc = infer_input(a, table, e);
    return rc == OK ? arch_match(a, table, e) : rc;
}

// --- sizes

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

int arch_check(const struct arch *a, struct err *e) {
    int rc = size_in("input_size", a->input_size, 1, 8192, e);
    if (rc == OK) rc = size_in("patch_size", a->patch_size, 1, 256, e);
    if (rc == OK) rc = size_in("in_channels", a->in_channels, 1, 1024, e);
    if (rc == OK) rc = size_in("hidden_size", a->hidden_size, 8, 65536, e);
    if (rc == OK) rc = size_in("depth", a->depth, 1, MAX_DEPTH, e);
    if (rc == OK) rc = size_in("num_heads", a->num_heads, 1, 1024, e);
    if (rc == OK) rc = size_in("num_classes", a->num_classes, 1, 1 << 24, e);
    if (rc != OK) return rc;
    double mlp = a->mlp_ratio * a->hidden_size;
    if (!(a->mlp_ratio > 0 && a->mlp_ratio <= 64)) return misfit("mlp_ratio", "must be more than 0 and at most 64", e);
    if (fabs(mlp - nearbyint(mlp)) > 1e-6 * mlp || nearbyint(mlp) < 1)
        return misfit("mlp_ratio", "times hidden_size is not a whole number", e);
    if (a->input_size % a->patch_size) return misfit("patch_size", "does not divide input_size", e);
    if (a->hidden_size % 4) return misfit("hidden_size", "must be a multiple of 4", e);
    if (a->hidden_size % a->num_heads) return misfit("num_heads", "does not divide hidden_size", e);
    int head = a->hidden_size / a->num_heads;
    if (head % 8 || head > 128) return misfit("num_heads", "makes heads that are not 8, 16, ... 128 wide", e);
    return check_products(a, e);
}
