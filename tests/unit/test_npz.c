// SPDX-License-Identifier: MIT
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/npz.h"
#include "tests/test.h"

#define A "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
#define B "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
#define N 7
#define H 3
#define W 5

static char dir[64], path[96], part[112];
static uint8_t pixels[N][H * W * 3];
static const struct npz_spec spec = {.n = N, .height = H, .width = W, .request = A, .model = B};

static void begin(void) {
    snprintf(dir, sizeof dir, "/tmp/sitd-npz-XXXXXX");
    CHECK(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/x.npz", dir);
    snprintf(part, sizeof part, "%s.part", path);
    for (size_t i = 0; i < sizeof pixels; i++) pixels[i / sizeof *pixels][i % sizeof *pixels] = (uint8_t)(i * 37 + i / 11);
}

static void end(void) {
    unlink(path);
    unlink(part);
    rmdir(dir);
}

static uint64_t le(const unsigned char *p, int bytes) {
    uint64_t v = 0;
    for (int i = bytes; i-- > 0;) v = v << 8 | p[i];
    return v;
}

static unsigned char *slurp(const char *name, size_t *n) {
    void *bytes;
    struct err e = {0};
    CHECK_OK(file_read(&bytes, n, name, 1 << 20, &e), &e);
    return bytes;
}

// A reader of its own: end record, directory entry, local header, npy header, CRC, pixels
static void check_file(const uint8_t *want) {
    size_t n;
    unsigned char *f = slurp(path, &n), *last = f + n - 22, *entry = f + le(last + 16, 4), *local = f + le(entry + 42, 4);
    CHECK(le(last, 4) == 0x06054b50 && le(last + 8, 2) == 1 && le(last + 10, 2) == 1 && le(last + 20, 2) == 0);
    CHECK(entry + le(last + 12, 4) == last && le(entry, 4) == 0x02014b50 && local == f && le(local, 4) == 0x04034b50);
    CHECK(memcmp(local + 6, entry + 8, 22) == 0 && le(local + 8, 2) == 0); // what both say of it is the same; stored
    CHECK(le(local + 26, 2) == 9 && memcmp(local + 30, "arr_0.npy", 9) == 0 && memcmp(entry + 46, "arr_0.npy", 9) == 0);
    unsigned char *npy = local + 39 + le(local + 28, 2);
    size_t size = le(local + 18, 4), head = 10 + le(npy + 8, 2);
    CHECK(size == le(local + 22, 4) && npy + size == entry && size == head + N * H * W * 3);
    CHECK(crc32(0, npy, (unsigned)size) == le(local + 14, 4));
    CHECK(memcmp(npy, "\x93NUMPY\x01\x00", 8) == 0 && npy[head - 1] == '\n' && (size_t)(npy + head - f) % 64 == 0);
    const char *dict = "{'descr': '|u1', 'fortran_order': False, 'shape': (7, 3, 5, 3), }";
    CHECK(memcmp(npy + 10, dict, strlen(dict)) == 0 && npy[10 + strlen(dict)] == ' ');
    CHECK(memcmp(npy + head, want, N * H * W * 3) == 0);
    mem_free(f);
}

TEST(npz_holds_what_was_added) {
    struct npz_out z;
    struct err e = {0};
    uint8_t grey[N][H * W], want[N * H * W * 3];
    begin();
    for (int turn = 0; turn < 2; turn++) { // the second replaces the first's file
        for (int i = 0; i < N * H * W; i++) {
            grey[i / (H * W)][i % (H * W)] = (uint8_t)(i * 5);
            for (int c = 0; c < 3; c++) want[3 * i + c] = (uint8_t)(i * 5);
        }
        CHECK_OK(npz_open(&z, path, &spec, &e), &e);
        CHECK(z.done == 0);
        CHECK_OK(npz_add(&z, turn ? *pixels : *grey, 3, turn ? 3 : 1, &e), &e);
        CHECK_OK(npz_add(&z, turn ? pixels[3] : grey[3], N - 3, turn ? 3 : 1, &e), &e);
        CHECK_OK(npz_commit(&z, &e), &e);
        npz_close(&z);
        CHECK(access(part, F_OK) != 0);
        check_file(turn ? *pixels : want);
    }
    end();
}

TEST(npz_continues) {
    struct npz_out z;
    struct err e = {0};
    size_t n, m;
    begin();
    CHECK_OK(npz_open(&z, path, &spec, &e), &e);
    CHECK_OK(npz_add(&z, *pixels, N, 3, &e), &e);
    CHECK_OK(npz_commit(&z, &e), &e);
    npz_close(&z);
    unsigned char *whole = slurp(path, &n), *again;
    unlink(path);
    for (uint64_t i = 0; i < N; i++) { // a run for each picture, and one more that is not counted: not even what belongs there
        CHECK_OK(npz_open(&z, path, &spec, &e), &e);
        CHECK(z.done == i);
        CHECK_OK(npz_add(&z, pixels[i], 1, 3, &e), &e);
        CHECK_OK(npz_sync(&z, &e), &e);
        if (i + 1 < N) CHECK_OK(npz_add(&z, pixels[0], 1, 3, &e), &e);
        npz_close(&z);
    }
    CHECK_OK(npz_open(&z, path, &spec, &e), &e);
    CHECK(z.done == N);
    CHECK_OK(npz_commit(&z, &e), &e);
    npz_close(&z);
    again = slurp(path, &m);
    CHECK(n == m && memcmp(whole, again, n) == 0);
    mem_free(whole);
    mem_free(again);
    end();
}

static void refused(const struct npz_spec *s, const char *where, int status, const char *param, const char *text) {
    struct npz_out z;
    struct err e = {0};
    int rc = npz_open(&z, where, s, &e);
    if (rc != status || strcmp(e.param, param) != 0 || !strstr(e.text, text))
        test_fail(__FILE__, __LINE__, "%d %s %s instead of %d %s %s", rc, e.param, e.text, status, param, text);
    npz_close(&z); // harmless
}

TEST(npz_refuses_what_is_another) {
    struct npz_out z;
    struct err e = {0};
    begin();
    CHECK_OK(npz_open(&z, path, &spec, &e), &e);
    CHECK_OK(npz_add(&z, *pixels, 2, 3, &e), &e);
    CHECK_OK(npz_sync(&z, &e), &e);
    refused(&spec, path, E_BUSY, "", "x.npz.part is being written by another process");
    CHECK(npz_add(&z, *pixels, N - 1, 3, &e) == E_RANGE && npz_add(&z, *pixels, 1, 2, NULL) == E_RANGE && npz_commit(&z, NULL) == E_RANGE);
    npz_close(&z);
    struct npz_spec s = spec;
    s.n++;
    refused(&s, path, E_CONFLICT, "n", "--num 7");
    s = spec, s.width = 4;
    refused(&s, path, E_CONFLICT, "size", "5 x 3");
    s = spec, s.request = B;
    refused(&s, path, E_CONFLICT, "request", "another request");
    s = spec, s.model = A;
    refused(&s, path, E_CONFLICT, "model", "another model");
    s = spec, s.n = 0;
    refused(&s, path, E_RANGE, "n", "1 to");
    s = spec, s.height = 65536;
    refused(&s, path, E_RANGE, "size", "65536");
    refused(&spec, "/tmp/no/such/folder.npz", E_NOTFOUND, "", "/tmp/no/such/folder.npz.part");
    refused(&spec, dir, E_UNSUPPORTED, "", "not a regular file");
    end();
}

static void write_part(const void *bytes, size_t n) {
    FILE *f = fopen(part, "wb");
    CHECK(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0);
}

// Any one byte of the record changed, or the file cut anywhere, is refused.
TEST(npz_refuses_damage) {
    struct npz_out z;
    struct err e = {0};
    size_t n;
    begin();
    CHECK_OK(npz_open(&z, path, &spec, &e), &e);
    CHECK_OK(npz_add(&z, *pixels, 2, 3, &e), &e);
    CHECK_OK(npz_sync(&z, &e), &e);
    npz_close(&z);
    unsigned char *good = slurp(part, &n);
    for (size_t cut = 1; cut < n; cut++) {
        write_part(good, cut);
        refused(&spec, path, E_FORMAT, "", cut < 512 ? "no unfinished export" : "shorter than its record says");
    }
    for (size_t i = 43; i < 43 + 192; i++) { // the record
        good[i] ^= 0x10;
        write_part(good, n);
        refused(&spec, path, E_FORMAT, "", i < 43 + 12 ? "no unfinished export" : "damaged");
        good[i] ^= 0x10;
    }
    write_part(good, 0); // killed before the first byte
    CHECK_OK(npz_open(&z, path, &spec, &e), &e);
    CHECK(z.done == 0);
    npz_close(&z);
    mem_free(good);
    end();
}

static int all_of_it(struct err *e) {
    struct npz_out z;
    int rc = npz_open(&z, path, &spec, e);
    while (rc == OK && z.done < N) {
        rc = npz_add(&z, pixels[z.done], 1, 3, e);
        if (rc == OK) rc = npz_sync(&z, e);
    }
    if (rc == OK) rc = npz_commit(&z, e);
    npz_close(&z);
    return rc;
}

TEST(npz_survives_faults) {
    static const enum fault_kind kinds[] = {FAULT_WRITE, FAULT_READ, FAULT_ALLOC};
    begin();
    for (int k = 0; k < 3; k++)
        for (int nth = 1, rc = -1; rc != OK; nth++) {
            struct err e = {0};
            CHECK(nth < 100);
            unlink(path);
            fault_arm(kinds[k], nth, false);
            rc = all_of_it(&e);
            fault_disarm();
            CHECK(rc == OK || rc == e.status);
            CHECK(rc == OK || rc == (kinds[k] == FAULT_ALLOC ? E_NOMEM : E_IO));
            if (rc == OK && kinds[k] == FAULT_WRITE) CHECK(nth > 20);
            if (rc != OK && (err_clear(&e), access(path, F_OK) != 0)) CHECK_OK(all_of_it(&e), &e); // continues what is there
            check_file(*pixels);
        }
    end();
}

// Around 4 GiB, in a file of holes: sizes and places that need 64 bits have them, in the header, the directory and its end; others have none.
TEST(npz_sizes_beyond_4_gib) {
    static const struct { uint64_t n; bool far, big; } cases[] = {{1431655500, false, false}, {1431655600, true, false}, {1431655772, true, true}, {3276800000, true, true}};
    struct err e = {0};
    begin();
    for (int i = 0; i < 4; i++) {
        struct npz_out z;
        struct npz_spec s = {.n = cases[i].n, .height = 1, .width = 1, .request = A, .model = B};
        unsigned char front[512], tail[256];
        CHECK_OK(npz_open(&z, path, &s, &e), &e);
        uint64_t end_of_pixels = 512 + 3 * s.n;
        CHECK(ftruncate(z.fd, (off_t)end_of_pixels) == 0);
        z.done = s.n; // as if they were black
        CHECK_OK(npz_commit(&z, &e), &e);
        npz_close(&z);
        FILE *f = fopen(path, "rb");
        CHECK(f && fread(front, 1, 512, f) == 512 && fseeko(f, (off_t)end_of_pixels, SEEK_SET) == 0);
        size_t length = fread(tail, 1, sizeof tail, f);
        fclose(f);
        uint64_t npy = 39 + le(front + 28, 2), size = end_of_pixels - npy;
        bool big = cases[i].big, far = cases[i].far;
        CHECK(big == (size >= 0xffffffff) && far == (end_of_pixels >= 0xffffffff));
        CHECK(le(front + 18, 4) == (big ? 0xffffffff : size) && le(front + 22, 4) == le(front + 18, 4));
        CHECK(le(front + 4, 2) == (big ? 45 : 20) && le(tail + 6, 2) == le(front + 4, 2));
        unsigned char *extra = front + 39 + 4 + 192, *own = tail + 46 + 9, *close_by = tail + 46 + 9 + (big ? 20 : 0);
        if (big) CHECK(le(extra, 4) == 0x00100001 && le(extra + 4, 8) == size && le(extra + 12, 8) == size && memcmp(extra, own, 20) == 0);
        if (big) CHECK(le(tail + 20, 4) == 0xffffffff && le(tail + 24, 4) == 0xffffffff);
        CHECK(le(tail + 30, 2) == (big ? 20 : 0) && le(close_by, 4) == (far ? 0x06064b50 : 0x06054b50));
        if (far) {
            CHECK(le(close_by + 4, 8) == 44 && le(close_by + 24, 8) == 1 && le(close_by + 32, 8) == 1);
            CHECK(le(close_by + 40, 8) == (uint64_t)(close_by - tail) && le(close_by + 48, 8) == end_of_pixels);
            CHECK(le(close_by + 56, 4) == 0x07064b50 && le(close_by + 64, 8) == end_of_pixels + (uint64_t)(close_by - tail));
            close_by += 76;
        }
        CHECK(le(close_by, 4) == 0x06054b50 && le(close_by + 16, 4) == (far ? 0xffffffff : end_of_pixels));
        CHECK((size_t)(close_by + 22 - tail) == length);
        unlink(path);
    }
    end();
}
