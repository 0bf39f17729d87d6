// SPDX-License-Identifier: MIT
// What the arch_*.c files share and nobody else includes.
#ifndef SITD_ARCH_LIST_H
#define SITD_ARCH_LIST_H
#include "core/io/checkpoint.h"

#define ARCH_MAX_DEPTH 1024

// "blocks.12.attn" under prefix "blocks." -> 12, *rest = "attn"; -1 when the name is not of that form.
int arch_block_number(const char *name, const char *prefix, const char **rest);

#endif
