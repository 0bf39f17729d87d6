// SPDX-License-Identifier: MIT
/*
 * jsonio: JSON from outside, into jansson's values, with the guards that jansson lacks.
 *
 * jansson turns a two-byte array element into some 50 bytes of memory, so text is counted before it is parsed: nesting and number
 * of values are bounded. Duplicate keys, control characters and bytes behind the document are refused. All of jansson's memory
 * comes through core/base/mem.h as soon as this file is linked. Thread: any.
 */
#ifndef SITD_JSONIO_H
#define SITD_JSONIO_H
#include <jansson.h>
#include <stdbool.h>

#include "core/base/err.h"

// `what` names the document in messages ("header", "model.json"). *root is the caller's (json_decref). E_FORMAT, E_NOMEM.
int jsonio_parse(json_t **root, const char *text, size_t len, int max_depth, size_t max_values, const char *what, struct err *);
// json_loadb through the fault seam: NULL whenever memory ran out during the parse, and then *starved is true.
json_t *jsonio_load(const char *text, size_t len, size_t flags, json_error_t *, bool *starved);
// JSON text, the caller's (mem_free), or NULL for lack of memory (jansson's own json_dumps would leave characters out).
char *jsonio_dump(const json_t *, size_t flags);
// Copies at most size-1 bytes of text for a message: control characters become '?', so that a message stays one line.
void jsonio_printable(char *dst, size_t size, const char *text);
bool jsonio_plain(const char *text, size_t n); // valid UTF-8 without control characters

#endif
