// SPDX-License-Identifier: MIT
#include "proto/body.h"

#include <stdio.h>
#include <string.h>

#include "core/io/jsonio.h"

// What must be known before the parser sees the bytes: depth and number of values, counted by brackets and commas outside strings, and NUL, which jansson 2.14
// skips when it follows a number. Whatever else is wrong is the parser's to say.
static int scan(const char *s, size_t len, struct http_error *e) {
    int depth = 0, line = 1, column = 0, commas = 0;
    bool in_string = false;
    for (size_t i = 0; i < len; i++) {
        column += ((unsigned char)s[i] & 0xc0) != 0x80;
        if (s[i] == '\n') line++, column = 0;
        if (s[i] == 0) return http_error_set(e, 400, "invalid_json", NULL, "line %d, column %d: NUL byte", line, column);
        if (in_string) {
            if (s[i] == '\\' && i + 1 < len && (s[i + 1] == '"' || s[i + 1] == '\\')) i++, column++;
            else if (s[i] == '"') in_string = false;
        } else if (s[i] == '"') in_string = true;
        else if (s[i] == '}' || s[i] == ']') depth--;
        else if (s[i] == ',' && ++commas >= BODY_VALUES)
            return http_error_set(e, 400, "json_too_long", NULL, "line %d, column %d: more than %d values", line, column, BODY_VALUES);
        else if ((s[i] == '{' || s[i] == '[') && ++depth > BODY_DEPTH)
            return http_error_set(e, 400, "json_too_deep", NULL, "line %d, column %d: nested deeper than %d levels", line, column,
                                  BODY_DEPTH);
    }
    return 0;
}

// jansson ends its text with "near '<token>'": the token of a duplicate is the quoted key.
static void duplicate_key(const char *text, char *key, size_t size) {
    const char *from = strstr(text, "near '\""), *to = strrchr(text, '"');
    key[0] = 0;
    if (from && to && to > from + 7) snprintf(key, size, "%.*s", (int)(to - from - 7), from + 7);
}

// The key of the object that place `end` lies in, below the top; "" at the top. What is before `end` is sound JSON.
static void enclosing(const char *s, size_t end, char *group, size_t size) {
    size_t from = 0, to = 0; // the last string
    int depth = 0;
    group[0] = 0;
    for (size_t i = 0; i < end; i++) {
        if (s[i] == '"') {
            from = ++i;
            while (i < end && s[i] != '"') i += 1 + (s[i] == '\\');
            to = i;
        } else if (s[i] == '{' && ++depth == 2) snprintf(group, size, "%.*s.", (int)(to - from), s + from);
        else if (s[i] == '}' && --depth < 2) group[0] = 0;
    }
}

static int syntax_error(const json_error_t *je, const char *text, struct http_error *e) {
    char key[96], group[48], param[144];
    switch (json_error_code(je)) {
    case json_error_duplicate_key:
        duplicate_key(je->text, key, sizeof key);
        enclosing(text, je->position > 0 ? (size_t)je->position : 0, group, sizeof group);
        snprintf(param, sizeof param, "%s%s", group, key);
        return http_error_set(e, 400, "duplicate_key", param, "line %d, column %d: %s", je->line, je->column, je->text);
    case json_error_numeric_overflow:
        return http_error_set(e, 400, "number_overflow", NULL,
                              "line %d, column %d: %s (a seed of 2^63 or more is written as a string of digits)", je->line,
                              je->column, je->text);
    default:
        return http_error_set(e, 400, "invalid_json", NULL, "line %d, column %d: %s", je->line, je->column, je->text);
    }
}

int body_read(json_t **root, const char *bytes, size_t len, struct http_error *e) {
    json_error_t je;
    *root = NULL;
    if (len > REQUEST_MAX_BODY)
        return http_error_set(e, 413, "body_too_large", NULL, "the body has %zu bytes, at most %u are taken", len,
                              REQUEST_MAX_BODY);
    if (len == 0) return http_error_set(e, 400, "invalid_json", NULL, "the body is empty");
    if (scan(bytes, len, e) < 0) return -1;
    bool starved;
    *root = jsonio_load(bytes, len, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &je, &starved);
    if (*root) return 0;
    return starved ? http_error_set(e, 503, "out_of_memory", NULL, "out of memory") : syntax_error(&je, bytes, e);
}
