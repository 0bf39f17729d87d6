// SPDX-License-Identifier: MIT
#include "core/io/jsonio.h"

#include <stdint.h>
#include <string.h>

#include "core/base/mem.h"

void jsonio_printable(char *dst, size_t size, const char *text) {
    size_t n = 0;
    for (; n + 1 < size && text[n]; n++) dst[n] = (unsigned char)text[n] < 0x20 || text[n] == 0x7f ? '?' : text[n];
    while (n > 0 && n + 1 == size && ((unsigned char)dst[n - 1] & 0xc0) == 0x80) n--; // cut before a split character
    if (n > 0 && n + 1 >= size && (unsigned char)dst[n - 1] >= 0xc0) n--;
    dst[n] = 0;
}

// Bytes of the UTF-8 character at s (at most n left), or 0 when it is not one: no surrogates, no overlong forms.
static size_t utf8_len(const unsigned char *s, size_t n) {
    unsigned c = s[0];
    size_t len = c < 0x80 ? 1 : c >= 0xc2 && c < 0xe0 ? 2 : c >= 0xe0 && c < 0xf0 ? 3 : c >= 0xf0 && c < 0xf5 ? 4 : 0;
    if (len == 0 || len > n) return 0;
    for (size_t i = 1; i < len; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    if ((c == 0xe0 && s[1] < 0xa0) || (c == 0xed && s[1] >= 0xa0) || (c == 0xf0 && s[1] < 0x90) || (c == 0xf4 && s[1] >= 0x90))
        return 0;
    return len;
}

bool jsonio_plain(const char *text, size_t n) {
    for (size_t i = 0, len; i < n; i += len) {
        unsigned char c = (unsigned char)text[i];
        len = c < 0x20 || c == 0x7f ? 0 : utf8_len((const unsigned char *)text + i, n - i);
        if (len == 0) return false;
    }
    return true;
}

// Bounds nesting and values by looking at the punctuation outside strings; whether it is JSON at all is for the parser to say.
static int guard(const char *text, size_t len, int max_depth, size_t max_values, const char *what, struct err *e) {
    size_t values = 1;
    int depth = 0;
    bool quoted = false, escaped = false;
    for (size_t i = 0; i < len; i++) {
        char c = text[i];
        if ((unsigned char)c < 0x20 && c != '\n' && c != '\r' &&
            c != '\t') // jansson passes over zero bytes; other readers would not
            return err_set(e, E_FORMAT, "%s is not valid JSON: it holds a control character", what);
        if (quoted) {
            if (escaped) escaped = false;
            else if (c == '\\') escaped = true;
            else if (c == '"') quoted = false;
            continue;
        }
        if (c == '"') quoted = true;
        else if (c == ',' || c == '{' || c == '[') values++;
        if (c == '{' || c == '[') depth++;
        if (c == '}' || c == ']') depth--;
        if (depth > max_depth) return err_set(e, E_FORMAT, "%s is nested deeper than %d levels", what, max_depth);
        if (values > max_values) return err_set(e, E_FORMAT, "%s holds more than %zu values", what, max_values);
    }
    return OK;
}

/*
 * jansson 2.14 and memory that runs out. A failed allocation inside a token makes it report a syntax error, or drop a byte of the token
 * and go on ("9034" became "904"), or, when the byte was half of an escape, abort in an assertion; its writer drops bytes too.
 * So a call during which memory ran out counts as failed, whatever it returned; and to get out of the parser alive, what it asks
 * for from then on comes from a reserve that was taken before, while the text is fed to it in small pieces and ends there.
 * jansson's allocator is a process-wide pair of pointers: set it before any thread starts, so that the fault seam covers JSON as well.
 */
struct reserve {
    char *base;
    size_t size, used;
    bool starved;
};
static _Thread_local struct reserve *reserve; // of the parse that this thread is in

static void *json_alloc(size_t n) {
    void *p = mem_alloc(n);
    struct reserve *r = reserve;
    if (p || !r) return p;
    r->starved = true;
    size_t whole = (n + 15) & ~(size_t)15;
    if (whole < n || whole > r->size - r->used) return NULL;
    p = r->base + r->used;
    r->used += whole;
    return p;
}

static void json_release(void *p) {
    const struct reserve *r = reserve;
    if (r && (char *)p >= r->base && (char *)p < r->base + r->size) return;
    mem_free(p);
}

__attribute__((constructor)) static void use_our_allocator(void) { json_set_alloc_funcs(json_alloc, json_release); }

struct feed {
    const char *text;
    size_t left;
};

static size_t feed_some(void *buffer, size_t size, void *ctx) {
    enum { PIECE = 64 };
    struct feed *f = ctx;
    size_t n = f->left < PIECE ? f->left : PIECE;
    if (reserve->starved) return 0;
    if (n > size) n = size;
    memcpy(buffer, f->text, n);
    f->text += n, f->left -= n;
    return n;
}

json_t *jsonio_load(const char *text, size_t len, size_t flags, json_error_t *je, bool *starved) {
    // enough for the token at hand, which jansson copies at twice its size, and for the values of one piece
    struct reserve r = {.size = 4 * len + 16384};
    struct feed f = {text, len};
    *starved = len > SIZE_MAX / 8 || !(r.base = mem_alloc(r.size));
    if (*starved) return NULL;
    reserve = &r;
    json_t *root = json_load_callback(feed_some, &f, flags, je);
    *starved = r.starved;
    if (*starved) json_decref(root), root = NULL; // NULL is fine
    reserve = NULL;
    mem_free(r.base);
    return root;
}

int jsonio_parse(json_t **root, const char *text, size_t len, int max_depth, size_t max_values, const char *what, struct err *e) {
    *root = NULL;
    int rc = guard(text, len, max_depth, max_values, what, e);
    if (rc != OK) return rc;
    json_error_t je;
    bool starved;
    *root = jsonio_load(text, len, JSON_REJECT_DUPLICATES, &je, &starved);
    if (*root) return OK;
    if (starved) return err_set(e, E_NOMEM, "no memory to parse %s", what);
    char why[JSON_ERROR_TEXT_LENGTH];
    jsonio_printable(why, sizeof why, je.text);
    return err_set(e, E_FORMAT, "%s is not valid JSON: %s (line %d, column %d)", what, why, je.line, je.column);
}

char *jsonio_dump(const json_t *root, size_t flags) {
    unsigned long failures = mem_failures();
    char *text = json_dumps(root, flags);
    if (mem_failures() == failures) return text;
    mem_free(text);
    return NULL;
}
