// SPDX-License-Identifier: MIT
#include "tests/cuda/break_context.h"

#include "tests/test.h"

struct kern *other_handle(void) {
    struct kern *k;
    char why[256];
    if (kern_open(&k, &(struct kern_config){.backend = "cuda"}, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s", why);
    return k;
}

// An address that no kernel may write is an error that a context never gets over, whichever handle made it.
void break_context(void) {
    struct kern *k = other_handle();
    void *cols;
    float host[64];
    CHECK(k->alloc(k, sizeof host * KERN_COLS, &cols) == 0);
    (void)k->gather(k, (float *)16, cols, 64, &(struct kern_gather){.scale = 1}, 1);
    CHECK(k->download(k, host, cols, sizeof host) == KERN_EDEVICE);
    kern_close(k);
}
