// SPDX-License-Identifier: MIT
/*
 * zip
 *
 *   local header   "PK\3\4"  30 bytes + name + extra, then the member's data, perhaps a data descriptor   (once a member)
 *   central entry  "PK\1\2"  46 bytes + name + extra + comment                                            (once a member)
 *   [ZIP64 end     "PK\6\6"  56 bytes, and its locator "PK\6\7", 20 bytes]
 *   end            "PK\5\6"  22 bytes + comment, which must end at the end of the file
 *
 * Sizes and offsets come from the central directory: torch.save leaves them 0 in the local headers and puts them into data
 * descriptors. Only the lengths of the local header's own name and extra field come from there, since they differ (torch pads the
 * extra field so that data begins at a multiple of 64).
 *
 * Refused: several disks; compressed or encrypted members; an unequal size and compressed size; anything out of range; names that
 * differ between the two headers; duplicate names; members that overlap each other or the directory (a "better zip bomb" lets
 * thousands of members share bytes); a directory that is not exactly as long as said. CRCs are not compared: torch can be told
 * not to compute them (torch.serialization.set_crc32_options), and a model directory has SHA-256.
 */
#include "core/io/zip.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"

#define MAX_ENTRIES (1 << 20)

static uint64_t le(const unsigned char *p, int bytes) {
    uint64_t v = 0;
    while (bytes-- > 0) v = v << 8 | p[bytes];
    return v;
}

struct dir { // the central directory
    const unsigned char *file;
    size_t file_n;
    uint64_t offset, size, entries;
};

static bool is(const unsigned char *p, const char *magic) { return memcmp(p, magic, 4) == 0; }

// Where the directory ends must be where its ZIP64 end record, or else the end record, begins.
static int read_zip64(struct dir *d, size_t end, size_t *dir_end, struct err *e) {
    if (end < 20 || !is(d->file + end - 20, "PK\6\7")) return OK;
    const unsigned char *locator = d->file + end - 20;
    uint64_t at = le(locator + 8, 8);
    if (le(locator + 4, 4) != 0 || le(locator + 16, 4) > 1)
        return err_set(e, E_UNSUPPORTED, "the zip is spread over several disks");
    if (end - 20 < 56 || at > end - 20 - 56 || !is(d->file + at, "PK\6\6"))
        return err_set(e, E_FORMAT, "the zip's ZIP64 end record is not where its locator says");
    const unsigned char *r = d->file + at;
    if (le(r + 16, 4) != 0 || le(r + 20, 4) != 0 || le(r + 24, 8) != le(r + 32, 8))
        return err_set(e, E_UNSUPPORTED, "the zip is spread over several disks");
    d->entries = le(r + 32, 8);
    d->size = le(r + 40, 8);
    d->offset = le(r + 48, 8);
    *dir_end = (size_t)at;
    return OK;
}

static int find_dir(struct dir *d, struct err *e) {
    size_t end = 0, tail = d->file_n < 22 + 65535 ? d->file_n : 22 + 65535;
    for (size_t back = 22; back <= tail && !end; back++) {
        const unsigned char *p = d->file + d->file_n - back;
        if (is(p, "PK\5\6") && le(p + 20, 2) == back - 22) end = d->file_n - back;
    }
    if (!end) return err_set(e, E_FORMAT, "the zip has no end record: the file is cut short or damaged");
    const unsigned char *p = d->file + end;
    if (le(p + 4, 2) != 0 || le(p + 6, 2) != 0 || le(p + 8, 2) != le(p + 10, 2))
        return err_set(e, E_UNSUPPORTED, "the zip is spread over several disks");
    d->entries = le(p + 10, 2);
    d->size = le(p + 12, 4);
    d->offset = le(p + 16, 4);
    size_t dir_end = end;
    int rc = read_zip64(d, end, &dir_end, e);
    if (rc != OK) return rc;
    if (d->offset > dir_end || d->size != dir_end - d->offset)
        return err_set(e, E_FORMAT, "the zip's directory is not where its end record says");
    if (d->entries > MAX_ENTRIES || d->entries * 46 > d->size)
        return err_set(e, E_FORMAT, "the zip's directory is too short for the entries it claims");
    return OK;
}

struct central { // one central entry; sizes as wide as ZIP64 makes them
    const unsigned char *name, *extra;
    size_t name_len, extra_len;
    uint64_t packed, size, local;
    unsigned flags, method;
};

// The ZIP64 extra field (id 1) holds, in this order, those of size, packed and local whose 32-bit fields are all ones.
static int widen(struct central *c, struct err *e) {
    uint64_t *wide[] = {&c->size, &c->packed, &c->local};
    for (size_t at = 0; at + 4 <= c->extra_len;) {
        size_t id = (size_t)le(c->extra + at, 2), len = (size_t)le(c->extra + at + 2, 2);
        if (len > c->extra_len - at - 4) break;
        const unsigned char *p = c->extra + at + 4, *end = p + len;
        for (int i = 0; id == 1 && i < 3; i++) {
            if (*wide[i] != 0xffffffffu) continue;
            if (end - p < 8) return err_set(e, E_FORMAT, "the zip has a ZIP64 field that is too short");
            *wide[i] = le(p, 8);
            p += 8;
        }
        at += 4 + len;
    }
    return OK;
}

