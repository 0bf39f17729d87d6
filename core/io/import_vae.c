// SPDX-License-Identifier: MIT
/*
 * The VAE goes into a folder whose name holds part of its digest, so that the one that an older model.json names is never written
 * over. It is read twice by the writer: once for the digest, once to be written.
 */
#include "core/io/import.h"

#include <jansson.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/safetensors.h"

#define WEIGHTS "diffusion_pytorch_model.safetensors"

static int hash_sink(void *ctx, const void *bytes, size_t n, struct err *e) {
    return EVP_DigestUpdate(ctx, bytes, n) == 1 ? OK : err_set(e, E_NOMEM, "cannot hash the VAE");
}

static int hash(char hex[DIGEST_HEX], const struct tensor_table *t, struct err *e) {
    unsigned char sha[EVP_MAX_MD_SIZE];
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    int rc = ctx && EVP_DigestInit_ex(ctx, EVP_sha256(), NULL) == 1 ? OK : err_set(e, E_NOMEM, "cannot hash the VAE");
    if (rc == OK) rc = safetensors_write(t, NULL, 0, hash_sink, ctx, e);
    if (rc == OK && EVP_DigestFinal_ex(ctx, sha, NULL) != 1) rc = err_set(e, E_NOMEM, "cannot hash the VAE");
    if (rc == OK) digest_print(hex, sha);
    EVP_MD_CTX_free(ctx);
    return rc;
}

static int write_sink(void *ctx, const void *bytes, size_t n, struct err *e) { return file_out_write(ctx, bytes, n, e); }

static int write_tensors(const char *folder, const struct tensor_table *t, struct err *e) {
    struct file_out out;
    char *path = mem_printf("%s/" WEIGHTS, folder);
    int rc = path ? file_out_open(&out, path, e) : err_set(e, E_NOMEM, "no memory for a path");
    mem_free(path);
    if (rc != OK) return rc;
    rc = safetensors_write(t, NULL, 0, write_sink, &out, e);
    if (rc == OK) return file_out_commit(&out, NULL, e);
    file_out_abort(&out);
    return rc;
}

static int write_config(const char *folder, const struct vae_file *f, struct err *e) { // what the tensors do not tell
    json_t *root = json_pack("{s:s, s:i, s:f, s:f}", "_class_name", "AutoencoderKL", "norm_num_groups", f->arch.groups,
                             "scaling_factor", f->scale, "shift_factor", f->shift);
    char *text = root ? json_dumps(root, JSON_INDENT(2)) : NULL, *path = mem_printf("%s/config.json", folder);
    int rc = text && path ? file_write(path, text, strlen(text), e) : err_set(e, E_NOMEM, "no memory for config.json");
    free(text);
    mem_free(path);
    json_decref(root);
    return rc;
}

int import_vae(struct model_desc *d, const char *dir, const struct vae_file *f, struct err *e) {
    int rc = OK;
    if (!f->arch.decoder) return err_param(e, E_CONFLICT, "--vae", "the VAE has no decoder");
    if (f->arch.latent_channels != d->arch.in_channels)
        return err_param(e, E_CONFLICT, "--vae", "the VAE has latents of %d channels, the network %d", f->arch.latent_channels,
                         d->arch.in_channels);
    for (int i = 0; i < f->table.n && rc == OK; i++) rc = tensor_check_finite(&f->table.tensors[i], e);
    if (rc == OK) rc = hash(d->latent.vae_sha256, &f->table, e);
    if (rc != OK) return rc;
    snprintf(d->latent.vae_file, sizeof d->latent.vae_file, "vae-%.8s", d->latent.vae_sha256);
    char *folder = mem_printf("%s/%s", dir, d->latent.vae_file);
    rc = folder ? file_make_dir(folder, e) : err_set(e, E_NOMEM, "no memory for a path");
    if (rc == OK) rc = write_config(folder, f, e);
    if (rc == OK) rc = write_tensors(folder, &f->table, e);
    mem_free(folder);
    return rc;
}
