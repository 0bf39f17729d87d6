// SPDX-License-Identifier: MIT
/*
 * resize: pictures made smaller as the Python Imaging Library makes them, and ADM's way of cutting a square out of one. Thread:
 * any.
 */
#ifndef SITD_RESIZE_H
#define SITD_RESIZE_H
#include <stdint.h>

#include "core/base/err.h"

enum resize_filter { RESIZE_BOX, RESIZE_BICUBIC };
// dst [to_h, to_w, channels] from src [h, w, channels], 8 bits: two passes, across then down, rounded to 8 bits after each,
// weights in 22-bit fixed point (Pillow, Resample.c). E_NOMEM.
int resize_picture(uint8_t *dst, int to_w, int to_h, const uint8_t *src, int w, int h, int channels, enum resize_filter,
                   struct err *);
// dst [size, size, channels]: halved by box while the shorter side is at least twice `size`, then by bicubic until it is `size`,
// then the middle (guided-diffusion image_datasets.py, center_crop_arr; DiT and SiT train.py). E_RANGE: so long and thin that
// what is cut would be of more than 64 megapixels. E_NOMEM.
int resize_center_crop(uint8_t *dst, int size, const uint8_t *src, int w, int h, int channels, struct err *);

#endif
