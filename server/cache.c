// SPDX-License-Identifier: MIT
#include "server/cache.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// By the XDG rules a path that is not absolute counts as none.
const char *cache_folder(const char *option, char *path, size_t size) {
    const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int n = -1;
    if (!strcmp(option, "none")) return NULL;
    if (*option) n = snprintf(path, size, "%s", option);
    else if (xdg && *xdg == '/') n = snprintf(path, size, "%s/sitd", xdg);
    else if (home && *home == '/') n = snprintf(path, size, "%s/.cache/sitd", home);
    return n >= 0 && (size_t)n < size ? path : NULL;
}
