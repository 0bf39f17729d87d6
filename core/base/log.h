// SPDX-License-Identifier: MIT
/*
 * log: one line an event, JSON or text, to one sink.
 *
 * The sink (a file descriptor) and level are process-wide and set by main; everything else passes plain fields. A line is written
 * with one write(2), so lines of several threads never mix. JSON lines hold "time" (RFC 3339, ms, UTC), "level", "msg" and the
 * fields given, in order. Below main this is the only thing that writes to stderr, and only when main gave it a sink.
 * Thread: any, after log_open.
 */
#ifndef SITD_BASE_LOG_H
#define SITD_BASE_LOG_H
#include <stdbool.h>
#include <stdint.h>

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

struct log_field { // made with the macros below; value strings are borrowed for the call
    const char *key;
    enum { LOG_STR, LOG_INT, LOG_REAL, LOG_BOOL } type;
    union { const char *s; int64_t i; double d; bool b; } u;
};
#define log_str(k, v) ((struct log_field){ .key = (k), .type = LOG_STR, .u.s = (v) })
#define log_int(k, v) ((struct log_field){ .key = (k), .type = LOG_INT, .u.i = (v) })
#define log_real(k, v) ((struct log_field){ .key = (k), .type = LOG_REAL, .u.d = (v) })
#define log_bool(k, v) ((struct log_field){ .key = (k), .type = LOG_BOOL, .u.b = (v) })

void log_open(int fd, enum log_level least, bool json); // fd -1: silent (the default)
// Another file behind the sink's descriptor (SIGHUP after rotation). Takes fd. The number stays, so that a thread in the midst of a line
// never writes to a descriptor that was closed and means something else by now.
void log_reopen(int take_fd);
void log_event(enum log_level, const char *msg, const struct log_field *fields, int n);
// log_info("model loaded", log_str("model", name), log_int("bytes", n))
#define log_at(level, msg, ...) \
    log_event(level, msg, (struct log_field[]){ __VA_ARGS__ }, (int)(sizeof((struct log_field[]){ __VA_ARGS__ }) / sizeof(struct log_field)))
#define log_debug(msg, ...) log_at(LOG_DEBUG, msg, __VA_ARGS__)
#define log_info(msg, ...) log_at(LOG_INFO, msg, __VA_ARGS__)
#define log_warn(msg, ...) log_at(LOG_WARN, msg, __VA_ARGS__)
#define log_error(msg, ...) log_at(LOG_ERROR, msg, __VA_ARGS__)

#endif
