// SPDX-License-Identifier: MIT
/*
 * PATH.part is the archive itself, unfinished, so that ten gigabytes are written once and never copied:
 *
 *   local header of "arr_0.npy", with two extra fields: ZIP64 sizes, where needed, and our progress record
 *   the npy header, padded with spaces so that the pixels begin on a multiple of 64
 *   the pixels
 *   (when whole) the central directory
 *
 * The record lies at a fixed place in the first 512 bytes. Pixels reach the disk before the record that counts them, so whatever stops the process or
 * the machine, the counted part is good; what lies behind it is written again. The record carries the CRC so far, hence the archive's CRC covers
 * the bytes as they were made, and damage to the disk between two runs is found by whoever reads the archive. Readers of zip files skip extra
 * fields that they don't know; the finished file keeps the record and so tells what it was made from.
 *
 * Zip facts: APPNOTE.TXT 4.3.7, 4.3.12, 4.3.14 to 4.3.16, 4.5.3. A size that needs more than 32 bits is written as 0xffffffff with the true one in the
 * ZIP64 field; below that no ZIP64 is written, as older readers refuse it. npy facts: numpy.lib.format, version 1.0.
 */
#include "core/io/npz.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/io/file.h"

#define MEMBER "arr_0.npy"
#define NAME_LEN (sizeof MEMBER - 1)
#define LOCAL 30u
#define FRONT 512u         // local header, extra fields and npy header; a multiple of 64
#define MOST32 0xffffffffu // in a 32-bit field: look in the ZIP64 field
#define RECORD_ID 0x7453   // "St", of no field in the registry
#define RECORD_AT (LOCAL + NAME_LEN + 4)
#define RECORD 192u // "sitd-npz", version, n, height, width, done, crc, request, model, zeros, CRC of all that
#define DOS_DATE 0x21 // 1980-01-01: the same pictures make the same file

static unsigned char *put(unsigned char *p, uint64_t v, int bytes) {
    for (int i = 0; i < bytes; i++) *p++ = (unsigned char)(v >> (8 * i));
    return p;
}

static uint64_t get(const unsigned char *p, int bytes) {
    uint64_t v = 0;
    for (int i = 0; i < bytes; i++) v |= (uint64_t)p[i] << (8 * i);
    return v;
}

static int fail(struct err *e, int code, const char *verb, const char *path) {
    int status = code == ENOENT || code == ENOTDIR ? E_NOTFOUND : code == EACCES || code == EPERM || code == EROFS ? E_PERM : E_IO;
    char why[128];
    return err_set(e, status, "cannot %s %s: %s", verb, path, strerror_r(code, why, sizeof why));
}

static int write_at(const struct npz_out *z, const void *bytes, size_t n, uint64_t at, struct err *e) {
    for (const char *p = bytes; n > 0;) {
        if (fault_hit(FAULT_WRITE)) return fail(e, ENOSPC, "write", z->part);
        ssize_t wrote = pwrite(z->fd, p, n < (1u << 30) ? n : 1u << 30, (off_t)at);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote <= 0) return fail(e, wrote ? errno : EIO, "write", z->part);
        p += wrote;
        at += (uint64_t)wrote;
        n -= (size_t)wrote;
    }
    return OK;
}

static uint64_t pixels_end(const struct npz_out *z) { return z->head + z->done * z->bytes_each; }

/* ---- the front ---- */

static size_t npy_at(bool zip64) { return RECORD_AT + RECORD + (zip64 ? 20 : 0); }
static uint64_t member_size(const struct npz_out *z, bool zip64) { return FRONT - npy_at(zip64) + z->n * z->bytes_each; }
static bool needs_zip64(const struct npz_out *z) { return member_size(z, false) >= MOST32; }

static void make_record(unsigned char *record, const struct npz_spec *spec) {
    memset(record, 0, RECORD);
    memcpy(record, "sitd-npz", 8);
    put(record + 8, 1, 4);
    put(record + 12, spec->n, 8);
    put(record + 20, (uint64_t)spec->height, 4);
    put(record + 24, (uint64_t)spec->width, 4);
    memcpy(record + 40, spec->request, NPZ_DIGEST);
    memcpy(record + 104, spec->model, NPZ_DIGEST);
}

