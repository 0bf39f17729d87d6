// SPDX-License-Identifier: MIT
/*
 * emit: writes JSON text into one growing buffer.
 *
 * Commas are put where they belong, strings are escaped and bytes that are not UTF-8 become U+FFFD, so that whatever a client
 * sent may be quoted in an error and the answer is still JSON. Numbers are the shortest decimal text that reads back as the same
 * value. A failed allocation is remembered and reported once, by emit_take. Thread: its owner's.
 */
#ifndef SITD_EMIT_H
#define SITD_EMIT_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct emit { // start with {0}
    char *text;
    size_t len, cap;
    bool failed;
};
void emit_open(struct emit *, const char *key, char bracket);    // '{' or '['; key NULL inside an array or at the top
void emit_close(struct emit *, char bracket);                    // '}' or ']'
void emit_string(struct emit *, const char *key, const char *s); // s NULL: null
void emit_int(struct emit *, const char *key, int64_t);
void emit_real(struct emit *, const char *key, double); // finite
void emit_bool(struct emit *, const char *key, bool);
void emit_null(struct emit *, const char *key);
// A seed: a number below 2^53, which every JSON reader holds exactly, else its decimal text as a string.
void emit_seed(struct emit *, const char *key, uint64_t);
char *emit_take(struct emit *); // the text, caller mem_free's; NULL on no memory (everything is freed then)

#endif
