// SPDX-License-Identifier: MIT
// hash: beside others, at once, stopped; and what a large file read by several threads holds.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/hash.h"
#include "tests/test.h"

static unsigned char *noise(size_t n) {
    unsigned char *bytes = mem_alloc(n);
    CHECK(bytes);
    uint64_t x = 88172645463325252u;
    for (size_t i = 0; i + 8 <= n; i += 8) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        memcpy(bytes + i, &x, 8);
    }
    return bytes;
}

static void check_hash(const unsigned char *bytes, size_t n) {
    struct err e = {0};
    struct hash *h;
    char want[DIGEST_HEX], got[DIGEST_HEX];
    CHECK(digest_hex(want, bytes, n) == OK);
    CHECK_OK(hash_start(&h, bytes, n, &e), &e);
    for (int again = 0; again < 2; again++) {
        CHECK(hash_wait(h, got) == OK);
        CHECK_STR(got, want);
    }
    hash_free(h);
}

TEST(hash_is_that_of_all_bytes) {
    static const size_t sizes[] = {0, 1, 4095, (4u << 20) + 1, 8u << 20, (21u << 20) + 7};
    unsigned char *bytes = noise(22u << 20);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) check_hash(bytes, sizes[i]);
    fault_arm(FAULT_THREAD, 1, true); // no thread: at once
    check_hash(bytes, sizes[5]);
    CHECK(fault_count(FAULT_THREAD) == 1);
    fault_disarm();
    struct err e = {0};
    struct hash *h;
    CHECK_OK(hash_start(&h, bytes, sizes[5], &e), &e);
    hash_free(h); // in the middle
    mem_free(bytes);
}

TEST(file_large_is_read_whole) {
    size_t n = (size_t)77 * 1000 * 1000, back;
    unsigned char *bytes = noise(n);
    char path[] = "/tmp/sitd-large-XXXXXX";
    struct err e = {0};
    void *got;
    int fd = mkstemp(path);
    CHECK(fd >= 0 && write(fd, bytes, n) == (ssize_t)n);
    for (int alone = 0; alone < 2; alone++) { // without helpers too
        if (alone) fault_arm(FAULT_THREAD, 1, true);
        CHECK_OK(file_read(&got, &back, path, n, &e), &e);
        CHECK(back == n && memcmp(got, bytes, n) == 0 && ((char *)got)[n] == 0);
        mem_free(got);
        fault_disarm();
    }
    for (int i = 1; i <= 11; i += 10) { // one of the ten pieces, and the look at the end
        fault_arm(FAULT_READ, i, false);
        CHECK(file_read(&got, &back, path, n, &e) == E_IO && !got && strstr(e.text, path));
        fault_disarm();
        err_clear(&e);
    }
    close(fd);
    unlink(path);
    mem_free(bytes);
}
