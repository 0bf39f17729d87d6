// SPDX-License-Identifier: MIT
#include "proto/emit.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"

static void raw(struct emit *e, const char *s, size_t n) {
    if (e->failed) return;
    if (n >= e->cap - e->len) {
        size_t want = e->cap ? e->cap : 256;
        while (want - e->len <= n) want *= 2;
        char *p = mem_resize(e->text, want, 1);
        if (!p) {
            e->failed = true;
            return;
        }
        e->text = p;
        e->cap = want;
    }
    memcpy(e->text + e->len, s, n);
    e->len += n;
    e->text[e->len] = 0;
}

static void word(struct emit *e, const char *s) { raw(e, s, strlen(s)); }

// Length of the UTF-8 sequence at s, 0 if it is none (overlong forms, surrogates and values past U+10FFFF included).
static int sequence(const unsigned char *s) {
    if (s[0] < 0x80) return 1;
    int n = s[0] >= 0xc2 && s[0] < 0xe0 ? 2 : (s[0] & 0xf0) == 0xe0 ? 3 : s[0] >= 0xf0 && s[0] < 0xf5 ? 4 : 0;
    for (int i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) return 0; // also stops at the end of the string
    if (n == 3 && ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] >= 0xa0))) return 0;
    if (n == 4 && ((s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] >= 0x90))) return 0;
    return n;
}

static void quoted(struct emit *e, const char *s) {
    char escape[8];
    word(e, "\"");
    while (*s) {
        const char *run = s; // as much as goes out unchanged, in one copy: images are long strings
        int n = 1;
        while ((unsigned char)*s >= 0x20 && *s != '"' && *s != '\\' && (n = sequence((const unsigned char *)s))) s += n;
        raw(e, run, (size_t)(s - run));
        if (!*s) break;
        if (n == 0) word(e, "\\ufffd");
        else if (*s == '"' || *s == '\\') snprintf(escape, sizeof escape, "\\%c", *s), word(e, escape);
        else snprintf(escape, sizeof escape, "\\u%04x", (unsigned char)*s), word(e, escape);
        s++;
    }
    word(e, "\"");
}

static void before(struct emit *e, const char *key) {
    char last = e->len ? e->text[e->len - 1] : '{';
    if (last != '{' && last != '[' && !e->failed) word(e, ",");
    if (!key) return;
    quoted(e, key);
    word(e, ":");
}

void emit_open(struct emit *e, const char *key, char bracket) {
    before(e, key);
    raw(e, &bracket, 1);
}

void emit_close(struct emit *e, char bracket) { raw(e, &bracket, 1); }

void emit_null(struct emit *e, const char *key) {
    before(e, key);
    word(e, "null");
}

void emit_string(struct emit *e, const char *key, const char *s) {
    if (!s) {
        emit_null(e, key);
        return;
    }
    before(e, key);
    quoted(e, s);
}

void emit_int(struct emit *e, const char *key, int64_t v) {
    char s[24];
    snprintf(s, sizeof s, "%" PRId64, v);
    before(e, key);
    word(e, s);
}

void emit_real(struct emit *e, const char *key, double v) {
    char s[40];
    if (v == 0) v = 0; // minus zero is the same number, but its text would be read back as another
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(s, sizeof s, "%.*g", digits, v);
        if (strtod(s, NULL) == v) break;
    }
    char *exponent = strchr(s, 'e'); // 1e-06 -> 1e-6
    if (exponent) {
        char *to = exponent + 1 + (exponent[1] == '-'), *from = exponent + 2;
        while (*from == '0') from++;
        memmove(to, from, strlen(from) + 1);
    }
    before(e, key);
    word(e, s);
}

void emit_bool(struct emit *e, const char *key, bool v) {
    before(e, key);
    word(e, v ? "true" : "false");
}

void emit_seed(struct emit *e, const char *key, uint64_t seed) {
    char s[24];
    if (seed < (uint64_t)1 << 53) {
        emit_int(e, key, (int64_t)seed);
        return;
    }
    snprintf(s, sizeof s, "%" PRIu64, seed);
    emit_string(e, key, s);
}

char *emit_take(struct emit *e) {
    char *text = e->text;
    if (e->failed) {
        mem_free(text);
        text = NULL;
    }
    *e = (struct emit){0};
    return text;
}
