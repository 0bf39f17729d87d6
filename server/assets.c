// SPDX-License-Identifier: MIT
/* The files are pulled in by the assembler, from paths that begin at the repository's root, where gcc runs. */
#include "server/assets.h"

#include <stdio.h>
#include <string.h>

#include "core/io/model_dir.h"

#define EMBED(name, file)                                                                                                        \
    extern const unsigned char asset_##name[], asset_##name##_end[];                                                             \
    __asm__(".section .rodata\n.global asset_" #name "\n.global asset_" #name "_end\nasset_" #name ":\n.incbin \"" file          \
            "\"\nasset_" #name "_end:\n.byte 0\n.previous\n")

EMBED(openapi, "proto/openapi.json");
EMBED(page, "clients/web/index.html");
EMBED(script, "clients/web/app.js");
EMBED(style, "clients/web/style.css");
EMBED(icon, "clients/web/icon.svg");

static struct asset assets[] = {
    {.path = "/openapi.json", .type = "application/json", .bytes = asset_openapi},
    {.path = "/", .type = "text/html; charset=utf-8", .bytes = asset_page},
    {.path = "/app.js", .type = "text/javascript; charset=utf-8", .bytes = asset_script},
    {.path = "/style.css", .type = "text/css; charset=utf-8", .bytes = asset_style},
    {.path = "/icon.svg", .type = "image/svg+xml", .bytes = asset_icon},
};
static const unsigned char *const ends[] = {asset_openapi_end, asset_page_end, asset_script_end, asset_style_end, asset_icon_end};
#define N_ASSETS (sizeof assets / sizeof *assets)

void assets_init(void) {
    for (size_t i = 0; i < N_ASSETS; i++) {
        char hex[DIGEST_HEX];
        assets[i].size = (size_t)(ends[i] - assets[i].bytes);
        digest_hex(hex, assets[i].bytes, assets[i].size);
        snprintf(assets[i].etag, sizeof assets[i].etag, "\"%.16s\"", hex);
    }
}

const struct asset *asset_find(const char *path) {
    for (size_t i = 0; i < N_ASSETS; i++)
        if (!strcmp(assets[i].path, path)) return &assets[i];
    return NULL;
}
