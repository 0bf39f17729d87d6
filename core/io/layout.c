// SPDX-License-Identifier: MIT
/*
 * layout: one network, several spellings.
 *
 * Prefixes: "module." is left by DataParallel and DDP, "_orig_mod." by torch.compile, in any nesting; they are always taken off.
 * "model." is MaskDiT's EDMPrecond wrapper and "student." what a file that also holds a teacher may use: they go when the
 * network's first layer has them.
 *
 * diffusers (DiTTransformer2DModel; models-and-math 8.1) cuts the same weights differently: q, k and v are three layers, and
 * every block carries an embedder of timestep and label of its own. Those are copies of one in everything converted from the
 * authors' files, and then become one again; where they differ (a model trained in diffusers) they stay as blocks.N.t_embedder
 * and blocks.N.y_embedder. The final layer uses block 0's.
 */
#include "core/io/layout.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"

/* ---- prefixes ---- */

static bool skip(const char **name, const char *prefix) {
    size_t n = strlen(prefix);
    if (strncmp(*name, prefix, n) != 0) return false;
    *name += n;
    return true;
}

static const char *bare_name(const char *name, const char *wrapper) {
    while (skip(&name, "module.") || skip(&name, "_orig_mod.")) {}
    if (wrapper && skip(&name, wrapper))
        while (skip(&name, "module.") || skip(&name, "_orig_mod.")) {}
    return name;
}

// The wrapper that holds the network, if one does.
static const char *find_wrapper(const struct tensor_table *table) {
    static const char *const wrappers[] = {"model.", "student."};
    for (size_t w = 0; w < sizeof wrappers / sizeof *wrappers; w++)
        for (int i = 0; i < table->n; i++) {
            const char *name = table->tensors[i].name, *bare = bare_name(name, wrappers[w]);
            if (strcmp(bare, "x_embedder.proj.weight") == 0 && bare_name(name, NULL) != bare) return wrappers[w];
        }
    return NULL;
}

