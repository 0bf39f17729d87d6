// SPDX-License-Identifier: MIT
#include <zlib.h>

#include "core/base/mem.h"
#include "core/io/png.h"
#include "tests/test.h"

static uint8_t *picture(int w, int h, int channels) {
    uint8_t *p = malloc((size_t)w * (size_t)h * (size_t)channels);
    for (int i = 0; i < w * h * channels; i++) p[i] = (uint8_t)(i * 7 + i / w * 13 + ((unsigned)i * (unsigned)i >> 5));
    return p;
}

TEST(png_round_trip) {
    static const int sizes[][3] = {{1, 1, 1}, {32, 32, 1}, {256, 255, 3}, {7, 300, 3}, {2048, 3, 1}};
    struct png_text text[] = {{"Software", "sitd"}, {"sitd", "{\"seed\":7,\"label\":\"Gr\xc3\xbc\xc3\x9f\x65\"}"}};
    struct err e = {0};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (int level = 0; level <= 9; level += 3) {
            int w = sizes[i][0], h = sizes[i][1], c = sizes[i][2], dw, dh, dc;
            uint8_t *pixels = picture(w, h, c), *file, *back;
            char *found;
            size_t n;
            CHECK_OK(png_encode(&file, &n, pixels, w, h, c, level, text, 2, &e), &e);
            CHECK_OK(png_decode(&back, &dw, &dh, &dc, file, n, "sitd", &found, &e), &e);
            CHECK(dw == w && dh == h && dc == c && memcmp(pixels, back, (size_t)w * (size_t)h * (size_t)c) == 0);
            CHECK_STR(found, text[1].value);
            CHECK(memmem(file, n, "iTXt", 4));
            mem_free(file);
            mem_free(back);
            mem_free(found);
            free(pixels);
        }
    }
}

TEST(png_same_pixels_same_bytes) {
    struct err e = {0};
    uint8_t *pixels = picture(64, 64, 3), *a, *b;
    size_t na, nb;
    CHECK_OK(png_encode(&a, &na, pixels, 64, 64, 3, 6, NULL, 0, &e), &e);
    CHECK_OK(png_encode(&b, &nb, pixels, 64, 64, 3, 6, NULL, 0, &e), &e);
    CHECK(na == nb && memcmp(a, b, na) == 0);
    mem_free(a);
    mem_free(b);
    free(pixels);
}

TEST(png_refuses) {
    struct err e = {0};
    uint8_t pixel[3] = {0}, *out;
    size_t n;
    struct png_text no_key = {"", "x"};
    CHECK(png_encode(&out, &n, pixel, 0, 1, 1, 6, NULL, 0, &e) == E_RANGE && !out);
    err_clear(&e);
    CHECK(png_encode(&out, &n, pixel, 1, 1, 2, 6, NULL, 0, &e) == E_RANGE);
    err_clear(&e);
    CHECK(png_encode(&out, &n, pixel, 1, 1, 1, 10, NULL, 0, &e) == E_RANGE);
    CHECK_STR(e.param, "level");
    err_clear(&e);
    CHECK(png_encode(&out, &n, pixel, 20000, 1, 1, 6, NULL, 0, &e) == E_RANGE);
    err_clear(&e);
    CHECK(png_encode(&out, &n, pixel, 1, 1, 1, 6, &no_key, 1, &e) == E_RANGE);
}

TEST(png_decode_hostile) { // cut at every byte, every byte changed: no crash, no leak, pixels only with success
    struct err e = {0};
    uint8_t *pixels = picture(16, 16, 3), *file, *back;
    struct png_text text = {"sitd", "value"};
    char *found;
    size_t n;
    int w, h, c;
    CHECK_OK(png_encode(&file, &n, pixels, 16, 16, 3, 6, &text, 1, &e), &e);
    for (size_t cut = 0; cut < n; cut++) {
        uint8_t *part = malloc(cut ? cut : 1);
        memcpy(part, file, cut);
        err_clear(&e);
        int rc = png_decode(&back, &w, &h, &c, part, cut, "sitd", &found, &e);
        CHECK(rc == E_FORMAT && !back && e.text[0]);
        mem_free(found);
        free(part);
    }
    for (size_t at = 0; at < n; at++) {
        file[at] ^= 0x41;
        err_clear(&e);
        int rc = png_decode(&back, &w, &h, &c, file, n, "sitd", &found, &e);
        CHECK((rc == OK) == (back != NULL));
        mem_free(back);
        mem_free(found);
        file[at] ^= 0x41;
    }
    mem_free(file);
    free(pixels);
}

TEST(png_decode_bomb) { // 16384 x 16384 in the header: refused before the pixels are allocated
    static const uint8_t head[] = {0x89, 'P', 'N', 'G',  13, 10, 26, 10,   0, 0, 0, 13, 'I', 'H', 'D',
                                   'R',  0,   0,   0x40, 0,  0,  0,  0x40, 0, 8, 2, 0,  0,   0};
    struct err e = {0};
    uint8_t *back, file[64] = {0};
    int w, h, c;
    memcpy(file, head, sizeof head);
    uint32_t crc = (uint32_t)crc32(0, file + 12, 17);
    for (int i = 0; i < 4; i++) file[29 + i] = (uint8_t)(crc >> (24 - 8 * i));
    memcpy(file + 33, "\0\0\0\0IDAT\x35\xaf\x06\x1e", 12);
    CHECK(png_decode(&back, &w, &h, &c, file, 45, NULL, NULL, &e) == E_FORMAT && strstr(e.text, "megapixels"));
}
