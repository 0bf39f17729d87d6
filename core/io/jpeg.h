// SPDX-License-Identifier: MIT
/*
 * jpeg: JPEG bytes to pixels. libjpeg-turbo. Thread: any.
 */
#ifndef SITD_JPEG_H
#define SITD_JPEG_H
#include <stddef.h>
#include <stdint.h>

#include "core/base/err.h"

// 8-bit grey or RGB (YCCK and CMYK become RGB), *pixels the caller's (mem_free). Limits as png_decode: 16384 a side, 64 Mpixel,
// looked at before anything is decoded. A file that ends early is refused, though libjpeg would fill it up with grey. E_FORMAT,
// E_NOMEM.
int jpeg_decode(uint8_t **pixels, int *width, int *height, int *channels, const void *bytes, size_t size, struct err *);

#endif
