// SPDX-License-Identifier: MIT
/*
 * vae: the AutoencoderKL network, decode and encode, one picture at a time or, on a GPU, a few together (Rombach et al. 2022, sec. G; models-and-math 7).
 *
 * Work is cut into slices: vae_start takes an input, vae_step does some of it, as often as the caller likes, until it says that
 * it is done. A slice is whole strips of one layer, so a picture does not depend on how its work was cut, nor on the threads, nor
 * on other pictures. Pictures and latents are planar [C, H, W] here; units of latents are the network's own (z), not the
 * diffusion model's.
 *
 * Memory: the weights, and three pictures of activations whose largest is full resolution times the wider of the last two widths:
 * 128 MiB at 256 pixels for the published sizes, 512 MiB at 512; in bfloat16
 * half of that; times vae_pictures. Norms need whole pictures, so
 * activations cannot be cut without seams; nothing else grows with the picture (attention and convolutions work through strips of
 * fixed size). Thread: a vae belongs to the thread that owns its kern. Steps allocate nothing.
 */
#ifndef SITD_VAE_H
#define SITD_VAE_H
#include "core/io/vae_file.h"
#include "kernels/kern.h"

struct vae;
enum vae_way { VAE_DECODE, VAE_ENCODE };
struct vae_size {
    int height, width;
    bool decode, encode;
}; // of the latents; the halves to make

// Makes the network from a table (vae_file's names). The table may be freed afterwards. Weights must be finite. E_CONFLICT
// (err.param "width",
// ...) where a half is not in the file, E_RANGE for a size that cannot be, E_NOMEM.
int vae_new(struct vae **, struct kern *, const struct vae_arch *, const struct tensor_table *, const struct vae_size *,
            struct err *);
void vae_free(struct vae *); // NULL is fine

// Begins n pictures, 1 .. vae_pictures. in: z [n, latent_channels, height, width], or pixels [n, image_channels, height*factor,
// width*factor], not kept. A picture does not depend on its company.
int vae_start(struct vae *, enum vae_way, const float *in, int n, struct err *);
int vae_pictures(const struct vae *); // how many the back end wants together, as many as vae_start takes
// Does about `flops` of work. 1: there is more to do, 0: done, or a failure.
int vae_step(struct vae *, double flops, struct err *);
// After the last step. decode: out [n, image_channels, H, W], nominally -1..1. encode: [n, 2, latent_channels, h, w], mean and log
// variance (clamped to -30..20). Values are not checked.
int vae_read(struct vae *, float *out, struct err *);
// All of it at once, for one picture
int vae_run(struct vae *, enum vae_way, const float *in, float *out, struct err *);

size_t vae_numel(const struct vae *, enum vae_way); // floats that vae_read gives: of a picture, of the moments
double vae_flops(const struct vae *,
                 enum vae_way);       // of one picture (2 x MAC, as the network is written; upsampling is done with fewer)
size_t vae_bytes(const struct vae *); // memory held on the back end

#endif
