// SPDX-License-Identifier: MIT
/*
 * npz: many pictures into one numpy archive, in pieces, over as many runs as it takes.
 *
 * The archive is what the ADM evaluator reads: one stored member arr_0.npy, uint8 [n, height, width, 3]. It grows as PATH.part, which is renamed
 * to PATH when it is whole. What kind of file PATH.part is, see on top of npz.c. Thread: one at a time per npz_out (no globals).
 */
#ifndef SITD_IO_NPZ_H
#define SITD_IO_NPZ_H
#include <stddef.h>
#include <stdint.h>

#include "core/base/err.h"

#define NPZ_CHANNELS 3
#define NPZ_DIGEST 64 // characters of a SHA-256 in hex

struct npz_spec {               // what the file is to hold; a PATH.part of another spec is not continued
    uint64_t n;                 // pictures, 1 .. 2^32
    int height, width;          // 1 .. 65535
    const char *request;        // digest of all that decides the pictures, but the model: NPZ_DIGEST characters. Borrowed
    const char *model;          // digest of the model, the same. Borrowed
};
struct npz_out {
    uint64_t done;              // pictures that the file holds
    uint64_t n;                 // PRIVATE, as all below
    size_t bytes_each, head;    // of a picture; of what stands in front of the first
    uint32_t crc;               // of the member so far
    int fd;                     // -1: closed
    unsigned char *front;       // [head]: local header, record, npy header
    char *path, *part;
};

// Makes PATH.part, or continues the one that is there: then `done` > 0 pictures are kept. Takes a lock on it, which npz_close or the process's
// end gives back. E_BUSY: another process writes it; E_CONFLICT: it belongs to another spec (param "n", "size", "request" or "model"); E_FORMAT: it
// is no such file or a damaged one; E_RANGE; E_NOTFOUND, E_PERM, E_IO, E_UNSUPPORTED (PATH is no file); E_NOMEM. Nothing is then left to close.
int npz_open(struct npz_out *, const char *path, const struct npz_spec *, struct err *);
// Appends `count` pictures of `channels` 1 (grey, repeated) or 3: [count, height, width, channels]. E_IO, E_RANGE (more than n), E_NOMEM.
int npz_add(struct npz_out *, const uint8_t *pixels, size_t count, int channels, struct err *);
// What was added is on the disk and counted in the file: a later npz_open continues behind it, even after a power cut. E_IO.
int npz_sync(struct npz_out *, struct err *);
// The whole file under its final name. done must be n. E_IO, E_RANGE. npz_close must still follow.
int npz_commit(struct npz_out *, struct err *);
void npz_close(struct npz_out *); // an unfinished PATH.part stays

#endif
