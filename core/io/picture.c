// SPDX-License-Identifier: MIT
#include "core/io/picture.h"

#include <string.h>
#include <strings.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/jpeg.h"
#include "core/io/png.h"

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
