// SPDX-License-Identifier: MIT
#include "core/base/log.h"

#include <fcntl.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static atomic_int sink = -1, least_level = LOG_INFO;
static atomic_bool as_json = true;
static const char *const level_names[] = {"debug", "info", "warn", "error"};

#define VALUE_MAX 1024 // bytes of one text, so that a long path does not push out the fields behind it

struct line { // bounded: a log line that does not fit is cut, never split
    char text[4096];
    size_t n;
};

static void put(struct line *l, const char *s, size_t n) {
    size_t room = sizeof l->text - 8 - l->n; // keeps room for the closing quote, brace and newline
    if (n > room) n = room;
    memcpy(l->text + l->n, s, n);
    l->n += n;
}

static void puts_(struct line *l, const char *s) { put(l, s, strlen(s)); }

// Length of the UTF-8 sequence at s, 0 if it is none.
static size_t sequence(const unsigned char *s) {
    size_t n = s[0] < 0x80 ? 1 : s[0] >= 0xc2 && s[0] < 0xe0 ? 2 : (s[0] & 0xf0) == 0xe0 ? 3 : s[0] >= 0xf0 && s[0] < 0xf5 ? 4 : 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) return 0; // also stops at the end of the string
    bool overlong = (s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xf0 && s[1] < 0x90);
    return overlong || (s[0] == 0xed && s[1] >= 0xa0) || (s[0] == 0xf4 && s[1] >= 0x90) ? 0 : n;
}

// Bytes that are not UTF-8 become U+FFFD, since a reader of the log would throw the whole line away.
static void put_quoted(struct line *l, const char *s) {
    size_t end = l->n + VALUE_MAX;
    puts_(l, "\"");
    while (*s && l->n < end && l->n + 16 <= sizeof l->text) {
        unsigned char c = (unsigned char)*s;
        size_t n = sequence((const unsigned char *)s);
        char esc[8];
        if (n == 0) puts_(l, "\xef\xbf\xbd");
        else if (n > 1 || (c >= 0x20 && c != 0x7f && c != '"' && c != '\\')) put(l, s, n);
        else {
            snprintf(esc, sizeof esc, c == '"' || c == '\\' ? "\\%c" : "\\u%04x", c);
            puts_(l, esc);
        }
        s += n ? n : 1;
    }
    if (*s) puts_(l, "\xe2\x80\xa6"); // an ellipsis: there was more
    l->text[l->n++] = '"';
}

static void put_value(struct line *l, const struct log_field *f) {
    char number[40];
    switch (f->type) {
    case LOG_STR: put_quoted(l, f->u.s ? f->u.s : ""); return;
    case LOG_INT: snprintf(number, sizeof number, "%lld", (long long)f->u.i); break;
    case LOG_REAL:
        if (isfinite(f->u.d)) snprintf(number, sizeof number, "%.6g", f->u.d);
        else snprintf(number, sizeof number, "null");
        break;
    case LOG_BOOL: snprintf(number, sizeof number, "%s", f->u.b ? "true" : "false"); break;
    }
    puts_(l, number);
}

static void put_time(struct line *l) {
    struct timespec now;
    struct tm tm;
    char day[40], text[64];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &tm);
    strftime(day, sizeof day, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(text, sizeof text, "%s.%03ldZ", day, now.tv_nsec / 1000000);
    puts_(l, text);
}

void log_open(int fd, enum log_level least, bool json) {
    atomic_store(&least_level, (int)least);
    atomic_store(&as_json, json);
    atomic_store(&sink, fd);
}

void log_reopen(int fd) {
    dup3(fd, atomic_load(&sink), O_CLOEXEC); // of two open descriptors it does not fail
    close(fd);
}

void log_event(enum log_level level, const char *msg, const struct log_field *fields, int n) {
    int fd = atomic_load(&sink);
    if (fd < 0 || (int)level < atomic_load(&least_level)) return;
    struct line l = {.n = 0};
    bool json = atomic_load(&as_json);
    if (json) puts_(&l, "{\"time\":\"");
    put_time(&l);
    puts_(&l, json ? "\",\"level\":\"" : " ");
    puts_(&l, level_names[level]);
    puts_(&l, json ? "\",\"msg\":" : " ");
    if (json) put_quoted(&l, msg);
    else puts_(&l, msg);
    for (int i = 0; i < n && l.n + 64 < sizeof l.text; i++) {
        puts_(&l, json ? ",\"" : " ");
        puts_(&l, fields[i].key);
        puts_(&l, json ? "\":" : "=");
        put_value(&l, &fields[i]);
    }
    if (json) l.text[l.n++] = '}';
    l.text[l.n++] = '\n';
    ssize_t ignored = write(fd, l.text, l.n);
    (void)ignored; // a log that cannot be written has nowhere to complain
}
