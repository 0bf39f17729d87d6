// SPDX-License-Identifier: MIT
/*
 * picture: a PNG or JPEG file to pixels. Thread: any.
 */
#ifndef SITD_PICTURE_H
#define SITD_PICTURE_H
#include <stdbool.h>
#include <stdint.h>

#include "core/base/err.h"

bool picture_named(const char *path); // as files of pictures are: it ends in .png, .jpg or .jpeg, in any case
// What the file is, not what it is called: ImageNet holds a PNG called .JPEG. *pixels [h, w, channels], 8-bit grey or RGB, are the
// caller's (mem_free); limits as png_decode and jpeg_decode. Errors name the file: E_NOTFOUND, E_IO, E_FORMAT, E_NOMEM.
int picture_read(uint8_t **pixels, int *w, int *h, int *channels, const char *path, struct err *);
// The same, cut to size x size as resize_center_crop does; also E_RANGE. NULL on failure.
int picture_read_square(uint8_t **square, int size, int *channels, const char *path, struct err *);

#endif
