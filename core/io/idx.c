// SPDX-License-Identifier: MIT
/*
 * idx
 *
 *   0  0x00 0x00   then the element type, 0x08 for unsigned bytes (others are refused), then the rank
 *   4  a big-endian u32 a dimension
 *   .  the elements, to the end of the file
 *
 * A gzipped file (one member) is inflated as far as the header, then into an array of exactly the size that the header gives.
 * What the header claims is checked first: not more than 4 GiB, and not more than deflate can hold in that many bytes, so that a
 * small file cannot ask for much memory; and the stream must end where the array does.
 */
#include "core/io/idx.h"

#include <string.h>
#include <zlib.h>

#include "core/base/mem.h"
#include "core/io/file.h"

#define MAX_FILE ((size_t)2 << 30)
#define MAX_ARRAY ((size_t)4 << 30)
#define DEFLATE_RATIO 1032 // the most that deflate gives for a byte

struct source { // bytes in order, from memory or from a gzip stream
    const unsigned char *at;
    size_t left;
    bool gzip;
    z_stream z;
};

// n bytes into dst; false where the source ends before or is damaged.
static bool take(struct source *s, void *dst, size_t n) {
    if (!s->gzip) {
        if (n > s->left) return false;
        memcpy(dst, s->at, n);
        s->at += n, s->left -= n;
        return true;
    }
    for (unsigned char *to = dst; n > 0;) {
        uInt now = n < (1u << 30) ? (uInt)n : 1u << 30;
        s->z.next_out = to, s->z.avail_out = now;
        int rc = inflate(&s->z, Z_NO_FLUSH);
        size_t got = now - s->z.avail_out;
        to += got, n -= got;
        if (n > 0 && (rc != Z_OK || got == 0)) return false;
        if (rc != Z_OK && rc != Z_STREAM_END) return false;
    }
    return true;
}

// Nothing may follow, and gzip's own check sum must hold.
static bool ended(struct source *s) {
    unsigned char more;
    if (!s->gzip) return s->left == 0;
    s->z.next_out = &more, s->z.avail_out = 1;
    return inflate(&s->z, Z_FINISH) == Z_STREAM_END && s->z.avail_out == 1;
}

static int read_head(struct idx *x, struct source *s, size_t file, struct err *e) {
    unsigned char head[4], dim[4];
    if (!take(s, head, 4)) return err_set(e, E_FORMAT, "it is too short for an IDX file, or its gzip stream is damaged");
    if (head[0] || head[1] || head[2] != 8) return err_set(e, E_FORMAT, "it is not an IDX file of unsigned bytes");
    if (head[3] < 1 || head[3] > 3) return err_set(e, E_FORMAT, "it is an IDX array of %d dimensions, not 1 to 3", head[3]);
    x->ndim = head[3];
    x->count = 1;
    for (int i = 0; i < x->ndim; i++) {
        if (!take(s, dim, 4)) return err_set(e, E_FORMAT, "it ends inside its header");
        x->shape[i] = (int64_t)dim[0] << 24 | dim[1] << 16 | dim[2] << 8 | dim[3];
        if (x->shape[i] == 0) return err_set(e, E_FORMAT, "it holds nothing: dimension %d is 0", i);
        if (mul_overflows(x->count, (size_t)x->shape[i], &x->count) || x->count > MAX_ARRAY)
            return err_set(e, E_RANGE, "its header claims more than 4 GiB");
    }
    if (x->count > (s->gzip ? file * DEFLATE_RATIO : file))
        return err_set(e, E_FORMAT, "its header claims %zu bytes, more than a file of %zu can hold", x->count, file);
    return OK;
}

static int read_array(struct idx *x, struct source *s, size_t file, struct err *e) {
    int rc = read_head(x, s, file, e);
    if (rc != OK) return rc;
    if (!(x->data = mem_alloc(x->count))) return err_set(e, E_NOMEM, "no memory for %zu bytes", x->count);
    if (!take(s, x->data, x->count))
        return err_set(e, E_FORMAT, "it ends before the %zu bytes that its header claims, or is damaged", x->count);
    return ended(s) ? OK
                    : err_set(e, E_FORMAT, "it goes on behind the %zu bytes that its header claims, or its check sum is wrong",
                              x->count);
}

int idx_read(struct idx *x, const char *path, struct err *e) {
    struct err local = {0};
    void *bytes;
    size_t n;
    if (!e) e = &local;
    *x = (struct idx){0};
    int rc = file_read(&bytes, &n, path, MAX_FILE, e);
    if (rc != OK) return rc;
    struct source s = {.at = bytes, .left = n, .gzip = n > 2 && !memcmp(bytes, "\x1f\x8b", 2)};
    s.z = (z_stream){.next_in = bytes, .avail_in = (uInt)n};
    if (s.gzip && inflateInit2(&s.z, 16 + MAX_WBITS) != Z_OK) rc = err_set(e, E_NOMEM, "no memory to inflate it");
    if (rc == OK) {
        rc = read_array(x, &s, n, e);
        if (s.gzip) inflateEnd(&s.z);
    }
    mem_free(bytes);
    if (rc == OK) return OK;
    mem_free(x->data);
    *x = (struct idx){0};
    err_prefix(e, "%s", path);
    return rc;
}
