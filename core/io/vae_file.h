// SPDX-License-Identifier: MIT
/*
 * vae_file: the weights of an AutoencoderKL (Rombach et al. 2022; models-and-math 7) under one set of names, whoever wrote them.
 *
 * Read are diffusers' folders and files (new and old names of the attention), CompVis' files (1x1 convolutions in the attention,
 * levels of the decoder counted from full resolution), and either inside a whole Stable Diffusion checkpoint (prefixes
 * "first_stage_model." and "vae."); .safetensors, .pt, .bin, .pth, .ckpt. Every size comes from the tensors; what no tensor tells
 * (groups of the norms, scale of the latents) from config.json, else the published value. Thread: any (no globals).
 */
#ifndef SITD_VAE_FILE_H
#define SITD_VAE_FILE_H
#include "core/io/checkpoint.h"

#define VAE_MAX_LEVELS 8

struct vae_arch {
    int image_channels, latent_channels;
    int levels, layers, groups; // resolutions; residual blocks a level of the encoder (the decoder has one more); of the norms
    int width[VAE_MAX_LEVELS];  // channels at full resolution, half, quarter, ...
    bool encoder, decoder;      // halves that the file holds
    bool quant, post_quant;     // the 1x1 convolutions round the latents
    bool attention[2];          // in the middle of encoder and decoder
};
static inline int vae_factor(const struct vae_arch *a) { return 1 << (a->levels - 1); } // pixels a latent, each way

struct vae_file {
    struct vae_arch arch;
    struct tensor_table table; // diffusers' new names; attention weights [C, C] or [C, C, 1, 1]
    double scale, shift;       // config.json's: latent = (z - shift)*scale. 0.18215 and 0 where it says nothing
    struct checkpoint ck;      // PRIVATE
    char *names;               // PRIVATE
};
// path: a file, or a folder with diffusion_pytorch_model.safetensors or .bin and config.json, or one that has such a folder
// "vae". sha256: of the weights file, NULL: any. Every tensor is there once, with its shape and a float type, or the error names
// it (E_CONFLICT). E_NOTFOUND, E_FORMAT, E_UNSUPPORTED (config.json describes another network). On failure nothing is left to
// close.
int vae_file_open(struct vae_file *, const char *path, const char *sha256, struct err *);
void vae_file_close(struct vae_file *);

/* vae_keys.c: the list of tensors */
struct vae_unit {                        // a layer: NAME.weight and NAME.bias
    char name[96], old[96], compvis[96]; // diffusers, its old spelling (or ""), CompVis
    int out, in, side; // convolution [out, in, side, side]; side 0: a norm [out]; side -1: attention [out, in] or 1x1
};
typedef int vae_unit_fn(void *ctx, const struct vae_unit *);
int vae_walk(const struct vae_arch *, vae_unit_fn *, void *ctx); // stops at the first result that is not 0 and returns it
// Sizes from a checkpoint's tensors; groups is left as it is. *prefix (borrowed, constant) is what its names begin with.
int vae_infer(struct vae_arch *, const char **prefix, const struct tensor_table *, struct err *);
// Fills f->table and f->names from the checkpoint's tensors.
int vae_match(struct vae_file *, const struct tensor_table *, const char *prefix, struct err *);

struct vae_weights {
    struct tensor_table table;
    void *priv;
};
// Random weights of that shape, N(0, 1/fan-in) in the convolutions, norms near 1: for benchmarks and tests of any size.
int vae_random(struct vae_weights *, const struct vae_arch *, uint64_t seed, struct err *);
void vae_weights_free(struct vae_weights *);

#endif
