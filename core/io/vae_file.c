// SPDX-License-Identifier: MIT
#include "core/io/vae_file.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/jsonio.h"

#define MAX_CONFIG ((size_t)1 << 20)
#define MAX_WEIGHTS ((size_t)64 << 30)
#define PUBLISHED_GROUPS 32
#define PUBLISHED_SCALE 0.18215

static bool is_folder(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

static bool is_file(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

/* ---- config.json ---- */

struct config {
    json_t *root; // NULL: there is none
    const char *path;
    struct err *e;
};

static int refuse(const struct config *c, int status, const char *key, const char *why) {
    return err_param(c->e, status, key, "%s: '%s' %s", c->path, key, why);
}

static int number(const struct config *c, const char *key, double *out) {
    json_t *v = json_object_get(c->root, key);
    if (!v || json_is_null(v)) return OK;
    if (!json_is_number(v) || !isfinite(json_number_value(v))) return refuse(c, E_FORMAT, key, "must be a number");
    *out = json_number_value(v);
    return OK;
}

static int text_is(const struct config *c, const char *key, const char *want) {
    json_t *v = json_object_get(c->root, key);
    if (!v || (json_is_string(v) && strcmp(json_string_value(v), want) == 0)) return OK;
    char why[96];
    snprintf(why, sizeof why, "must be \"%s\": sitd reads no other autoencoder", want);
    return refuse(c, E_UNSUPPORTED, key, why);
}

static int same(const struct config *c, const char *key, int is) {
    double v = is;
    char why[96];
    if (number(c, key, &v) != OK) return E_FORMAT;
    if (v == is) return OK;
    snprintf(why, sizeof why, "is %g, the tensors say %d", v, is);
    return refuse(c, E_CONFLICT, key, why);
}

static int same_widths(const struct config *c, const struct vae_arch *a) {
    json_t *v = json_object_get(c->root, "block_out_channels");
    if (!v) return OK;
    bool equal = json_array_size(v) == (size_t)a->levels;
    for (int l = 0; equal && l < a->levels; l++) equal = json_integer_value(json_array_get(v, (size_t)l)) == a->width[l];
    return equal ? OK : refuse(c, E_CONFLICT, "block_out_channels", "is not what the tensors say");
}

static int read_config(struct vae_file *f, const struct config *c) {
    double groups = PUBLISHED_GROUPS;
    int rc = text_is(c, "_class_name", "AutoencoderKL");
    if (rc == OK) rc = text_is(c, "act_fn", "silu");
    if (rc == OK) rc = number(c, "norm_num_groups", &groups);
    if (rc == OK && !(groups >= 1 && groups <= 65536 && groups == floor(groups)))
        rc = refuse(c, E_RANGE, "norm_num_groups", "must be 1 or more");
    if (rc == OK) rc = number(c, "scaling_factor", &f->scale);
    if (rc == OK && !(f->scale > 0)) rc = refuse(c, E_RANGE, "scaling_factor", "must be more than 0");
    if (rc == OK) rc = number(c, "shift_factor", &f->shift);
    if (rc == OK) rc = same(c, "latent_channels", f->arch.latent_channels);
    if (rc == OK && f->arch.decoder) rc = same(c, "out_channels", f->arch.image_channels);
    if (rc == OK && f->arch.encoder) rc = same(c, "in_channels", f->arch.image_channels);
    if (rc == OK) rc = same(c, "layers_per_block", f->arch.layers);
    if (rc == OK) rc = same_widths(c, &f->arch);
    f->arch.groups = (int)groups;
    return rc;
}

// config.json beside the weights, if it is there (and, beside a file that was named itself, if it describes an autoencoder)
static int load_config(struct vae_file *f, const char *folder, bool named, struct err *e) {
    char *path = mem_printf("%s/config.json", folder);
    struct config c = {.path = path, .e = e};
    void *text = NULL;
    size_t n = 0;
    int rc = path ? OK : err_set(e, E_NOMEM, "no memory for a path");
    if (rc == OK && is_file(path)) rc = file_read(&text, &n, path, MAX_CONFIG, e);
    if (rc == OK && text && (rc = jsonio_parse(&c.root, text, n, 16, 10000, "config.json", e)) != OK) err_prefix(e, "%s", path);
    const char *class = json_string_value(json_object_get(c.root, "_class_name"));
    bool foreign = named && (!class || strcmp(class, "AutoencoderKL") != 0);
    if (rc == OK && c.root && !foreign) rc = read_config(f, &c);
    for (int l = 0; rc == OK && l < f->arch.levels; l++)
        if (f->arch.width[l] % f->arch.groups)
            rc = err_param(e, E_CONFLICT, "norm_num_groups", "%s: %d channels do not fall into %d groups%s", folder,
                           f->arch.width[l], f->arch.groups, c.root ? "" : "; config.json with norm_num_groups is missing");
    json_decref(c.root);
    mem_free(text);
    mem_free(path);
    return rc;
}

/* ---- opening ---- */

// The weights file that path means, and the folder it lies in. Both are the caller's.
static int locate(const char *path, char **file, char **folder, struct err *e) {
    static const char *const names[] = {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
                                        "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"};
    *file = *folder = NULL;
    if (!is_folder(path)) *file = mem_strdup(path);
    for (size_t i = 0; !*file && i < sizeof names / sizeof *names; i++) {
        char *there = mem_printf("%s/%s", path, names[i]);
        if (!there) return err_set(e, E_NOMEM, "no memory for a path");
        if (is_file(there)) *file = there;
        else mem_free(there);
    }
    if (!*file && is_folder(path))
        return err_set(e, E_NOTFOUND, "%s: neither %s nor %s is in it, nor in its folder vae", path, names[0], names[1]);
    const char *slash = *file ? strrchr(*file, '/') : NULL;
    *folder = !*file ? NULL : slash ? mem_strndup(*file, (size_t)(slash - *file)) : mem_strdup(".");
    return *folder ? OK : err_set(e, E_NOMEM, "no memory for a path");
}

static int check_digest(const void *bytes, size_t n, const char *sha256, struct err *e) {
    char hex[DIGEST_HEX];
    if (!sha256) return OK;
    if (digest_hex(hex, bytes, n) != OK) return err_set(e, E_NOMEM, "no memory to hash it");
    return strcmp(hex, sha256) == 0 ? OK
                                    : err_param(e, E_CONFLICT, "latent.vae.sha256", "its SHA-256 is %s, not %s", hex, sha256);
}

static int read_weights(struct vae_file *f, const char *file, const char *sha256, struct err *e) {
    void *bytes;
    size_t n;
    const char *prefix;
    int rc = file_read(&bytes, &n, file, MAX_WEIGHTS, e);
    if (rc != OK) return rc;
    rc = check_digest(bytes, n, sha256, e);
    if (rc != OK) {
        mem_free(bytes);
        return err_prefix(e, "%s", file), rc;
    }
    rc = checkpoint_parse(&f->ck, bytes, n, file, e);
    if (rc != OK) return mem_free(bytes), rc;
    f->ck.bytes = bytes;
    rc = vae_infer(&f->arch, &prefix, &f->ck.table, e);
    if (rc == OK) rc = vae_match(f, &f->ck.table, prefix, e);
    if (rc != OK) err_prefix(e, "%s", file);
    return rc;
}

int vae_file_open(struct vae_file *f, const char *path, const char *sha256, struct err *e) {
    char *file, *folder;
    *f = (struct vae_file){.scale = PUBLISHED_SCALE, .arch.groups = PUBLISHED_GROUPS};
    int rc = locate(path, &file, &folder, e);
    if (rc == OK) rc = read_weights(f, file, sha256, e);
    if (rc == OK) rc = load_config(f, folder, !is_folder(path), e);
    mem_free(file);
    mem_free(folder);
    if (rc != OK) vae_file_close(f);
    return rc;
}

void vae_file_close(struct vae_file *f) {
    mem_free(f->table.tensors);
    mem_free(f->names);
    checkpoint_close(&f->ck);
    *f = (struct vae_file){0};
}
