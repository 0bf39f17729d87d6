// SPDX-License-Identifier: MIT
/*
 * jpeg, by libjpeg-turbo, which reports errors through a function that must not return: it jumps. So one small function calls
 * setjmp and nothing but libjpeg between there and its return; what must be freed lives in the caller's struct (as in png.c).
 *
 * CMYK: Adobe's files hold inverted inks, and no other kind is met in practice; a pixel is ink times black, which is what others
 * make of them.
 */
#include "core/io/jpeg.h"

#include <setjmp.h>
#include <stdbool.h>
#include <stdio.h>

#include <jerror.h>
#include <jpeglib.h>

#include "core/base/mem.h"

#define MAX_SIDE 16384
#define MAX_PIXELS (64 << 20)
#define MAX_SCANS 256 // of a progressive file: each costs a pass over the picture

struct job {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    struct jpeg_progress_mgr progress;
    jmp_buf jump;
    uint8_t *pixels, *line; // line: CMYK
    int channels;
    char why[JMSG_LENGTH_MAX];
    bool no_memory;
};

static void on_error(j_common_ptr c) {
    struct job *j = c->client_data;
    c->err->format_message(c, j->why);
    longjmp(j->jump, 1);
}

static void give_up(struct job *j, const char *why) {
    snprintf(j->why, sizeof j->why, "%s", why);
    longjmp(j->jump, 1);
}

// Warnings: only those that mean "the rest is missing" count: the file is over, or its end marker comes before all pixels.
static void on_message(j_common_ptr c, int level) {
    int code = c->err->msg_code;
    if (level < 0 && (code == JWRN_JPEG_EOF || code == JWRN_HIT_MARKER)) give_up(c->client_data, "the file ends too early");
}

static void on_progress(j_common_ptr c) {
    struct job *j = c->client_data;
    if (j->jpeg.input_scan_number > MAX_SCANS) give_up(j, "it has more than 256 scans");
}

static void read_lines(struct job *j) {
    struct jpeg_decompress_struct *d = &j->jpeg;
    size_t width = d->output_width;
    while (d->output_scanline < d->output_height) {
        uint8_t *to = j->pixels + (size_t)d->output_scanline * width * (size_t)j->channels;
        JSAMPROW row = j->line ? j->line : to;
        jpeg_read_scanlines(d, &row, 1);
        for (size_t x = 0; j->line && x < width; x++)
            for (size_t c = 0; c < 3; c++) to[3 * x + c] = (uint8_t)((j->line[4 * x + c] * j->line[4 * x + 3] + 127) / 255);
    }
    jpeg_finish_decompress(d);
}

static bool run_head(struct job *j, const void *bytes, size_t size) {
    if (setjmp(j->jump)) return false;
    struct jpeg_decompress_struct *d = &j->jpeg;
    jpeg_create_decompress(d);
    d->progress = &j->progress;
    jpeg_mem_src(d, bytes, size);
    jpeg_read_header(d, TRUE);
    if (d->image_width > MAX_SIDE || d->image_height > MAX_SIDE || (int64_t)d->image_width * d->image_height > MAX_PIXELS)
        give_up(j, "more than 16384 pixels a side or 64 megapixels");
    bool cmyk = d->jpeg_color_space == JCS_CMYK || d->jpeg_color_space == JCS_YCCK;
    d->out_color_space = d->jpeg_color_space == JCS_GRAYSCALE ? JCS_GRAYSCALE : cmyk ? JCS_CMYK : JCS_RGB;
    j->channels = d->out_color_space == JCS_GRAYSCALE ? 1 : 3;
    return true;
}

static bool run_image(struct job *j) {
    if (setjmp(j->jump)) return false;
    jpeg_start_decompress(&j->jpeg);
    read_lines(j);
    return true;
}

static bool make_rows(struct job *j) {
    size_t width = j->jpeg.image_width;
    j->pixels = mem_array(j->jpeg.image_height, width * (size_t)j->channels);
    if (j->jpeg.out_color_space == JCS_CMYK) j->line = mem_array(width, 4);
    j->no_memory = !j->pixels || (j->jpeg.out_color_space == JCS_CMYK && !j->line);
    return !j->no_memory;
}

int jpeg_decode(uint8_t **pixels, int *width, int *height, int *channels, const void *bytes, size_t size, struct err *e) {
    struct job *j = mem_alloc(sizeof *j);
    *pixels = NULL;
    if (!j) return err_set(e, E_NOMEM, "no memory to read a JPEG");
    j->jpeg.err = jpeg_std_error(&j->errors);
    j->jpeg.client_data = j;
    j->errors.error_exit = on_error;
    j->errors.emit_message = on_message;
    j->progress.progress_monitor = on_progress;
    bool done = run_head(j, bytes, size) && make_rows(j) && run_image(j);
    *width = (int)j->jpeg.image_width, *height = (int)j->jpeg.image_height, *channels = j->channels;
    jpeg_destroy_decompress(&j->jpeg);
    mem_free(j->line);
    int rc = OK;
    if (done) *pixels = j->pixels;
    else mem_free(j->pixels);
    if (!done && j->no_memory) rc = err_set(e, E_NOMEM, "no memory to read a JPEG");
    else if (!done) rc = err_set(e, E_FORMAT, "cannot read the JPEG: %s", j->why);
    mem_free(j);
    return rc;
}
