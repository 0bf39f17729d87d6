// SPDX-License-Identifier: MIT
/*
 * png: pixels to PNG bytes, with iTXt entries. libpng. Thread: any.
 */
#ifndef SITD_PNG_H
#define SITD_PNG_H
#include <stddef.h>
#include <stdint.h>

#include "core/base/err.h"

struct png_text {
    const char *key, *value;
}; // UTF-8; key 1..79 bytes Latin-1
// channels 1 (grey) or 3 (RGB), 8 bits. level 0..9. *out is the caller's (mem_free).
int png_encode(uint8_t **out, size_t *size, const uint8_t *pixels, int width, int height, int channels, int level,
               const struct png_text *, int n_text, struct err *);
// For tests and replay: pixels (8-bit grey or RGB) and the text of one key. Limits: 16384 a side, 64 Mpixel. *text may be NULL if
// absent.
int png_decode(uint8_t **pixels, int *width, int *height, int *channels, const void *bytes, size_t size, const char *key,
               char **text, struct err *);

#endif
