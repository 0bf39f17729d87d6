// SPDX-License-Identifier: MIT
/*
 * routes: what each path does. Loop thread only.
 */
#ifndef SITD_ROUTES_H
#define SITD_ROUTES_H
#include "server/http.h"

struct route {
    const char *path;               // "/v1/models/{}": {} stands for one segment, which is not empty
    const char *method;             // "GET" (HEAD comes with it) or "POST"
    void (*run)(struct exchange *); // the body is complete
};
#define ROUTES_MAX METRICS_ROUTES

// The route of a path, or NULL. *part is what {} stands for, *part_len its length.
const struct route *routes_find(const char *path, const char **part, size_t *part_len);
int routes_index(const struct route *); // 0 for NULL ("other"), for the metrics
const char *routes_name(int index);     // NULL past the last

#endif
