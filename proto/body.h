// SPDX-License-Identifier: MIT
/*
 * body: a request's bytes to a JSON tree, strictly.
 *
 * Refused with 400 and a line and column: syntax, bytes after the value, NUL, invalid UTF-8, numbers that do not fit, a key that
 * occurs twice in an object (named), nesting deeper than BODY_DEPTH and more than BODY_VALUES values, which are looked for before the
 * recursive parser sees the bytes. Thread: any.
 */
#ifndef SITD_BODY_H
#define SITD_BODY_H
#include <jansson.h>

#include "proto/request.h"

#define BODY_DEPTH 16    // no request nests deeper than 4
#define BODY_VALUES 8192 // none has more than some 1,100; the parser makes 50 bytes and more of two, on the loop's thread

// 0 and *root (caller json_decref's), or -1 and the error.
int body_read(json_t **root, const char *bytes, size_t len, struct http_error *);

#endif
