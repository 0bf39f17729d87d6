// SPDX-License-Identifier: MIT
// IDX: images [n, h, w] of bytes and labels [n], in a file beside them whose name says labels-idx1 where theirs says images-idx3.
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/idx.h"
#include "core/train/data_int.h"

struct set {
    struct idx images, labels;
};

static void set_close(void *ctx) {
    struct set *s = ctx;
    if (!s) return;
    mem_free(s->images.data);
    mem_free(s->labels.data);
    mem_free(s);
}

static int read_one(const struct data *d, int64_t index, uint64_t draw, float *x, int32_t *label, struct err *e) {
    (void)draw, (void)e;
    const struct set *s = d->set;
    int side = d->info.size, h = (int)s->images.shape[1], w = (int)s->images.shape[2], left = (side - w) / 2,
        top = (side - h) / 2;
    size_t plane = (size_t)side * (size_t)side, bytes = (size_t)h * (size_t)w;
    for (size_t i = 0; i < plane; i++) x[i] = -1; // black
    for (int i = 0; i < h; i++)
        data_planes(x + (size_t)(top + i) * (size_t)side + (size_t)left,
                    s->images.data + (size_t)index * bytes + (size_t)i * (size_t)w, w, 1, 1, 1);
    for (int c = 1; c < d->info.channels; c++) memcpy(x + (size_t)c * plane, x, plane * sizeof *x);
    *label = s->labels.data[index];
    return OK;
}

static char *labels_path(const char *images) {
    const char *at = strstr(images, "images-idx3"), *next;
    while (at && (next = strstr(at + 1, "images-idx3"))) at = next; // the last: folders may be called so too
    return at ? mem_printf("%.*slabels-idx1%s", (int)(at - images), images, at + strlen("images-idx3")) : NULL;
}

static int check(struct data *d, const char *images, const char *labels, struct err *e) {
    const struct set *s = d->set;
    const int64_t *shape = s->images.shape;
    int64_t most = shape[1] > shape[2] ? shape[1] : shape[2];
    if (s->images.ndim != 3) return err_set(e, E_FORMAT, "%s has %d dimensions, images have 3", images, s->images.ndim);
    if (s->labels.ndim != 1) return err_set(e, E_FORMAT, "%s has %d dimensions, labels have 1", labels, s->labels.ndim);
    if (shape[0] != s->labels.shape[0])
        return err_set(e, E_CONFLICT, "%s holds %lld images, %s %lld labels", images, (long long)shape[0], labels,
                       (long long)s->labels.shape[0]);
    if (most > 1024)
        return err_set(e, E_RANGE, "%s: its images are %lld x %lld, the limit is 1024", images, (long long)shape[2],
                       (long long)shape[1]);
    if (d->spec.size && d->spec.size < most)
        return err_set(e, E_CONFLICT, "%s: its images are %lld x %lld, more than the %d that the network takes", images,
                       (long long)shape[2], (long long)shape[1], d->spec.size);
    d->info.size = d->spec.size ? d->spec.size : (int)most;
    return OK;
}

int data_idx_open(struct data *d, const char *images, struct err *e) {
    char *labels = labels_path(images);
    struct set *s = d->set = mem_alloc(sizeof *s);
    d->close = set_close;
    d->read = read_one;
    int rc = labels && s ? OK : err_set(e, E_NOMEM, "no memory for a data set");
    if (rc == OK) rc = idx_read(&s->images, images, e);
    if (rc == OK) rc = idx_read(&s->labels, labels, e);
    if (rc == OK) rc = check(d, images, labels, e);
    d->info.kind = "IDX";
    d->info.channels = d->spec.channels ? d->spec.channels : 1;
    d->info.n = rc == OK ? s->images.shape[0] : 0;
    for (int64_t i = 0; i < d->info.n; i++)
        if (s->labels.data[i] >= d->info.classes) d->info.classes = s->labels.data[i] + 1;
    mem_free(labels);
    return rc;
}
