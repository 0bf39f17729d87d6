// SPDX-License-Identifier: MIT
/*
 * zip: the directory of a zip archive whose members are stored, not compressed (what torch.save writes). Thread: any.
 */
#ifndef SITD_ZIP_H
#define SITD_ZIP_H
#include <stddef.h>

#include "core/base/err.h"

struct zip_entry {
    const char *name; // borrowed from the archive's bytes, not terminated
    size_t name_len;
    const char *data; // in the archive's bytes
    size_t size;
    size_t head; // PRIVATE: bytes of local header in front of data
};
struct zip {
    struct zip_entry *entries; // sorted by name
    int n;
};

// Checks the whole directory (rules on top of zip.c). The bytes must outlive the zip. On failure nothing is left to close.
int zip_parse(struct zip *, const void *bytes, size_t n, struct err *);
void zip_close(struct zip *);
const struct zip_entry *zip_find(const struct zip *, const char *name, size_t name_len); // NULL if absent

#endif
