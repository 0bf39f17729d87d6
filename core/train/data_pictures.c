// SPDX-License-Identifier: MIT
// Pictures: one folder a class. Files are listed at open and decoded when they are wanted; one that cannot be read ends the run
// by name.
#include <string.h>
#include <sys/stat.h>

#include "core/base/mem.h"
#include "core/io/picture.h"
#include "core/train/data_int.h"

struct set {
    struct data_names *of; // [classes] files
    int64_t *first;        // [classes + 1] index of a class's first file
    int classes;
};

static void set_close(void *ctx) {
    struct set *s = ctx;
    if (!s) return;
    for (int i = 0; s->of && i < s->classes; i++) data_names_free(&s->of[i]);
    mem_free(s->of);
    mem_free(s->first);
    mem_free(s);
}

static int read_one(const struct data *d, int64_t index, uint64_t draw, float *x, int32_t *label, struct err *e) {
    const struct set *s = d->set;
    (void)draw;
    int low = 0, high = s->classes - 1; // the last class whose first file is not beyond index
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (s->first[middle] <= index) low = middle;
        else high = middle - 1;
    }
    const char *path = s->of[low].at[index - s->first[low]];
    int side = d->info.size, channels;
    uint8_t *square;
    int rc = picture_read_square(&square, side, &channels, path, e);
    if (rc == OK) data_planes(x, square, side, side, channels, d->info.channels);
    *label = low;
    mem_free(square);
    return rc;
}

static bool is_folder(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

static int add_class(struct data *d, struct set *s, const char *folder, struct err *e) {
    int k = s->classes;
    int rc = data_list(&s->of[k], folder, picture_named, e);
    if (rc != OK) return rc;
    s->classes++;
    if (s->of[k].n == 0) return err_set(e, E_FORMAT, "%s: the class has no PNG or JPEG", folder);
    s->first[k + 1] = s->first[k] + s->of[k].n;
    d->info.names[k] = mem_strdup(strrchr(folder, '/') + 1);
    d->info.classes = k + 1;
    return d->info.names[k] ? OK : err_set(e, E_NOMEM, "no memory for the classes' names");
}

int data_pictures_open(struct data *d, struct err *e) {
    struct data_names folders;
    if (!d->spec.size) return err_param(e, E_RANGE, "size", "pictures are cut to the network's size: name it with --size");
    int rc = data_list(&folders, d->spec.path, is_folder, e);
    if (rc != OK) return rc;
    size_t n = (size_t)folders.n;
    struct set *s = d->set = mem_alloc(sizeof *s);
    d->close = set_close;
    d->read = read_one;
    if (s) s->of = mem_array(n, sizeof *s->of), s->first = mem_array(n + 1, sizeof *s->first);
    d->info.names = mem_array(n, sizeof *d->info.names);
    if (!s || !s->of || !s->first || !d->info.names) rc = err_set(e, E_NOMEM, "no memory for %zu classes", n);
    for (int i = 0; rc == OK && i < folders.n; i++) rc = add_class(d, s, folders.at[i], e);
    data_names_free(&folders);
    d->info.kind = "pictures";
    d->info.size = d->spec.size;
    d->info.channels = d->spec.channels ? d->spec.channels : 3;
    if (rc == OK) d->info.n = s->first[s->classes];
    if (rc == OK && d->info.channels != 1 && d->info.channels != 3)
        rc = err_set(e, E_CONFLICT, "%s: pictures have 1 or 3 channels, the network takes %d", d->spec.path, d->info.channels);
    return rc;
}
