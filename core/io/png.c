// SPDX-License-Identifier: MIT
/*
 * png, by libpng.
 *
 * libpng reports errors by longjmp. So each direction has one small function that calls setjmp and calls nothing but libpng
 * between there and its return; everything that must be freed lives in a struct of the caller, never in a local that the jump
 * could lose. libpng's own memory comes through core/base/mem.h as well, so a failing allocation anywhere is an E_NOMEM. Warnings
 * are dropped: nothing below main prints.
 *
 * One filter, "sub", on every line: for photographs level 1 with it costs 2.9 ms where all filters cost 3.8 (256x256, level
 * 6: 9.7 ms). Files differ by a few per cent in size.
 */
#include "core/io/png.h"

#include <limits.h>
#include <png.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"

#define MAX_SIDE 16384
#define MAX_PIXELS (64 << 20)
#define MAX_TEXT (1 << 20)

struct bytes { // a growing buffer
    uint8_t *data;
    size_t n, cap;
};

struct job { // one encode or decode; survives the longjmp
    png_structp png;
    png_infop info;
    struct bytes out;  // encode: the file
    const uint8_t *in; // decode: the file
    size_t in_n, in_at;
    png_bytep *rows;
    uint8_t *pixels;
    png_text *texts;
    int width, height, channels;
    char why[96];
    bool no_memory;
};

static void *png_new(png_structp png, png_alloc_size_t n) {
    void *p = mem_alloc(n);
    if (!p) ((struct job *)png_get_mem_ptr(png))->no_memory = true;
    return p;
}

static void png_del(png_structp png, void *p) {
    (void)png;
    mem_free(p);
}

static void on_error(png_structp png, const char *why) {
    struct job *j = png_get_error_ptr(png);
    snprintf(j->why, sizeof j->why, "%s", why);
    png_longjmp(png, 1);
}

static void on_warning(png_structp png, const char *why) { (void)png, (void)why; }

static int fail(const struct job *j, int status, const char *what, struct err *e) {
    if (j->no_memory) return err_set(e, E_NOMEM, "no memory to %s a PNG", what);
    return err_set(e, status, "cannot %s the PNG: %s", what, j->why[0] ? j->why : "libpng could not start");
}

// --- encode

static void on_write(png_structp png, png_bytep data, size_t n) {
    struct job *j = png_get_io_ptr(png);
    struct bytes *b = &j->out;
    if (n > b->cap - b->n) {
        size_t cap = b->cap * 2 > b->n + n ? b->cap * 2 : b->n + n + 4096;
        uint8_t *grown = mem_resize(b->data, cap, 1);
        if (!grown) {
            j->no_memory = true;
            png_error(png, "no memory");
        }
        b->data = grown;
        b->cap = cap;
    }
    memcpy(b->data + b->n, data, n);
    b->n += n;
}

static void on_flush(png_structp png) { (void)png; }

static bool run_encode(struct job *j, int level, int n_text) {
    if (setjmp(png_jmpbuf(j->png))) return false;
    png_set_write_fn(j->png, j, on_write, on_flush);
    png_set_compression_level(j->png, level);
    png_set_filter(j->png, PNG_FILTER_TYPE_BASE, level ? PNG_FILTER_SUB : PNG_FILTER_NONE);
    png_set_IHDR(j->png, j->info, (png_uint_32)j->width, (png_uint_32)j->height, 8,
                 j->channels == 3 ? PNG_COLOR_TYPE_RGB : PNG_COLOR_TYPE_GRAY, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT,
                 PNG_FILTER_TYPE_DEFAULT);
    if (n_text) png_set_text(j->png, j->info, j->texts, n_text);
    png_write_info(j->png, j->info);
    png_write_image(j->png, j->rows);
    png_write_end(j->png, j->info);
    return true;
}

static int check_encode(int width, int height, int channels, int level, const struct png_text *text, int n_text, struct err *e) {
    if (width < 1 || height < 1 || width > MAX_SIDE || height > MAX_SIDE || (int64_t)width * height > MAX_PIXELS)
        return err_set(e, E_RANGE, "a PNG of %dx%d pixels is out of range", width, height);
    if (channels != 1 && channels != 3) return err_set(e, E_RANGE, "a PNG has 1 or 3 channels here, not %d", channels);
    if (level < 0 || level > 9) return err_param(e, E_RANGE, "level", "PNG level %d is not within 0 to 9", level);
    for (int i = 0; i < n_text; i++) {
        size_t n = strlen(text[i].key);
        if (n < 1 || n > 79 || strlen(text[i].value) > MAX_TEXT)
            return err_set(e, E_RANGE, "PNG text '%.79s' is too long, or has no key", text[i].key);
    }
    return OK;
}

