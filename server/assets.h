// SPDX-License-Identifier: MIT
/*
 * assets: the playground page and the contract, compiled into the binary. Thread: any after assets_init.
 */
#ifndef SITD_ASSETS_H
#define SITD_ASSETS_H
#include <stddef.h>

struct asset {
    const char *path, *type; // as in the URL; Content-Type
    const unsigned char *bytes;
    size_t size;
    char etag[20]; // quoted; of the bytes
};
void assets_init(void);                           // computes the tags
const struct asset *asset_find(const char *path); // NULL if there is none

#endif
