// SPDX-License-Identifier: MIT
#include "core/io/folder.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/jsonio.h"

#define MAX_CONFIG ((size_t)1 << 20)
#define MAX_INDEX ((size_t)64 << 20)
#define MAX_SHARDS 1000

static int read_json(json_t **root, const char *path, size_t limit, struct err *e) {
    void *text;
    size_t n;
    if (file_read(&text, &n, path, limit, e)) return e->status;
    int rc = jsonio_parse(root, text, n, 8, 2000000, "the file", e);
    mem_free(text);
    if (rc == OK && !json_is_object(*root)) json_decref(*root), rc = err_set(e, E_FORMAT, "it is not a JSON object");
    if (rc != OK) err_prefix(e, "%s", path);
    return rc;
}

/* ---- config.json ---- */

static int add_meta(struct folder *f, const char *key, long long value, struct err *e) {
    struct meta_pair *grown = mem_resize(f->meta, (size_t)f->n_meta + 1, sizeof *grown);
    if (grown) f->meta = grown;
    char *k = mem_strdup(key), *v = mem_printf("%lld", value);
    if (grown && k && v) return f->meta[f->n_meta++] = (struct meta_pair){k, v}, OK;
    mem_free(k);
    mem_free(v);
    return err_set(e, E_NOMEM, "no memory for the model's config");
}

// A whole number of the config: its meta under our word. Absent is fine.
static int number(struct folder *f, const json_t *root, const char *theirs, const char *ours, struct err *e) {
    const json_t *v = json_object_get(root, theirs);
    if (!v || json_is_null(v)) return OK;
    if (!json_is_integer(v) || json_integer_value(v) < 1 || json_integer_value(v) > 1 << 24)
        return err_param(e, E_FORMAT, theirs, "config.json's '%s' is not a whole number from 1 to 2^24", theirs);
    return add_meta(f, ours, json_integer_value(v), e);
}

static int word(const json_t *root, const char *key, const char *wanted, const char *or_this, struct err *e) {
    const json_t *v = json_object_get(root, key);
    const char *s = json_is_string(v) ? json_string_value(v) : NULL;
    char shown[48] = "nothing";
    if (s && (strcmp(s, wanted) == 0 || (or_this && strcmp(s, or_this) == 0))) return OK;
    if (s) jsonio_printable(shown, sizeof shown, s);
    return err_param(e, E_UNSUPPORTED, key, "config.json's '%s' is %s; a DiT of diffusers has \"%s\"", key, shown, wanted);
}

static int read_config(struct folder *f, const char *path, struct err *e) {
    static const struct {
        const char *theirs, *ours;
    } numbers[] = {
        {"num_attention_heads", "num_heads"}, {"attention_head_dim", "head_dim"},     {"num_layers", "depth"},
        {"in_channels", "in_channels"},       {"out_channels", "out_channels"},       {"sample_size", "input_size"},
        {"patch_size", "patch_size"},         {"num_embeds_ada_norm", "num_classes"},
    };
    json_t *root;
    if (read_json(&root, path, MAX_CONFIG, e)) return e->status;
    int rc = word(root, "_class_name", "DiTTransformer2DModel", "Transformer2DModel", e);
    if (rc == OK) rc = word(root, "norm_type", "ada_norm_zero", NULL, e);
    if (rc == OK) rc = word(root, "activation_fn", "gelu-approximate", NULL, e);
    for (size_t i = 0; rc == OK && i < sizeof numbers / sizeof *numbers; i++)
        rc = number(f, root, numbers[i].theirs, numbers[i].ours, e);
    json_decref(root);
    if (rc != OK) err_prefix(e, "%s", path);
    return rc;
}

static long long said(const struct folder *f, const char *key) { // 0: nothing
    long long v = 0;
    for (int i = 0; i < f->n_meta; i++)
        if (strcmp(f->meta[i].key, key) == 0) sscanf(f->meta[i].value, "%lld", &v);
    return v;
}

int folder_check(const struct folder *f, const struct tensor_table *settled, struct err *e) {
    struct arch a;
    if (arch_infer(&a, settled, e)) return e->status;
    struct {
        const char *key;
        int *is;
    } fields[] = {{"depth", &a.depth},
                  {"in_channels", &a.in_channels},
                  {"patch_size", &a.patch_size},
                  {"num_classes", &a.num_classes},
                  {"input_size", &a.input_size}};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (said(f, fields[i].key)) *fields[i].is = (int)said(f, fields[i].key);
    if (said(f, "num_heads") && said(f, "head_dim")) a.hidden_size = (int)(said(f, "num_heads") * said(f, "head_dim"));
    if (said(f, "out_channels")) a.learn_sigma = said(f, "out_channels") == 2LL * a.in_channels;
    if (arch_match(&a, settled, e)) return err_prefix(e, "config.json contradicts the weights");
    long long out = said(f, "out_channels");
    if (out && out != a.in_channels && !a.learn_sigma)
        return err_param(e, E_UNSUPPORTED, "out_channels",
                         "config.json's 'out_channels' is %lld; it is in_channels or twice that in a DiT", out);
    return OK;
}

/* ---- weights ---- */