static int read_central(struct central *c, const struct dir *d, uint64_t *at, struct err *e) {
    uint64_t left = d->offset + d->size - *at;
    const unsigned char *p = d->file + *at;
    if (left < 46 || !is(p, "PK\1\2")) return err_set(e, E_FORMAT, "the zip's directory is damaged");
    size_t name = (size_t)le(p + 28, 2), extra = (size_t)le(p + 30, 2), comment = (size_t)le(p + 32, 2);
    if (left < 46 + name + extra + comment) return err_set(e, E_FORMAT, "the zip's directory ends inside an entry");
    *c = (struct central){.name = p + 46,
                          .name_len = name,
                          .extra = p + 46 + name,
                          .extra_len = extra,
                          .packed = le(p + 20, 4),
                          .size = le(p + 24, 4),
                          .local = le(p + 42, 4),
                          .flags = (unsigned)le(p + 8, 2),
                          .method = (unsigned)le(p + 10, 2)};
    *at += 46 + name + extra + comment;
    return widen(c, e);
}

static int member_err(struct err *e, int status, const struct central *c, const char *why) {
    char name[80];
    size_t n = c->name_len < sizeof name - 1 ? c->name_len : sizeof name - 1;
    for (size_t i = 0; i < n; i++) name[i] = (char)(c->name[i] > 0x20 && c->name[i] < 0x7f ? c->name[i] : '?');
    name[n] = 0;
    return err_param(e, status, name, "zip member '%s' %s", name, why);
}

static int read_member(struct zip_entry *z, const struct central *c, const struct dir *d, struct err *e) {
    if (c->flags & (1 | 1 << 6 | 1 << 13)) return member_err(e, E_UNSUPPORTED, c, "is encrypted");
    if (c->method != 0) return member_err(e, E_UNSUPPORTED, c, "is compressed; torch.save stores without compression");
    if (c->packed != c->size) return member_err(e, E_FORMAT, c, "has two different sizes");
    if (c->local > d->offset || d->offset - c->local < 30) return member_err(e, E_FORMAT, c, "begins outside the file");
    const unsigned char *p = d->file + c->local;
    if (!is(p, "PK\3\4")) return member_err(e, E_FORMAT, c, "has no local header where the directory says");
    size_t name = (size_t)le(p + 26, 2), extra = (size_t)le(p + 28, 2);
    uint64_t room = d->offset - c->local - 30;
    if (room < name + extra || room - name - extra < c->size) return member_err(e, E_FORMAT, c, "reaches beyond the data");
    if (name != c->name_len || memcmp(p + 30, c->name, name) != 0)
        return member_err(e, E_FORMAT, c, "has another name in its local header");
    *z = (struct zip_entry){(const char *)c->name, c->name_len, (const char *)p + 30 + name + extra, (size_t)c->size,
                            30 + name + extra};
    return OK;
}

static int compare_names(const char *a, size_t an, const char *b, size_t bn) {
    int c = memcmp(a, b, an < bn ? an : bn);
    return c ? c : an < bn ? -1 : an > bn;
}

static int by_name(const void *pa, const void *pb) {
    const struct zip_entry *a = pa, *b = pb;
    return compare_names(a->name, a->name_len, b->name, b->name_len);
}

static int by_data(const void *pa, const void *pb) {
    const struct zip_entry *a = pa, *b = pb;
    if (a->data != b->data) return a->data < b->data ? -1 : 1;
    return a->size < b->size ? -1 : a->size > b->size;
}

// The local header of a member must lie behind the data of the one before.
static int check_apart(struct zip *z, struct err *e) {
    qsort(z->entries, (size_t)z->n, sizeof *z->entries, by_data);
    for (int i = 1; i < z->n; i++) {
        const struct zip_entry *a = &z->entries[i - 1], *b = &z->entries[i];
        if ((size_t)(b->data - a->data) < a->size + b->head) return err_set(e, E_FORMAT, "two members of the zip overlap");
    }
    qsort(z->entries, (size_t)z->n, sizeof *z->entries, by_name);
    for (int i = 1; i < z->n; i++)
        if (by_name(&z->entries[i - 1], &z->entries[i]) == 0)
            return err_set(e, E_FORMAT, "two members of the zip have the same name");
    return OK;
}

int zip_parse(struct zip *z, const void *bytes, size_t n, struct err *e) {
    struct dir d = {.file = bytes, .file_n = n};
    *z = (struct zip){0};
    int rc = find_dir(&d, e);
    if (rc != OK) return rc;
    if (!(z->entries = mem_array((size_t)d.entries, sizeof *z->entries)))
        return err_set(e, E_NOMEM, "no memory for the zip's directory");
    uint64_t at = d.offset;
    for (uint64_t i = 0; i < d.entries && rc == OK; i++) {
        struct central c;
        rc = read_central(&c, &d, &at, e);
        if (rc == OK) rc = read_member(&z->entries[z->n++], &c, &d, e);
    }
    if (rc == OK && at != d.offset + d.size) rc = err_set(e, E_FORMAT, "the zip's directory is longer than its entries");
    if (rc == OK && z->n) rc = check_apart(z, e);
    if (rc != OK) zip_close(z);
    return rc;
}

void zip_close(struct zip *z) {
    mem_free(z->entries);
    *z = (struct zip){0};
}

const struct zip_entry *zip_find(const struct zip *z, const char *name, size_t name_len) {
    int lo = 0, hi = z->n;
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2, c = compare_names(z->entries[mid].name, z->entries[mid].name_len, name, name_len);
        if (c == 0) return &z->entries[mid];
        if (c < 0) lo = mid + 1;
        else hi = mid;
    }
    return NULL;
}
