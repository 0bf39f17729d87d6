// SPDX-License-Identifier: MIT
// The shape of the VAE that DiT and SiT use (stabilityai/sd-vae-ft-ema and -mse).
#ifndef SITD_TESTS_PUBLISHED_VAE_H
#define SITD_TESTS_PUBLISHED_VAE_H
#include "core/io/vae_file.h"

static const struct vae_arch published_vae = {.image_channels = 3,
                                              .latent_channels = 4,
                                              .levels = 4,
                                              .layers = 2,
                                              .groups = 32,
                                              .width = {128, 256, 512, 512},
                                              .encoder = true,
                                              .decoder = true,
                                              .quant = true,
                                              .post_quant = true,
                                              .attention = {true, true}};

#endif
