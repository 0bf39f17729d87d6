// SPDX-License-Identifier: MIT
#include "server/assets.h"

#include <stdio.h>
#include <string.h>

#include "core/io/model_dir.h"

static struct asset assets[1];
#define N_ASSETS 0u

void assets_init(void) {
    for (size_t i = 0; i < N_ASSETS; i++) {
        char hex[DIGEST_HEX];
        digest_hex(hex, assets[i].bytes, assets[i].size);
        snprintf(assets[i].etag, sizeof assets[i].etag, "\"%.16s\"", hex);
    }
}

const struct asset *asset_find(const char *path) {
    for (size_t i = 0; i < N_ASSETS; i++)
        if (!strcmp(assets[i].path, path)) return &assets[i];
    return NULL;
}