static void set_progress(struct npz_out *z) {
    unsigned char *record = z->front + RECORD_AT;
    put(record + 28, z->done, 8);
    put(record + 36, z->crc, 4);
    put(record + RECORD - 4, crc32_z(0, record, RECORD - 4), 4);
}

// All of the front; z->crc becomes that of the npy header, where the member begins.
static void make_front(struct npz_out *z, const struct npz_spec *spec) {
    bool zip64 = needs_zip64(z);
    size_t npy = npy_at(zip64);
    uint64_t size = member_size(z, zip64), size32 = zip64 ? MOST32 : size;
    unsigned char *p = put(z->front, 0x04034b50, 4);
    p = put(put(put(p, zip64 ? 45 : 20, 2), 0, 4), DOS_DATE << 16, 4); // no flags, stored
    p = put(put(put(put(put(p, 0, 4), size32, 4), size32, 4), NAME_LEN, 2), npy - LOCAL - NAME_LEN, 2); // CRC: known at the end
    memcpy(p, MEMBER, NAME_LEN);
    put(put(p + NAME_LEN, RECORD_ID, 2), RECORD, 2);
    make_record(z->front + RECORD_AT, spec);
    if (zip64) put(put(put(put(z->front + RECORD_AT + RECORD, 1, 2), 16, 2), size, 8), size, 8);
    memset(z->front + npy, ' ', FRONT - npy);
    memcpy(z->front + npy, "\x93NUMPY\x01\x00", 8);
    put(z->front + npy + 8, FRONT - npy - 10, 2);
    int n = snprintf((char *)z->front + npy + 10, FRONT - npy - 10, "{'descr': '|u1', 'fortran_order': False, 'shape': (%llu, %d, %d, %d), }",
                     (unsigned long long)z->n, spec->height, spec->width, NPZ_CHANNELS);
    z->front[npy + 10 + (size_t)n] = ' '; // snprintf's end
    z->front[FRONT - 1] = '\n';
    z->crc = (uint32_t)crc32_z(0, z->front + npy, FRONT - npy);
    set_progress(z);
}

/* ---- opening ---- */

static int other(struct err *e, const char *param, const char *part, const char *what) {
    return err_param(e, E_CONFLICT, param, "%s was begun with %s: finish it as it was begun, or remove it", part, what);
}

// Is `found`, the front of the file that is there, ours? Then its progress is taken over.
static int take_progress(struct npz_out *z, const unsigned char *found, uint64_t file_bytes, struct err *e) {
    const unsigned char *old = found + RECORD_AT, *mine = z->front + RECORD_AT;
    char what[96];
    if (get(found, 4) != 0x04034b50 || memcmp(old, mine, 12) != 0)
        return err_set(e, E_FORMAT, "%s is no unfinished export of this program: move it away", z->part);
    if (get(old + RECORD - 4, 4) != crc32_z(0, old, RECORD - 4))
        return err_set(e, E_FORMAT, "%s is damaged (the record in front of its pictures): remove it and begin anew", z->part);
    snprintf(what, sizeof what, "--num %llu", (unsigned long long)get(old + 12, 8));
    if (get(old + 12, 8) != z->n) return other(e, "n", z->part, what);
    snprintf(what, sizeof what, "pictures of %u x %u", (unsigned)get(old + 24, 4), (unsigned)get(old + 20, 4));
    if (memcmp(old + 20, mine + 20, 8) != 0) return other(e, "size", z->part, what);
    if (memcmp(old + 104, mine + 104, NPZ_DIGEST) != 0) return other(e, "model", z->part, "another model, or another version of it");
    if (memcmp(old + 40, mine + 40, NPZ_DIGEST) != 0)
        return other(e, "request", z->part, "another request (seed, labels, sampler, guidance, precision or back end)");
    z->done = get(old + 28, 8);
    z->crc = (uint32_t)get(old + 36, 4);
    if (z->done > z->n || file_bytes < pixels_end(z))
        return err_set(e, E_FORMAT, "%s is damaged (it is shorter than its record says): remove it and begin anew", z->part);
    set_progress(z);
    return OK;
}

