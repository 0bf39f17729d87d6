// SPDX-License-Identifier: MIT
/*
 * OUT/report.html: what a run did, in one file that needs nothing else: curves as inline SVG, grids of samples as data URIs. It
 * is made anew from log.jsonl and samples/ each time, so it is right whenever it is there.
 */
#include <dirent.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/jsonio.h"
#include "server/cmd_train.h"
#include "server/text.h"

#define POINTS 1000 // of a curve: more lines of the log are averaged
#define GRIDS 12
#define W 640
#define H 220
#define LEFT 64
#define BOTTOM 26

struct series {
    double *x, *y;
    int n;
};

/* ---- curves ---- */

static void add_axis(struct text *t, double lo, double hi, bool log_scale) {
    for (int i = 0; i <= 4; i++) {
        double part = i / 4.0, v = lo + (hi - lo) * part;
        int y = (int)(H - BOTTOM - part * (H - BOTTOM - 10));
        text_printf(t,
                    "<line x1=\"%d\" y1=\"%d\" x2=\"%d\" y2=\"%d\" stroke=\"#ddd\"/><text x=\"%d\" y=\"%d\" "
                    "text-anchor=\"end\">%.3g</text>",
                    LEFT, y, W, y, LEFT - 6, y + 4, log_scale ? exp(v) : v);
    }
}

static void add_curve(struct text *t, const char *title, const char *across, const struct series *s, bool log_scale) {
    double lo = INFINITY, hi = -INFINITY, x0 = s->n ? s->x[0] : 0, x1 = s->n ? s->x[s->n - 1] : 1;
    for (int i = 0; i < s->n; i++) {
        double y = log_scale ? log(s->y[i]) : s->y[i];
        if (!isfinite(y)) continue;
        lo = fmin(lo, y), hi = fmax(hi, y);
    }
    if (!(lo <= hi)) return;
    if (hi - lo < 1e-12) lo -= fabs(lo) * 0.1 + 1e-9, hi += fabs(hi) * 0.1 + 1e-9;
    if (x1 <= x0) x1 = x0 + 1;
    text_printf(t, "<figure><figcaption>%s</figcaption><svg viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"%s\">", title, W, H,
                title);
    add_axis(t, lo, hi, log_scale);
    text_printf(t,
                "<text x=\"%d\" y=\"%d\">%.6g</text><text x=\"%d\" y=\"%d\" text-anchor=\"end\">%.6g %s</text><polyline "
                "fill=\"none\" stroke=\"#06c\" stroke-width=\"1.5\" points=\"",
                LEFT, H - 8, x0, W, H - 8, x1, across);
    for (int i = 0; i < s->n; i++) {
        double y = log_scale ? log(s->y[i]) : s->y[i];
        if (isfinite(y))
            text_printf(t, "%.1f,%.1f ", LEFT + (s->x[i] - x0) / (x1 - x0) * (W - LEFT - 4),
                        H - BOTTOM - (y - lo) / (hi - lo) * (H - BOTTOM - 10));
    }
    text_printf(t, "\"/></svg></figure>\n");
}

/* ---- the log ---- */

struct history {
    json_t **lines;
    int n;
};

static int read_lines(struct history *h, const char *path, struct err *e) {
    void *bytes;
    size_t n, rows = 0;
    int rc = file_read(&bytes, &n, path, (size_t)1 << 32, e);
    if (rc != OK) return rc;
    char *text = bytes;
    for (size_t i = 0; i < n; i++) rows += text[i] == '\n';
    if (!(h->lines = mem_array(rows + 1, sizeof *h->lines))) rc = err_set(e, E_NOMEM, "no memory for %s", path);
    for (char *line = text, *end; rc == OK && (end = memchr(line, '\n', n - (size_t)(line - text))); line = end + 1)
        if (jsonio_parse(&h->lines[h->n], line, (size_t)(end - line), 4, 1000, "log.jsonl", NULL) == OK)
            h->n++; // a line that was cut is no line
    mem_free(bytes);
    return rc;
}

static void history_free(struct history *h) {
    for (int i = 0; i < h->n; i++) json_decref(h->lines[i]);
    mem_free(h->lines);
}

// A field over steps, neighbours averaged so that at most POINTS remain.
static void add_field(struct text *t, const struct history *h, const char *field, const char *title, bool log_scale) {
    double x[POINTS], y[POINTS];
    struct series s = {x, y, 0};
    int each = (h->n + POINTS - 1) / POINTS;
    for (int i = 0; i < h->n; i += each) {
        int n = h->n - i < each ? h->n - i : each, had = 0;
        double sum = 0;
        for (int j = i; j < i + n; j++) {
            const json_t *v = json_object_get(h->lines[j], field);
            if (json_is_number(v)) sum += json_number_value(v), had++;
        }
        if (had) x[s.n] = json_number_value(json_object_get(h->lines[i + n - 1], "step")), y[s.n++] = sum / had;
    }
    bool flat = true;
    for (int i = 0; i < s.n; i++) flat = flat && y[i] == 0;
    if (!flat) add_curve(t, title, "steps", &s, log_scale);
}

