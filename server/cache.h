// SPDX-License-Identifier: MIT
/* cache: where a command keeps what a GPU found out by trying. Thread: start-up (reads the environment). */
#ifndef SITD_CACHE_H
#define SITD_CACHE_H
#include <stddef.h>

#define CACHE_HELP "folder for the products that were found to be fastest on a GPU; empty: $XDG_CACHE_HOME/sitd or ~/.cache/sitd; none: do not keep them"

// The folder that `option` means: "" the user's own, "none" none. NULL where there is none, or its path is longer than size.
const char *cache_folder(const char *option, char *path, size_t size);

#endif