static int begin_or_continue(struct npz_out *z, struct err *e) {
    struct stat st;
    unsigned char found[FRONT];
    if (fstat(z->fd, &st) != 0) return fail(e, errno, "stat", z->part);
    if (!S_ISREG(st.st_mode)) return err_set(e, E_UNSUPPORTED, "%s is not a regular file", z->part);
    if (st.st_size == 0) return write_at(z, z->front, FRONT, 0, e);
    ssize_t got = fault_hit(FAULT_READ) ? (errno = EIO, -1) : pread(z->fd, found, FRONT, 0);
    if (got < 0) return fail(e, errno, "read", z->part);
    if (got < (ssize_t)FRONT) return err_set(e, E_FORMAT, "%s is no unfinished export of this program: move it away", z->part);
    return take_progress(z, found, (uint64_t)st.st_size, e);
}

static int check_spec(const char *path, const struct npz_spec *spec, struct err *e) {
    struct stat st;
    if (spec->n < 1 || spec->n > (uint64_t)1 << 32) return err_param(e, E_RANGE, "n", "%s: 1 to 2^32 pictures can be written", path);
    if (spec->height < 1 || spec->width < 1 || spec->height > 65535 || spec->width > 65535)
        return err_param(e, E_RANGE, "size", "%s: pictures of %d x %d cannot be written", path, spec->width, spec->height);
    if (strlen(spec->request) != NPZ_DIGEST || strlen(spec->model) != NPZ_DIGEST) return err_set(e, E_INTERNAL, "%s: not a digest", path);
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) return err_set(e, E_UNSUPPORTED, "%s is not a regular file", path);
    return OK;
}

static int open_part(struct npz_out *z, struct err *e) {
    z->fd = open(z->part, O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0666); // O_NONBLOCK: a named pipe must not hold us up
    if (z->fd < 0) return fail(e, errno, "open", z->part);
    if (flock(z->fd, LOCK_EX | LOCK_NB) == 0) return OK;
    return errno == EWOULDBLOCK ? err_set(e, E_BUSY, "%s is being written by another process", z->part) : fail(e, errno, "lock", z->part);
}

int npz_open(struct npz_out *z, const char *path, const struct npz_spec *spec, struct err *e) {
    *z = (struct npz_out){.fd = -1, .n = spec->n, .head = FRONT};
    int rc = check_spec(path, spec, e);
    if (rc != OK) return rc;
    z->bytes_each = (size_t)spec->height * (size_t)spec->width * NPZ_CHANNELS;
    z->path = mem_strdup(path);
    z->part = mem_printf("%s.part", path);
    z->front = mem_alloc(FRONT);
    if (!z->path || !z->part || !z->front) rc = err_set(e, E_NOMEM, "no memory to write %s", path);
    if (rc == OK) make_front(z, spec);
    if (rc == OK) rc = open_part(z, e);
    if (rc == OK) rc = begin_or_continue(z, e);
    if (rc != OK) npz_close(z);
    return rc;
}

/* ---- pictures ---- */

static int append(struct npz_out *z, const uint8_t *rgb, struct err *e) {
    int rc = write_at(z, rgb, z->bytes_each, pixels_end(z), e);
    if (rc != OK) return rc;
    z->crc = (uint32_t)crc32_z(z->crc, rgb, z->bytes_each);
    z->done++;
    return OK;
}

int npz_add(struct npz_out *z, const uint8_t *pixels, size_t count, int channels, struct err *e) {
    int rc = OK;
    size_t each = z->bytes_each / NPZ_CHANNELS * (size_t)channels;
    if (channels != 1 && channels != NPZ_CHANNELS) return err_set(e, E_RANGE, "%s: pictures have 1 or 3 channels, not %d", z->path, channels);
    if (count > z->n - z->done) return err_set(e, E_RANGE, "%s: more pictures than were announced", z->path);
    uint8_t *rgb = channels == 1 ? mem_alloc(z->bytes_each) : NULL;
    if (channels == 1 && !rgb) return err_set(e, E_NOMEM, "no memory for a picture");
    for (size_t k = 0; k < count && rc == OK; k++) {
        const uint8_t *from = pixels + k * each;
        for (size_t i = 0; rgb && i < z->bytes_each; i++) rgb[i] = from[i / NPZ_CHANNELS];
        rc = append(z, rgb ? rgb : from, e);
    }
    mem_free(rgb);
    return rc;
}