static bool plain_name(const char *s) {
    return s[0] && s[0] != '.' && strlen(s) < 200 && !strchr(s, '/') && !strchr(s, '\\') && jsonio_plain(s, strlen(s));
}

static int open_shard(struct folder *f, const char *path, struct err *e) {
    struct checkpoint *grown = mem_resize(f->shards, (size_t)f->n_shards + 1, sizeof *grown);
    if (!grown) return err_set(e, E_NOMEM, "no memory for a list of files");
    f->shards = grown;
    if (checkpoint_open_raw(&grown[f->n_shards], path, e)) return e->status;
    f->n_shards++;
    return OK;
}

// Opens each file that an index's weight_map names, once.
static int open_indexed(struct folder *f, const char *dir, const json_t *map, struct err *e) {
    json_t *files = json_object(), *v;
    const char *tensor, *file;
    int rc = files ? OK : err_set(e, E_NOMEM, "no memory for a list of files");
    if (rc == OK && json_object_size(map) == 0) rc = err_param(e, E_FORMAT, "weight_map", "weight_map names no file");
    json_object_foreach((json_t *)map, tensor, v) {
        if (rc != OK) break;
        const char *name = json_is_string(v) ? json_string_value(v) : "";
        if (!plain_name(name))
            rc = err_param(e, E_FORMAT, "weight_map", "weight_map names a file that is not a plain name in the same folder");
        else if (json_object_set_new(files, name, json_true()) != 0) rc = err_set(e, E_NOMEM, "no memory for a list of files");
        else if (json_object_size(files) > MAX_SHARDS)
            rc = err_param(e, E_RANGE, "weight_map", "weight_map names more than %d files", MAX_SHARDS);
    }
    json_object_foreach(files, file, v) {
        if (rc != OK) break;
        char *path = mem_printf("%s/%s", dir, file);
        rc = path ? open_shard(f, path, e) : err_set(e, E_NOMEM, "no memory for a path");
        mem_free(path);
    }
    json_decref(files);
    return rc;
}

static int open_index(struct folder *f, const char *dir, const char *path, struct err *e) {
    json_t *root;
    if (read_json(&root, path, MAX_INDEX, e)) return e->status;
    const json_t *map = json_object_get(root, "weight_map");
    int rc = json_is_object(map) ? open_indexed(f, dir, map, e)
                                 : err_param(e, E_FORMAT, "weight_map", "its 'weight_map' is missing or no object");
    if (rc != OK) err_prefix(e, "%s", path);
    json_decref(root);
    return rc;
}

static int open_weights(struct folder *f, const char *dir, struct err *e) {
    static const char *const endings[] = {"safetensors", "safetensors.index.json", "bin", "bin.index.json"};
    for (int i = 0; i < 4; i++) {
        char *path = mem_printf("%s/diffusion_pytorch_model.%s", dir, endings[i]);
        if (!path) return err_set(e, E_NOMEM, "no memory for a path");
        bool there = access(path, F_OK) == 0;
        int rc = !there ? OK : i % 2 ? open_index(f, dir, path, e) : open_shard(f, path, e);
        mem_free(path);
        if (there) return rc;
    }
    return err_set(e, E_NOTFOUND, "%s: there is no diffusion_pytorch_model.safetensors or .bin in it, nor an index of one", dir);
}

static int gather(struct folder *f, struct err *e) {
    int n = 0;
    for (int i = 0; i < f->n_shards; i++) n += f->shards[i].table.n;
    f->table.tensors = mem_array((size_t)n, sizeof *f->table.tensors);
    if (!f->table.tensors) return err_set(e, E_NOMEM, "no memory for %d tensors", n);
    for (int i = 0; i < f->n_shards; i++) {
        memcpy(f->table.tensors + f->table.n, f->shards[i].table.tensors,
               (size_t)f->shards[i].table.n * sizeof *f->table.tensors);
        f->table.n += f->shards[i].table.n;
    }
    return OK;
}

int folder_open(struct folder *f, const char *dir, struct err *e) {
    *f = (struct folder){0};
    char *below = mem_printf("%s/transformer", dir), *at = below, *config = NULL;
    if (!below) return err_set(e, E_NOMEM, "no memory for a path");
    if (access(below, F_OK) != 0) snprintf(at, strlen(at) + 1, "%s", dir);
    config = mem_printf("%s/config.json", at);
    int rc = config ? OK : err_set(e, E_NOMEM, "no memory for a path");
    if (rc == OK && access(config, F_OK) != 0)
        rc = err_set(e, E_NOTFOUND, "%s is no diffusers folder (config.json or transformer/config.json); of a model directory name the weights file in it",
                     dir);
    if (rc == OK) rc = read_config(f, config, e);
    if (rc == OK) rc = open_weights(f, at, e);
    if (rc == OK) rc = gather(f, e);
    mem_free(config);
    mem_free(below);
    return rc;
}

void folder_close(struct folder *f) {
    for (int i = 0; i < f->n_shards; i++) checkpoint_close(&f->shards[i]);
    for (int i = 0; i < f->n_meta; i++) mem_free(f->meta[i].key), mem_free(f->meta[i].value);
    mem_free(f->shards);
    mem_free(f->meta);
    mem_free(f->table.tensors);
    *f = (struct folder){0};
}
