// SPDX-License-Identifier: MIT
/*
 * arch: what the tensors of a network must be (declared in model_dir.h and checkpoint.h).
 *
 * One list says every tensor's name and shape; inferring, checking and counting all read it. It is put together from sections:
 * what all networks have, then what the conditioning design, the label table and the decoder add. adaLN-Zero with a plain table
 * is facebookresearch/DiT's and willisma/SiT's list (models-and-math 1.10), with decoder and one-hot table Anima-Lab/MaskDiT's
 * (section 5). The DiT paper's other designs have no public code, so the names norm1, norm2, norm_cross, cross_attn and
 * norm_final are ours; their shapes give the paper's parameter counts (section 1.11).
 *
 * A shape is a string, a letter a dimension:
 *   1 one   d width   2 3 4 6 that many widths   m width of the MLP   C channels in   p patch side   T tokens
 *   F the 256 timestep features   R rows of the label table (classes and the null)   K classes   O p*p*channels out
 *   e width of the decoder   u t s 2, 3, 6 of it   n width of its MLP
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/arch_list.h"

struct slot {
    const char *name, *shape;
    bool fixed; // may be absent
};
#define COUNT(a) (int)(sizeof(a) / sizeof *(a))

// clang-format off
static const struct slot image[] = {
    {"pos_embed", "1Td", true},
    {"x_embedder.proj.weight", "dCpp", false},
    {"x_embedder.proj.bias", "d", false},
};
static const struct slot embedder[] = {
    {"t_embedder.mlp.0.weight", "dF", false},
    {"t_embedder.mlp.0.bias", "d", false},
    {"t_embedder.mlp.2.weight", "dd", false},
    {"t_embedder.mlp.2.bias", "d", false},
};
static const struct slot labels[] = {{"y_embedder.embedding_table.weight", "Rd", false}};
static const struct slot labels_one_hot[] = {{"y_embedder.embedding_table.weight", "dK", false}};
static const struct slot final_adaln[] = {
    {"final_layer.linear.weight", "Od", false},
    {"final_layer.linear.bias", "O", false},
    {"final_layer.adaLN_modulation.1.weight", "2d", false},
    {"final_layer.adaLN_modulation.1.bias", "2", false},
};
static const struct slot final_affine[] = {
    {"final_layer.norm_final.weight", "d", false},
    {"final_layer.norm_final.bias", "d", false},
    {"final_layer.linear.weight", "Od", false},
    {"final_layer.linear.bias", "O", false},
};
static const struct slot decoder[] = {
    {"decoder_pos_embed", "1Te", true},
    {"mask_token", "11e", true}, // training only
    {"decoder_layer.linear.weight", "ed", false},
    {"decoder_layer.linear.bias", "e", false},
    {"decoder_layer.adaLN_modulation.1.weight", "2d", false},
    {"decoder_layer.adaLN_modulation.1.bias", "2", false},
    {"final_layer.linear.weight", "Oe", false},
    {"final_layer.linear.bias", "O", false},
    {"final_layer.adaLN_modulation.1.weight", "ud", false},
    {"final_layer.adaLN_modulation.1.bias", "u", false},
};
static const struct slot block[] = {
    {"attn.qkv.weight", "3d", false},
    {"attn.qkv.bias", "3", false},
    {"attn.proj.weight", "dd", false},
    {"attn.proj.bias", "d", false},
    {"mlp.fc1.weight", "md", false},
    {"mlp.fc1.bias", "m", false},
    {"mlp.fc2.weight", "dm", false},
    {"mlp.fc2.bias", "d", false},
};
static const struct slot block_adaln_zero[] = {
    {"adaLN_modulation.1.weight", "6d", false},
    {"adaLN_modulation.1.bias", "6", false},
};
static const struct slot block_adaln[] = {
    {"adaLN_modulation.1.weight", "4d", false},
    {"adaLN_modulation.1.bias", "4", false},
};
static const struct slot block_affine[] = {
    {"norm1.weight", "d", false},
    {"norm1.bias", "d", false},
    {"norm2.weight", "d", false},
    {"norm2.bias", "d", false},
};
static const struct slot block_cross[] = {
    {"norm_cross.weight", "d", false},
    {"norm_cross.bias", "d", false},
    {"cross_attn.q.weight", "dd", false},
    {"cross_attn.q.bias", "d", false},
    {"cross_attn.kv.weight", "2d", false},
    {"cross_attn.kv.bias", "2", false},
    {"cross_attn.proj.weight", "dd", false},
    {"cross_attn.proj.bias", "d", false},
};
static const struct slot block_decoder[] = {
    {"attn.qkv.weight", "te", false},
    {"attn.qkv.bias", "t", false},
    {"attn.proj.weight", "ee", false},
    {"attn.proj.bias", "e", false},
    {"mlp.fc1.weight", "ne", false},
    {"mlp.fc1.bias", "n", false},
    {"mlp.fc2.weight", "en", false},
    {"mlp.fc2.bias", "e", false},
    {"adaLN_modulation.1.weight", "sd", false},
    {"adaLN_modulation.1.bias", "s", false},
};

// clang-format on

struct section {
    const char *prefix; // "" or that of numbered blocks
    const struct slot *slots;
    int n, repeat; // repeat: number of blocks; 1 for an unnumbered section
};
enum { MOST_SECTIONS = 8 };

static void add(struct section *s, int *n, const char *prefix, const struct slot *slots, int count, int repeat) {
    s[(*n)++] = (struct section){prefix, slots, count, repeat};
}

static int sections_of(const struct arch *a, struct section s[MOST_SECTIONS]) {
    static const char blocks[] = "blocks.";
    const char *embedders = a->block_embedders ? blocks : "";
    int n = 0, depth = a->depth, copies = a->block_embedders ? depth : 1;
    bool affine = a->block == BLOCK_CROSS_ATTENTION || a->block == BLOCK_IN_CONTEXT;
    add(s, &n, "", image, COUNT(image), 1);
    add(s, &n, embedders, embedder, COUNT(embedder), copies);
    add(s, &n, embedders, a->one_hot ? labels_one_hot : labels, 1, copies);
    if (a->decoder.depth) add(s, &n, "", decoder, COUNT(decoder), 1);
    else if (affine) add(s, &n, "", final_affine, COUNT(final_affine), 1);
    else add(s, &n, "", final_adaln, COUNT(final_adaln), 1);
    add(s, &n, blocks, block, COUNT(block), depth);
    if (affine) add(s, &n, blocks, block_affine, COUNT(block_affine), depth);
    else if (a->block == BLOCK_ADALN) add(s, &n, blocks, block_adaln, COUNT(block_adaln), depth);
    else add(s, &n, blocks, block_adaln_zero, COUNT(block_adaln_zero), depth);
    if (a->block == BLOCK_CROSS_ATTENTION) add(s, &n, blocks, block_cross, COUNT(block_cross), depth);
    if (a->decoder.depth) add(s, &n, "decoder_blocks.", block_decoder, COUNT(block_decoder), a->decoder.depth);
    return n;
}

static int64_t dim_of(char c, const struct arch *a) {
    int64_t d = a->hidden_size, e = a->decoder.hidden_size, p = a->patch_size, g = p ? a->input_size / p : 0;
    // clang-format off
    switch (c) {
    case 'd': return d;
    case '2': return 2 * d;
    case '3': return 3 * d;
    case '4': return 4 * d;
    case '6': return 6 * d;
    case 'm': return (int64_t)llround(a->mlp_ratio * (double)d);
    case 'e': return e;
    case 'u': return 2 * e;
    case 't': return 3 * e;
    case 's': return 6 * e;
    case 'n': return (int64_t)llround(a->mlp_ratio * (double)e);
    case 'C': return a->in_channels;
    case 'p': return p;
    case 'F': return 256;
    case 'R': return a->num_classes + a->class_dropout;
    case 'K': return a->num_classes;
    case 'O': return p * p * a->in_channels * (1 + a->learn_sigma);
    case 'T': return g * g;
    default: return 1;
    }
    // clang-format on
}

int arch_block_number(const char *name, const char *prefix, const char **rest) {
    size_t n = strlen(prefix);
    int number = 0;
    if (strncmp(name, prefix, n) != 0) return -1;
    const char *p = name + n;
    if (*p == '0' && p[1] != '.') return -1; // "blocks.00." would be a second name for block 0
    for (; *p >= '0' && *p <= '9'; p++)
        if ((number = number * 10 + (*p - '0')) >= ARCH_MAX_DEPTH) return -1;
    if (p == name + n || *p != '.') return -1;
    *rest = p + 1;
    return number;
}

enum { NO_PLACE = -1, BEYOND = -2 };

// Number of a tensor in the list, NO_PLACE, or BEYOND when its block is past the last. *slot gets its name and shape.
static long place_of(const struct section *s, int n, const char *name, const struct slot **slot) {
    long start = 0, found = NO_PLACE;
    for (int i = 0; i < n; start += (long)s[i].n * s[i].repeat, i++) {
        const char *rest = name;
        int number = s[i].prefix[0] ? arch_block_number(name, s[i].prefix, &rest) : 0;
        if (number < 0) continue;
        for (int k = 0; k < s[i].n; k++) {
            if (strcmp(rest, s[i].slots[k].name) != 0) continue;
            if (number >= s[i].repeat) found = BEYOND;
            else return *slot = &s[i].slots[k], start + (long)number * s[i].n + k;
        }
    }
    return found;
}

static const struct slot *slot_at(const struct section *s, int n, long place, char name[64]) {
    for (int i = 0; i < n; i++) {
        long here = (long)s[i].n * s[i].repeat;
        if (place >= here) {
            place -= here;
            continue;
        }
        const struct slot *slot = &s[i].slots[place % s[i].n];
        if (s[i].prefix[0]) snprintf(name, 64, "%s%ld.%s", s[i].prefix, place / s[i].n, slot->name);
        else snprintf(name, 64, "%s", slot->name);
        return slot;
    }
    return NULL;
}

static long places_in(const struct section *s, int n) {
    long places = 0;
    for (int i = 0; i < n; i++) places += (long)s[i].n * s[i].repeat;
    return places;
}

int arch_tensor(const struct arch *a, long index, char name[64], int64_t shape[TENSOR_MAX_DIMS], bool *fixed) {
    struct section s[MOST_SECTIONS];
    const struct slot *slot = index < 0 ? NULL : slot_at(s, sections_of(a, s), index, name);
    if (fixed) *fixed = slot && slot->fixed;
    if (!slot) return 0;
    int n = (int)strlen(slot->shape);
    for (int i = 0; i < n; i++) shape[i] = dim_of(slot->shape[i], a);
    return n;
}

// --- matching

bool arch_unused(const char *name) {
    static const char *const prefixes[] = {"projectors.", "teacher.",      "teacher_",   "momentum_",  "ema_encoder.",
                                           "head.",       "student_head.", "dino_head.", "ibot_head.", "feat_norm."};
    for (int i = 0; i < COUNT(prefixes); i++)
        if (strncmp(name, prefixes[i], strlen(prefixes[i])) == 0) return true;
    return strcmp(name, "center") == 0 || strcmp(name, "center2") == 0;
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

static int check_tensor(const struct arch *a, const struct section *s, int n, const struct tensor *t, bool *seen, struct err *e) {
    const struct slot *slot = NULL;
    if (arch_unused(t->name)) return OK;
    long place = place_of(s, n, t->name, &slot);
    if (place == BEYOND)
        return err_param(e, E_CONFLICT, t->name, "tensor '%s': this network has %d blocks only", t->name,
                         strncmp(t->name, "decoder_", 8) == 0 ? a->decoder.depth : a->depth);
    if (place < 0)
        return err_param(e, E_CONFLICT, t->name, "tensor '%s' has no place in this network (%s blocks%s)", t->name,
                         arch_block_name(a->block), a->decoder.depth ? " and a decoder" : "");
    if (seen[place]) return err_param(e, E_CONFLICT, t->name, "tensor '%s' appears twice", t->name);
    seen[place] = true;
    return check_shape(a, t, slot->shape, e);
}

int arch_match(const struct arch *a, const struct tensor_table *table, struct err *e) {
    struct section s[MOST_SECTIONS];
    if (a->depth < 0 || a->depth > ARCH_MAX_DEPTH)
        return err_param(e, E_RANGE, "architecture.depth", "depth %d is out of range", a->depth);
    int n = sections_of(a, s), rc = OK;
    long places = places_in(s, n);
    bool *seen = mem_array((size_t)places, sizeof *seen);
    if (!seen) return err_set(e, E_NOMEM, "no memory to check the tensors");
    for (int i = 0; i < table->n && rc == OK; i++) rc = check_tensor(a, s, n, &table->tensors[i], seen, e);
    for (long p = 0; p < places && rc == OK; p++) {
        char name[64];
        if (!seen[p] && !slot_at(s, n, p, name)->fixed) rc = err_param(e, E_CONFLICT, name, "tensor '%s' is missing", name);
    }
    mem_free(seen);
    return rc;
}
