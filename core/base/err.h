// SPDX-License-Identifier: MIT
/*
 * err: what went wrong, as a status and a text.
 *
 * Nothing below main exits, aborts or prints. A function that can fail returns 0 or one of the negative statuses below and,
 * when its last argument `struct err *` is not NULL, leaves a text there that names the offending field, tensor or file.
 * The first failure wins: err_set never replaces a text that is already there, so an outer function may add nothing and
 * the innermost cause survives. Thread: an err belongs to its caller; no globals.
 */
#ifndef SITD_BASE_ERR_H
#define SITD_BASE_ERR_H

enum status {
    OK = 0,
    E_NOMEM = -1,       // memory could not be had
    E_IO = -2,          // read or write failed
    E_NOTFOUND = -3,    // no such file, model, label, job
    E_FORMAT = -4,      // bytes from outside that break their format's rules
    E_RANGE = -5,       // well-formed, but outside the allowed range
    E_CONFLICT = -6,    // the parts contradict each other
    E_UNSUPPORTED = -7, // valid, but not something this build does
    E_BUSY = -8,        // a bounded thing is full: try again later
    E_DEVICE = -9,      // a back end failed
    E_PERM = -10,       // permission
    E_CANCELLED = -11,  // asked to stop
    E_TIMEOUT = -12,    // deadline passed
    E_NONFINITE = -13,  // a NaN or infinity where a number must be
    E_INTERNAL = -14,   // a broken invariant of ours
};

struct err {
    int status;      // enum status; OK when nothing was set
    char param[64];  // the field, tensor or flag that is to blame, or ""
    char text[512];  // one sentence for a person, no newline
};

// Sets status and text unless e is NULL or already set; returns status, so that `return err_set(e, E_RANGE, ...)` reads well.
int err_set(struct err *e, int status, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
// The same, naming the field, tensor or flag in `param` (cut to fit).
int err_param(struct err *e, int status, const char *param, const char *fmt, ...) __attribute__((format(printf, 4, 5)));
// Puts "prefix: " before the text that is there (a file name before a parser's complaint); returns e's status.
int err_prefix(struct err *e, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void err_clear(struct err *e);
const char *status_name(int status); // "E_RANGE"; borrowed, never NULL
int status_exit_code(int status);    // the process exit code of design: 0, 1, 65, 66, 69, 77, 78

#endif