static void add_by_time(struct text *t, const struct history *h) {
    double x[POINTS], y[POINTS];
    struct series s = {x, y, 0};
    const json_t *bins = h->n ? json_object_get(h->lines[h->n - 1], "loss_by_time") : NULL;
    for (size_t i = 0, n = json_array_size(bins); i < n && i < POINTS; i++) {
        double v = json_number_value(json_array_get(bins, i));
        if (v > 0) x[s.n] = ((double)i + 0.5) / (double)n, y[s.n++] = v;
    }
    add_curve(t, "Loss over t (running mean)", "of the range of t", &s, true);
}

/* ---- pictures ---- */

static void add_base64(struct text *t, const unsigned char *b, size_t n) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        unsigned v = (unsigned)b[i] << 16 | (i + 1 < n ? (unsigned)b[i + 1] << 8 : 0) | (i + 2 < n ? b[i + 2] : 0);
        char four[4] = {digits[v >> 18], digits[v >> 12 & 63], i + 1 < n ? digits[v >> 6 & 63] : '=',
                        i + 2 < n ? digits[v & 63] : '='};
        text_add(t, four, 4);
    }
}

static int is_grid(const struct dirent *d) {
    size_t n = strlen(d->d_name);
    return strncmp(d->d_name, "step-", 5) == 0 && n > 4 && strcmp(d->d_name + n - 4, ".png") == 0;
}

static void add_grid(struct text *t, const char *folder, const char *name) {
    void *bytes;
    size_t n;
    char *path = mem_printf("%s/%s", folder, name);
    if (path && file_read(&bytes, &n, path, (size_t)64 << 20, NULL) == OK) {
        text_printf(t, "<figure><figcaption>Step %lld</figcaption><img alt=\"samples\" src=\"data:image/png;base64,",
                    atoll(name + 5));
        add_base64(t, bytes, n);
        text_printf(t, "\"></figure>\n");
        mem_free(bytes);
    }
    mem_free(path);
}

static void add_grids(struct text *t, const char *out) { // the newest first, at most GRIDS, evenly chosen
    struct dirent **names = NULL;
    char *folder = mem_printf("%s/samples", out);
    int n = folder ? scandir(folder, &names, is_grid, alphasort) : -1, shown = n < GRIDS ? n : GRIDS;
    for (int i = shown - 1; i >= 0; i--) add_grid(t, folder, names[shown == 1 ? n - 1 : i * (n - 1) / (shown - 1)]->d_name);
    for (int i = 0; i < n; i++) free(names[i]);
    free(names);
    mem_free(folder);
}

static void add_escaped(struct text *t, const char *s) {
    for (; *s; s++)
        if (*s == '<' || *s == '&') text_printf(t, *s == '<' ? "&lt;" : "&amp;");
        else text_add(t, s, 1);
}

/* ---- the page ---- */

static void add_page(struct text *t, const struct history *h, const char *out, const char *recipe) {
    text_printf(t, "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
                   "content=\"width=device-width\"><title>");
    add_escaped(t, out);
    text_printf(t,
                "</title><style>body{font:15px/1.4 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 "
                "1em;color:#222}figure{margin:0 0 1.5em}"
                "figcaption{font-weight:600;margin-bottom:.3em}svg{width:100%%;max-width:%dpx}svg "
                "text{font-size:11px;fill:#555}img{image-rendering:pixelated;max-width:100%%;min-width:50%%}pre{background:#"
                "f5f5f5;padding:1em;overflow:auto}</style></head><body><h1>",
                W);
    add_escaped(t, out);
    text_printf(t, "</h1>\n");
    if (h->n) {
        const json_t *last = h->lines[h->n - 1];
        text_printf(t, "<p>Step %.0f, epoch %.2f, loss %.5g, %.4g images/s.</p>\n",
                    json_number_value(json_object_get(last, "step")), json_number_value(json_object_get(last, "epoch")),
                    json_number_value(json_object_get(last, "loss")),
                    json_number_value(json_object_get(last, "images_per_second")));
    }
    add_field(t, h, "loss", "Loss", true);
    add_field(t, h, "vb", "Variational bound, bits", true);
    add_by_time(t, h);
    add_field(t, h, "grad_norm", "Norm of the gradient", true);
    add_field(t, h, "update_norm", "Norm of the update", true);
    add_field(t, h, "lr", "Learning rate", false);
    add_field(t, h, "images_per_second", "Images a second", false);
    add_field(t, h, "mfu", "Part of the device's peak (MFU)", false);
    add_grids(t, out);
    text_printf(t, "<h2>Options</h2><pre>");
    add_escaped(t, recipe);
    text_printf(t, "</pre></body></html>\n");
}

int train_report(const char *out, const char *recipe, struct err *e) {
    struct history h = {0};
    struct text t = {0};
    size_t n;
    char *log = mem_printf("%s/log.jsonl", out), *path = mem_printf("%s/report.html", out), *page = NULL;
    int rc = log && path ? read_lines(&h, log, e) : err_set(e, E_NOMEM, "no memory for a report");
    if (rc == OK) {
        add_page(&t, &h, out, recipe);
        page = text_take(&t, &n);
        rc = page ? file_write(path, page, n, e) : err_set(e, E_NOMEM, "no memory for a report");
    }
    history_free(&h);
    mem_free(page);
    mem_free(log);
    mem_free(path);
    return rc;
}