static int by_name(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

static int refuse_twins(const struct tensor_table *table, struct err *e) {
    const char **names = mem_array((size_t)table->n, sizeof *names);
    if (!names) return err_set(e, E_NOMEM, "no memory for %d names", table->n);
    for (int i = 0; i < table->n; i++) names[i] = table->tensors[i].name;
    if (table->n) qsort(names, (size_t)table->n, sizeof *names, by_name);
    int rc = OK;
    for (int i = 1; i < table->n && rc == OK; i++)
        if (strcmp(names[i - 1], names[i]) == 0)
            rc = err_param(e, E_FORMAT, names[i], "tensor '%s' appears twice once prefixes like 'module.' are taken off",
                           names[i]);
    mem_free(names);
    return rc;
}

/* ---- diffusers ---- */

static const struct {
    const char *theirs, *ours;
} outer[] = {
    // whole names
    {"pos_embed.proj.weight", "x_embedder.proj.weight"},
    {"pos_embed.proj.bias", "x_embedder.proj.bias"},
    {"proj_out_1.weight", "final_layer.adaLN_modulation.1.weight"},
    {"proj_out_1.bias", "final_layer.adaLN_modulation.1.bias"},
    {"proj_out_2.weight", "final_layer.linear.weight"},
    {"proj_out_2.bias", "final_layer.linear.bias"},
};
static const struct {
    const char *theirs, *ours;
} inner[] = {
    // below transformer_blocks.N., before ".weight" or ".bias"
    {"norm1.emb.timestep_embedder.linear_1", "t_embedder.mlp.0"},
    {"norm1.emb.timestep_embedder.linear_2", "t_embedder.mlp.2"},
    {"norm1.emb.class_embedder.embedding_table", "y_embedder.embedding_table"},
    {"norm1.linear", "adaLN_modulation.1"},
    {"attn1.to_q", "attn.q"}, // merged below
    {"attn1.to_k", "attn.k"},
    {"attn1.to_v", "attn.v"},
    {"attn1.to_out.0", "attn.proj"},
    {"ff.net.0.proj", "mlp.fc1"},
    {"ff.net.2", "mlp.fc2"},
};
#define COUNT(a) (sizeof(a) / sizeof *(a))

static int own(struct layout *l, void *p, struct err *e) {
    void **grown = p ? mem_resize(l->owned, (size_t)l->n_owned + 1, sizeof *grown) : NULL;
    if (!grown) {
        mem_free(p);
        return err_set(e, E_NOMEM, "no memory to rename tensors");
    }
    l->owned = grown;
    l->owned[l->n_owned++] = p;
    return OK;
}

// "12.rest" -> number 12, *rest behind the dot; -1 when it is not of that form
static int leading_number(const char *s, const char **rest) {
    int v = 0, digits = 0;
    for (; s[digits] >= '0' && s[digits] <= '9' && digits < 5; digits++) v = v * 10 + (s[digits] - '0');
    if (!digits || s[digits] != '.' || (s[0] == '0' && digits > 1)) return -1;
    *rest = s + digits + 1;
    return v;
}

static int rename_inner(struct layout *l, struct tensor *t, const char *below, struct err *e) {
    const char *rest;
    int block = leading_number(below, &rest);
    for (size_t i = 0; block >= 0 && i < COUNT(inner); i++) {
        size_t n = strlen(inner[i].theirs);
        if (strncmp(rest, inner[i].theirs, n) != 0 || (strcmp(rest + n, ".weight") != 0 && strcmp(rest + n, ".bias") != 0))
            continue;
        char *name = mem_printf("blocks.%d.%s%s", block, inner[i].ours, rest + n);
        t->name = name ? name : t->name;
        return own(l, name, e);
    }
    return err_param(e, E_CONFLICT, t->name, "tensor '%s' has no place in diffusers' DiT", t->name);
}

static int rename_diffusers(struct layout *l, struct tensor_table *table, struct err *e) {
    for (int i = 0; i < table->n; i++) {
        struct tensor *t = &table->tensors[i];
        const char *below = t->name;
        size_t k = 0;
        while (k < COUNT(outer) && strcmp(t->name, outer[k].theirs) != 0) k++;
        if (k < COUNT(outer)) t->name = outer[k].ours;
        else if (!skip(&below, "transformer_blocks."))
            return err_param(e, E_CONFLICT, t->name, "tensor '%s' has no place in diffusers' DiT", t->name);
        else if (rename_inner(l, t, below, e)) return e->status;
    }
    return OK;
}

static struct tensor *find(struct tensor_table *table, int block, const char *name) {
    char whole[96];
    snprintf(whole, sizeof whole, "blocks.%d.%s", block, name);
    return (struct tensor *)tensor_find(table, whole);
}

static void drop(struct tensor_table *table, struct tensor *t) { *t = table->tensors[--table->n]; }

// q, k and v of one block, weights or biases, become the three thirds of one tensor, which takes q's place.
static int merge_qkv(struct layout *l, struct tensor_table *table, int block, const char *kind, struct err *e) {
    static const char *const letters[] = {"q", "k", "v"};
    struct tensor *part[3];
    size_t bytes = 0, count = 0;
    for (int i = 0; i < 3; i++) {
        char name[32];
        snprintf(name, sizeof name, "attn.%s.%s", letters[i], kind);
        if (!(part[i] = find(table, block, name)))
            return err_param(e, E_CONFLICT, name, "tensor 'transformer_blocks.%d.attn1.to_%s.%s' is missing", block, letters[i],
                             kind);
        if (part[i]->dtype != part[0]->dtype || !tensor_shape_is(part[i], part[0]->ndim, part[0]->shape) || part[0]->ndim < 1)
            return err_param(e, E_CONFLICT, part[i]->name, "tensor '%s' differs from its block's query in shape or dtype",
                             part[i]->name);
        if (part[i]->shape[0] < 0 || part[i]->shape[0] > 1 << 24)
            return err_param(e, E_RANGE, part[i]->name, "tensor '%s' is too large", part[i]->name);
        if (add_overflows(bytes, part[i]->bytes, &bytes))
            return err_param(e, E_RANGE, part[i]->name, "tensor '%s' is too large", part[i]->name);
        count += part[i]->count;
    }
    char *data = mem_alloc(bytes), *name = mem_printf("blocks.%d.attn.qkv.%s", block, kind), *at = data;
    int rc = own(l, data, e), rc_name = own(l, name, e);
    if (rc || rc_name) return E_NOMEM;
    for (int i = 0; i < 3; at += part[i++]->bytes)
        if (part[i]->bytes) memcpy(at, part[i]->data, part[i]->bytes);
    part[0]->name = name, part[0]->data = data, part[0]->bytes = bytes, part[0]->count = count;
    part[0]->shape[0] *= 3;
    for (int i = 1; i < 3; i++) { // dropping one moves another
        char gone[32];
        snprintf(gone, sizeof gone, "attn.%s.%s", letters[i], kind);
        drop(table, find(table, block, gone));
    }
    return OK;
}

static const char *const embedder[] = {"t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight",
                                       "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight"};

static bool same(const struct tensor *a, const struct tensor *b) {
    return a && b && a->dtype == b->dtype && tensor_shape_is(a, b->ndim, b->shape) && a->bytes == b->bytes &&
           memcmp(a->data, b->data, a->bytes) == 0;
}

static bool embedders_are_copies(struct tensor_table *table, int blocks) {
    for (size_t i = 0; i < COUNT(embedder); i++)
        for (int b = 0; b < blocks; b++)
            if (!same(find(table, b, embedder[i]), find(table, 0, embedder[i]))) return false;
    return true;
}

static int unite_embedders(struct layout *l, struct tensor_table *table, int blocks, struct err *e) {
    if (!embedders_are_copies(table, blocks)) return OK;
    for (size_t i = 0; i < COUNT(embedder); i++) {
        for (int b = 1; b < blocks; b++) drop(table, find(table, b, embedder[i]));
        char *name = mem_strdup(embedder[i]);
        if (own(l, name, e)) return E_NOMEM;
        find(table, 0, embedder[i])->name = name;
    }
    return OK;
}

static int settle_diffusers(struct layout *l, struct tensor_table *table, struct err *e) {
    int blocks = 0;
    const char *rest;
    l->name = "diffusers";
    if (rename_diffusers(l, table, e)) return e->status;
    for (int i = 0; i < table->n; i++) {
        const char *below = table->tensors[i].name;
        int b = skip(&below, "blocks.") ? leading_number(below, &rest) : -1;
        if (b >= blocks) blocks = b + 1;
    }
    if (blocks > 1024) return err_set(e, E_RANGE, "%d blocks are more than 1024", blocks);
    for (int b = 0; b < blocks; b++)
        if (merge_qkv(l, table, b, "weight", e) || merge_qkv(l, table, b, "bias", e)) return e->status;
    return unite_embedders(l, table, blocks, e);
}

int layout_settle(struct layout *l, struct tensor_table *table, struct err *e) {
    struct err local = {0};
    if (!e) e = &local;
    l->name = "";
    const char *wrapper = find_wrapper(table);
    for (int i = 0; i < table->n; i++) table->tensors[i].name = bare_name(table->tensors[i].name, wrapper);
    int rc = refuse_twins(table, e);
    if (rc == OK && tensor_find(table, "transformer_blocks.0.attn1.to_q.weight")) rc = settle_diffusers(l, table, e);
    return rc;
}

void layout_free(struct layout *l) {
    for (int i = 0; i < l->n_owned; i++) mem_free(l->owned[i]);
    mem_free(l->owned);
    *l = (struct layout){0};
}
