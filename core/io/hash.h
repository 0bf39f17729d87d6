// SPDX-License-Identifier: MIT
/*
 * hash: the SHA-256 of bytes in memory, by a thread of its own while others already use them; and CRC-32, against damage alone.
 *
 * One processor hashes about 1.5 GB/s, so the gigabytes of a checkpoint are hashed while they are looked at, converted and sent to the device;
 * whoever uses them asks for the result before anything depends on it. Where no thread is to be had, or it is not worth one, the work is
 * done at once. Thread: one at a time per struct hash.
 */
#ifndef SITD_IO_HASH_H
#define SITD_IO_HASH_H
#include <stddef.h>
#include <stdint.h>

#include "core/base/err.h"
#include "core/io/model_dir.h"

struct hash;
// n bytes, which must stay as they are until hash_wait or hash_free. E_NOMEM.
int hash_start(struct hash **, const void *bytes, size_t n, struct err *);
int hash_wait(struct hash *, char hex[DIGEST_HEX]); // lower-case hex; may be asked again. E_NOMEM
void hash_free(struct hash *);                      // stops the work if it is not done; NULL is fine

uint32_t hash_crc(uint32_t crc, const void *bytes, size_t n); // zlib's, of what crc is of and these; begins with 0

#endif
