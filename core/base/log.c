// SPDX-License-Identifier: MIT
#include "core/base/log.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static atomic_int sink = -1, least_level = LOG_INFO;
static atomic_bool as_json = true;
static const char *const level_names[] = {"debug", "info", "warn", "error"};

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

static void put_quoted(struct line *l, const char *s) {
    puts_(l, "\"");
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        char esc[8];
        if (l->n + 16 > sizeof l->text) break;
        if (c == '"' || c == '\\') snprintf(esc, sizeof esc, "\\%c", c);
        else if (c < 0x20 || c == 0x7f) snprintf(esc, sizeof esc, "\\u%04x", c);
        else snprintf(esc, sizeof esc, "%c", c);
        puts_(l, esc);
    }
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

void log_fd(int fd) { atomic_store(&sink, fd); }

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
