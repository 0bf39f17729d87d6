// SPDX-License-Identifier: MIT
#include "core/io/resize.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "core/base/mem.h"

#define MAX_PIXELS (64 << 20) // of a picture that is scaled up to be cut
#define BITS 22 // 32, less 8 of a pixel, less 2 of head room

struct taps { // what each output pixel is made of
    int n;    // most weights an output pixel has
    int *first, *count;
    int32_t *weight; // [outputs, n]
};

static double filter(enum resize_filter f, double x) {
    if (f == RESIZE_BOX) return x > -0.5 && x <= 0.5;
    x = fabs(x); // a = -0.5
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

static void fill_tap(struct taps *t, int out, double scale, double support, double stretch, int in, enum resize_filter f) {
    double center = (out + 0.5) * scale, sum = 0;
    int first = (int)fmax(center - support + 0.5, 0), end = (int)fmin(center + support + 0.5, in);
    int32_t *weight = t->weight + (size_t)out * (size_t)t->n;
    for (int i = first; i < end; i++) sum += filter(f, (i - center + 0.5) / stretch);
    for (int i = first; i < end; i++) {
        double v = filter(f, (i - center + 0.5) / stretch) / sum;
        weight[i - first] = (int32_t)(v * (1 << BITS) + (v < 0 ? -0.5 : 0.5));
    }
    t->first[out] = first;
    t->count[out] = end - first;
}

static bool make_taps(struct taps *t, int in, int out, enum resize_filter f) {
    double scale = (double)in / out, stretch = fmax(scale, 1), support = (f == RESIZE_BOX ? 0.5 : 2.0) * stretch;
    t->n = (int)ceil(support) * 2 + 1;
    t->first = mem_array((size_t)out, sizeof *t->first);
    t->count = mem_array((size_t)out, sizeof *t->count);
    t->weight = mem_array((size_t)out * (size_t)t->n, sizeof *t->weight);
    if (!t->first || !t->count || !t->weight) return false;
    for (int i = 0; i < out; i++) fill_tap(t, i, scale, support, stretch, in, f);
    return true;
}

static void drop_taps(struct taps *t) {
    mem_free(t->first);
    mem_free(t->count);
    mem_free(t->weight);
}

// One output number; its inputs are `step` bytes apart.
static uint8_t weigh(const uint8_t *src, size_t step, const int32_t *weight, int n) {
    int64_t sum = 1 << (BITS - 1);
    for (int i = 0; i < n; i++) sum += (int64_t)src[(size_t)i * step] * weight[i];
    sum >>= BITS;
    return sum < 0 ? 0 : sum > 255 ? 255 : (uint8_t)sum;
}

int resize_picture(uint8_t *dst, int to_w, int to_h, const uint8_t *src, int w, int h, int channels, enum resize_filter f,
                   struct err *e) {
    struct taps across = {0}, down = {0};
    size_t ch = (size_t)channels, line = (size_t)to_w * ch;
    uint8_t *middle = mem_array((size_t)h, line); // [h, to_w, channels]
    bool ok = middle && make_taps(&across, w, to_w, f) && make_taps(&down, h, to_h, f);
    for (int y = 0; ok && y < h; y++)
        for (int x = 0; x < to_w; x++)
            for (size_t c = 0; c < ch; c++)
                middle[(size_t)y * line + (size_t)x * ch + c] =
                    weigh(src + ((size_t)y * (size_t)w + (size_t)across.first[x]) * ch + c, ch,
                          across.weight + (size_t)x * (size_t)across.n, across.count[x]);
    for (int y = 0; ok && y < to_h; y++)
        for (size_t i = 0; i < line; i++)
            dst[(size_t)y * line + i] =
                weigh(middle + (size_t)down.first[y] * line + i, line, down.weight + (size_t)y * (size_t)down.n, down.count[y]);
    drop_taps(&across);
    drop_taps(&down);
    mem_free(middle);
    return ok ? OK : err_set(e, E_NOMEM, "no memory to scale a picture of %d x %d", w, h);
}

struct picture { // the last one made, or the source
    const uint8_t *at;
    uint8_t *own;
    int w, h;
};

static int scale(struct picture *p, int w, int h, int channels, enum resize_filter f, struct err *e) {
    uint8_t *made = mem_array((size_t)w * (size_t)h, (size_t)channels);
    if (!made) return err_set(e, E_NOMEM, "no memory to scale a picture of %d x %d", p->w, p->h);
    int rc = resize_picture(made, w, h, p->at, p->w, p->h, channels, f, e);
    mem_free(p->own);
    *p = (struct picture){made, made, w, h};
    return rc;
}

int resize_center_crop(uint8_t *dst, int size, const uint8_t *src, int w, int h, int channels, struct err *e) {
    struct picture p = {.at = src, .w = w, .h = h};
    int rc = OK;
    while (rc == OK && (p.w < p.h ? p.w : p.h) >= 2 * size) rc = scale(&p, p.w / 2, p.h / 2, channels, RESIZE_BOX, e);
    double factor = (double)size / (p.w < p.h ? p.w : p.h);
    int to_w = (int)nearbyint(p.w * factor), to_h = (int)nearbyint(p.h * factor);
    if (rc == OK && (int64_t)to_w * to_h > MAX_PIXELS)
        rc = err_set(e, E_RANGE, "a picture of %d x %d is too long to be cut to %d x %d", w, h, size, size);
    if (rc == OK && (to_w != p.w || to_h != p.h)) rc = scale(&p, to_w, to_h, channels, RESIZE_BICUBIC, e);
    size_t line = (size_t)size * (size_t)channels, x = (size_t)(p.w - size) / 2, y = (size_t)(p.h - size) / 2;
    for (size_t i = 0; rc == OK && i < (size_t)size; i++)
        memcpy(dst + i * line, p.at + ((y + i) * (size_t)p.w + x) * (size_t)channels, line);
    mem_free(p.own);
    return rc;
}
