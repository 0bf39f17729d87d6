// SPDX-License-Identifier: MIT
#include "core/io/hash.h"

#include <openssl/evp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <zlib.h>

#include "core/base/fault.h"
#include "core/base/mem.h"

#define WORTH_A_THREAD ((size_t)8 << 20)
#define PIECE ((size_t)4 << 20) // between two looks at `stop`

struct hash {
    const char *bytes;
    size_t n;
    EVP_MD_CTX *sha;
    pthread_t thread;
    bool running; // the thread is not joined yet
    atomic_bool stop;
    int status;
    char hex[DIGEST_HEX];
};

static int update(struct hash *h) {
    for (size_t at = 0; at < h->n && !atomic_load_explicit(&h->stop, memory_order_relaxed); at += PIECE)
        if (EVP_DigestUpdate(h->sha, h->bytes + at, h->n - at < PIECE ? h->n - at : PIECE) != 1) return E_NOMEM;
    return OK;
}

static void *run(void *arg) {
    struct hash *h = arg;
    unsigned char sha[EVP_MAX_MD_SIZE];
    h->status = update(h);
    if (h->status == OK && EVP_DigestFinal_ex(h->sha, sha, NULL) != 1) h->status = E_NOMEM;
    if (h->status == OK) digest_print(h->hex, sha);
    return NULL;
}

int hash_start(struct hash **out, const void *bytes, size_t n, struct err *e) {
    struct hash *h = *out = mem_alloc(sizeof *h);
    if (!h) return err_set(e, E_NOMEM, "no memory to hash %zu bytes", n);
    h->bytes = bytes, h->n = n;
    h->sha = EVP_MD_CTX_new();
    if (!h->sha || EVP_DigestInit_ex(h->sha, EVP_sha256(), NULL) != 1) {
        hash_free(h);
        return *out = NULL, err_set(e, E_NOMEM, "no memory to hash %zu bytes", n);
    }
    h->running = n >= WORTH_A_THREAD && !fault_hit(FAULT_THREAD) && pthread_create(&h->thread, NULL, run, h) == 0;
    if (!h->running) run(h);
    return OK;
}

int hash_wait(struct hash *h, char hex[DIGEST_HEX]) {
    if (h->running) pthread_join(h->thread, NULL);
    h->running = false;
    strcpy(hex, h->hex);
    return h->status;
}

void hash_free(struct hash *h) {
    char hex[DIGEST_HEX];
    if (!h) return;
    atomic_store(&h->stop, true);
    hash_wait(h, hex);
    EVP_MD_CTX_free(h->sha);
    mem_free(h);
}

uint32_t hash_crc(uint32_t crc, const void *bytes, size_t n) { return (uint32_t)crc32_z(crc, bytes, n); }