static int to_disk(const struct npz_out *z, struct err *e) {
    bool fault = fault_hit(FAULT_WRITE);
    return fault || fdatasync(z->fd) != 0 ? fail(e, fault ? ENOSPC : errno, "sync", z->part) : OK;
}

int npz_sync(struct npz_out *z, struct err *e) {
    int rc = to_disk(z, e); // the pixels first
    if (rc != OK) return rc;
    set_progress(z);
    return write_at(z, z->front + RECORD_AT, RECORD, RECORD_AT, e);
}

/* ---- the end ---- */

static size_t make_directory(const struct npz_out *z, unsigned char *out) {
    bool zip64 = needs_zip64(z);
    uint64_t size = member_size(z, zip64), at = pixels_end(z), size32 = zip64 ? MOST32 : size;
    bool far = at >= MOST32; // the directory's own place
    unsigned char *p = put(out, 0x02014b50, 4), *end;
    p = put(put(put(put(p, 0x0300 | (zip64 ? 45 : 20), 2), zip64 ? 45 : 20, 2), 0, 4), DOS_DATE << 16, 4); // made on Unix: modes below are its
    p = put(put(put(p, z->crc, 4), size32, 4), size32, 4);
    p = put(put(put(put(p, NAME_LEN, 2), zip64 ? 20 : 0, 2), 0, 2), 0, 4);         // no comment, disk 0, no internal attributes
    p = put(put(p, (uint64_t)0100644 << 16, 4), 0, 4);                            // -rw-r--r--, local header at 0
    memcpy(p, MEMBER, NAME_LEN);
    p += NAME_LEN;
    if (zip64) p = put(put(put(put(p, 1, 2), 16, 2), size, 8), size, 8);
    end = p;
    uint64_t length = (uint64_t)(end - out);
    if (far) {
        p = put(put(put(put(put(p, 0x06064b50, 4), 44, 8), 45, 2), 45, 2), 0, 8);
        p = put(put(put(put(p, 1, 8), 1, 8), length, 8), at, 8);
        p = put(put(put(put(p, 0x07064b50, 4), 0, 4), at + length, 8), 1, 4);
    }
    p = put(put(put(put(p, 0x06054b50, 4), 0, 4), 1, 2), 1, 2);
    p = put(put(put(p, length, 4), far ? MOST32 : at, 4), 0, 2);
    return (size_t)(p - out);
}

int npz_commit(struct npz_out *z, struct err *e) {
    unsigned char directory[256], crc[4];
    if (z->done != z->n)
        return err_set(e, E_RANGE, "%s holds %llu of %llu pictures", z->part, (unsigned long long)z->done, (unsigned long long)z->n);
    size_t length = make_directory(z, directory);
    put(crc, z->crc, 4);
    int rc = npz_sync(z, e);
    if (rc == OK && ftruncate(z->fd, (off_t)pixels_end(z)) != 0) rc = fail(e, errno, "cut", z->part); // of an earlier attempt at this
    if (rc == OK) rc = write_at(z, directory, length, pixels_end(z), e);
    if (rc == OK) rc = write_at(z, crc, sizeof crc, 14, e);
    if (rc == OK) rc = to_disk(z, e);
    if (rc == OK && rename(z->part, z->path) != 0) rc = fail(e, errno, "rename a new file to", z->path);
    return rc == OK ? file_sync_parent(z->path, e) : rc;
}

void npz_close(struct npz_out *z) {
    if (z->fd >= 0) close(z->fd);
    mem_free(z->front);
    mem_free(z->path);
    mem_free(z->part);
    *z = (struct npz_out){.fd = -1};
}
