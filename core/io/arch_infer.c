// SPDX-License-Identifier: MIT
/*
 * arch_infer: which network a table of tensors is (declared in checkpoint.h). A few tensors that every network has tell the
 * sizes, the presence of others tells the design; then the whole table is held against the list of that network.
 */
#include <math.h>
#include <string.h>

#include "core/io/arch_list.h"

static const struct { const char *name; int width, depth, heads; } published[] = {
    {"S", 384, 12, 6}, {"B", 768, 12, 12}, {"L", 1024, 24, 16}, {"XL", 1152, 28, 16}, {"H", 1280, 32, 16}};

int arch_heads(int hidden_size) {
    for (size_t i = 0; i < sizeof published / sizeof *published; i++)
        if (published[i].width == hidden_size) return published[i].heads;
    return 0;
}

bool arch_size(struct arch *a, const char *name, size_t n) {
    for (size_t i = 0; i < sizeof published / sizeof *published; i++)
        if (strlen(published[i].name) == n && strncmp(name, published[i].name, n) == 0)
            return a->hidden_size = published[i].width, a->depth = published[i].depth, a->num_heads = published[i].heads, true;
    return false;
}

static const struct tensor *need(const struct tensor_table *table, const char *name, int ndim, struct err *e) {
    const struct tensor *t = tensor_find(table, name);
    if (!t) {
        err_param(e, E_CONFLICT, name, "tensor '%s' is missing", name);
        return NULL;
    }
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] < 1 || t->shape[i] > 1 << 24) ndim = -1;
    if (t->ndim == ndim) return t;
    char shape[96];
    tensor_shape_text(t, shape, sizeof shape);
    err_param(e, E_CONFLICT, name, "tensor '%s' has shape %s, which no network of this kind has", name, shape);
    return NULL;
}

static int count_blocks(const struct tensor_table *table, const char *prefix) {
    int most = 0;
    const char *rest;
    for (int i = 0; i < table->n; i++) {
        int number = arch_block_number(table->tensors[i].name, prefix, &rest);
        if (number >= most) most = number + 1;
    }
    return most;
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

// The design, by what conditions the first block. Shapes are left to arch_match.
static enum arch_block infer_block(const struct arch *a, const struct tensor_table *table) {
    const struct tensor *mod = tensor_find(table, "blocks.0.adaLN_modulation.1.weight");
    if (mod) return mod->ndim == 2 && mod->shape[0] == 4 * (int64_t)a->hidden_size ? BLOCK_ADALN : BLOCK_ADALN_ZERO;
    if (tensor_find(table, "blocks.0.cross_attn.q.weight")) return BLOCK_CROSS_ATTENTION;
    return tensor_find(table, "blocks.0.norm1.weight") ? BLOCK_IN_CONTEXT : BLOCK_ADALN_ZERO;
}

static int infer_decoder(struct arch *a, const struct tensor_table *table, struct err *e) {
    a->decoder.depth = count_blocks(table, "decoder_blocks.");
    if (!a->decoder.depth) return OK;
    const struct tensor *layer = need(table, "decoder_layer.linear.weight", 2, e);
    if (!layer) return E_CONFLICT;
    a->decoder.hidden_size = (int)layer->shape[0];
    a->decoder.num_heads = a->decoder.hidden_size == 512 ? 16 : arch_heads(a->decoder.hidden_size); // MaskDiT's only decoder
    return OK;
}

// A table is [classes and null, width]; a one-hot layer [width, classes]. Where both read alike the decoder decides.
static void infer_labels(struct arch *a, const struct tensor *y) {
    int64_t d = a->hidden_size;
    a->one_hot = y->shape[0] == d && (y->shape[1] != d || a->decoder.depth);
    int64_t rows = y->shape[a->one_hot ? 1 : 0];
    a->class_dropout = a->one_hot || rows > 1;
    a->num_classes = (int)(a->one_hot ? rows : rows - a->class_dropout);
}

int arch_infer(struct arch *a, const struct tensor_table *table, struct err *e) {
    *a = (struct arch){.block_embedders = tensor_find(table, "blocks.0.y_embedder.embedding_table.weight") != NULL};
    const char *labels = a->block_embedders ? "blocks.0.y_embedder.embedding_table.weight" : "y_embedder.embedding_table.weight";
    const struct tensor *x = need(table, "x_embedder.proj.weight", 4, e), *y = need(table, labels, 2, e),
                        *fc1 = need(table, "blocks.0.mlp.fc1.weight", 2, e),
                        *out = need(table, "final_layer.linear.weight", 2, e);
    if (!x || !y || !fc1 || !out) return E_CONFLICT;
    if (x->shape[2] != x->shape[3] || x->shape[2] > 256 || x->shape[1] > 1024) // what follows multiplies these
        return err_param(e, E_CONFLICT, x->name, "tensor '%s' is not a patch embedding of square patches up to 256", x->name);
    a->hidden_size = (int)x->shape[0];
    a->in_channels = (int)x->shape[1];
    a->patch_size = (int)x->shape[2];
    a->depth = count_blocks(table, "blocks.");
    a->num_heads = arch_heads(a->hidden_size);
    a->mlp_ratio = (double)fc1->shape[0] / a->hidden_size;
    a->learn_sigma = out->shape[0] == 2 * x->shape[2] * x->shape[2] * x->shape[1];
    a->block = infer_block(a, table);
    int rc = infer_decoder(a, table, e);
    if (rc == OK) infer_labels(a, y);
    if (rc == OK) rc = infer_input(a, table, e);
    return rc == OK ? arch_match(a, table, e) : rc;
}