static int prepare_encode(struct job *j, const uint8_t *pixels, const struct png_text *text, int n_text) {
    size_t line = (size_t)j->width * (size_t)j->channels;
    j->rows = mem_array((size_t)j->height, sizeof *j->rows);
    j->texts = mem_array((size_t)n_text, sizeof *j->texts);
    j->out.cap = line * (size_t)j->height / 2 + 4096;
    j->out.data = mem_alloc(j->out.cap);
    if (!j->rows || !j->texts || !j->out.data) return E_NOMEM;
    for (int y = 0; y < j->height; y++) j->rows[y] = (png_bytep)(uintptr_t)(pixels + (size_t)y * line);
    for (int i = 0; i < n_text; i++) {
        size_t n = strlen(text[i].value);
        j->texts[i] = (png_text){.compression = PNG_ITXT_COMPRESSION_NONE,
                                 .key = (char *)(uintptr_t)text[i].key,
                                 .text = (char *)(uintptr_t)text[i].value,
                                 .itxt_length = n};
    }
    return OK;
}

int png_encode(uint8_t **out, size_t *size, const uint8_t *pixels, int width, int height, int channels, int level,
               const struct png_text *text, int n_text, struct err *e) {
    *out = NULL;
    int rc = check_encode(width, height, channels, level, text, n_text, e);
    if (rc != OK) return rc;
    struct job j = {.width = width, .height = height, .channels = channels};
    j.no_memory = prepare_encode(&j, pixels, text, n_text) != OK;
    if (!j.no_memory) j.png = png_create_write_struct_2(PNG_LIBPNG_VER_STRING, &j, on_error, on_warning, &j, png_new, png_del);
    if (j.png) j.info = png_create_info_struct(j.png);
    if (!j.png || !j.info) j.no_memory = true;
    bool done = j.info && run_encode(&j, level, n_text);
    png_destroy_write_struct(&j.png, &j.info);
    mem_free(j.rows);
    mem_free(j.texts);
    if (done) {
        *out = j.out.data;
        *size = j.out.n;
        return OK;
    }
    mem_free(j.out.data);
    return fail(&j, E_INTERNAL, "make", e);
}

// --- decode

static void on_read(png_structp png, png_bytep dst, size_t n) {
    struct job *j = png_get_io_ptr(png);
    if (n > j->in_n - j->in_at) png_error(png, "the file ends too early");
    memcpy(dst, j->in + j->in_at, n);
    j->in_at += n;
}

static bool run_header(struct job *j) {
    if (setjmp(png_jmpbuf(j->png))) return false;
    png_set_read_fn(j->png, j, on_read);
    png_set_user_limits(j->png, MAX_SIDE, MAX_SIDE);
    png_set_chunk_malloc_max(j->png, MAX_TEXT);
    png_set_chunk_cache_max(j->png, 128);
    png_read_info(j->png, j->info);
    png_set_expand(j->png); // palettes to RGB, 1 to 4 bits to 8
    png_set_strip_16(j->png);
    png_set_strip_alpha(j->png);
    png_set_interlace_handling(j->png);
    png_read_update_info(j->png, j->info);
    j->width = (int)png_get_image_width(j->png, j->info);
    j->height = (int)png_get_image_height(j->png, j->info);
    j->channels = png_get_channels(j->png, j->info);
    if ((int64_t)j->width * j->height > MAX_PIXELS) png_error(j->png, "more than 64 megapixels");
    if ((j->channels != 1 && j->channels != 3) || png_get_bit_depth(j->png, j->info) != 8)
        png_error(j->png, "neither 8-bit grey nor RGB");
    return true;
}

static bool run_image(struct job *j) {
    if (setjmp(png_jmpbuf(j->png))) return false;
    png_read_image(j->png, j->rows);
    png_read_end(j->png, j->info);
    return true;
}

static bool make_rows(struct job *j) {
    size_t line = (size_t)j->width * (size_t)j->channels;
    j->pixels = mem_array((size_t)j->height, line);
    j->rows = mem_array((size_t)j->height, sizeof *j->rows);
    j->no_memory = !j->pixels || !j->rows;
    for (int y = 0; !j->no_memory && y < j->height; y++) j->rows[y] = j->pixels + (size_t)y * line;
    return !j->no_memory;
}

static bool copy_text(struct job *j, const char *key, char **text) {
    png_textp found;
    int n = 0;
    if (!key || !text) return true;
    png_get_text(j->png, j->info, &found, &n);
    for (int i = 0; i < n && !*text; i++) {
        if (strcmp(found[i].key, key) != 0) continue;
        *text = mem_strdup(found[i].text ? found[i].text : "");
        j->no_memory = !*text;
    }
    return !j->no_memory;
}

int png_decode(uint8_t **pixels, int *width, int *height, int *channels, const void *bytes, size_t size, const char *key,
               char **text, struct err *e) {
    struct job j = {.in = bytes, .in_n = size};
    *pixels = NULL;
    if (text) *text = NULL;
    j.png = png_create_read_struct_2(PNG_LIBPNG_VER_STRING, &j, on_error, on_warning, &j, png_new, png_del);
    if (j.png) j.info = png_create_info_struct(j.png);
    if (!j.info) j.no_memory = true;
    bool done = j.info && run_header(&j) && make_rows(&j) && run_image(&j) && copy_text(&j, key, text);
    png_destroy_read_struct(&j.png, &j.info, NULL);
    mem_free(j.rows);
    if (!done) {
        mem_free(j.pixels);
        return fail(&j, E_FORMAT, "read", e);
    }
    *pixels = j.pixels;
    *width = j.width;
    *height = j.height;
    *channels = j.channels;
    return OK;
}
