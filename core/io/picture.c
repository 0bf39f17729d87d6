// SPDX-License-Identifier: MIT
#include "core/io/picture.h"

#include <string.h>
#include <strings.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/jpeg.h"
#include "core/io/png.h"
#include "core/io/resize.h"

#define MAX_BYTES ((size_t)256 << 20)

bool picture_named(const char *path) {
    static const char *const endings[] = {".png", ".jpg", ".jpeg"};
    size_t n = strlen(path);
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        size_t m = strlen(endings[i]);
        if (n > m && strcasecmp(path + n - m, endings[i]) == 0) return true;
    }
    return false;
}

int picture_read(uint8_t **pixels, int *w, int *h, int *channels, const char *path, struct err *e) {
    void *bytes;
    size_t n;
    *pixels = NULL;
    int rc = file_read(&bytes, &n, path, MAX_BYTES, e);
    if (rc != OK) return rc;
    bool jpeg = n > 2 && memcmp(bytes, "\xff\xd8", 2) == 0;
    rc = jpeg ? jpeg_decode(pixels, w, h, channels, bytes, n, e) : png_decode(pixels, w, h, channels, bytes, n, NULL, NULL, e);
    mem_free(bytes);
    if (rc != OK) err_prefix(e, "%s", path);
    return rc;
}

int picture_read_square(uint8_t **square, int size, int *channels, const char *path, struct err *e) {
    uint8_t *pixels;
    int w, h;
    *square = NULL;
    int rc = picture_read(&pixels, &w, &h, channels, path, e);
    if (rc != OK) return rc;
    *square = mem_array((size_t)size * (size_t)size, (size_t)*channels);
    rc = *square ? resize_center_crop(*square, size, pixels, w, h, *channels, e) : err_set(e, E_NOMEM, "no memory to cut it");
    mem_free(pixels);
    if (rc == OK) return OK;
    mem_free(*square);
    *square = NULL;
    return err_prefix(e, "%s", path);
}
