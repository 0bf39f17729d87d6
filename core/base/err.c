// SPDX-License-Identifier: MIT
#include "core/base/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static int set(struct err *e, int status, const char *param, const char *fmt, va_list ap) {
    if (!e || e->status != OK) return status;
    e->status = status;
    snprintf(e->param, sizeof e->param, "%s", param);
    vsnprintf(e->text, sizeof e->text, fmt, ap);
    return status;
}

int err_set(struct err *e, int status, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    set(e, status, "", fmt, ap);
    va_end(ap);
    return status;
}

int err_param(struct err *e, int status, const char *param, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    set(e, status, param, fmt, ap);
    va_end(ap);
    return status;
}

int err_prefix(struct err *e, const char *fmt, ...) {
    if (!e || e->status == OK) return e ? e->status : OK;
    char prefix[sizeof e->text], whole[2 * sizeof e->text + 2];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(prefix, sizeof prefix, fmt, ap);
    va_end(ap);
    snprintf(whole, sizeof whole, "%s: %s", prefix, e->text);
    whole[sizeof e->text - 1] = 0;
    strcpy(e->text, whole);
    return e->status;
}

void err_clear(struct err *e) { *e = (struct err){0}; }

static const struct {
    const char *name;
    int exit_code;
} table[] = {
    [OK] = {"OK", 0},
    [-E_NOMEM] = {"E_NOMEM", 1},
    [-E_IO] = {"E_IO", 1},
    [-E_NOTFOUND] = {"E_NOTFOUND", 66},
    [-E_FORMAT] = {"E_FORMAT", 65},
    [-E_RANGE] = {"E_RANGE", 78},
    [-E_CONFLICT] = {"E_CONFLICT", 65},
    [-E_UNSUPPORTED] = {"E_UNSUPPORTED", 65},
    [-E_BUSY] = {"E_BUSY", 1},
    [-E_DEVICE] = {"E_DEVICE", 69},
    [-E_PERM] = {"E_PERM", 77},
    [-E_CANCELLED] = {"E_CANCELLED", 1},
    [-E_TIMEOUT] = {"E_TIMEOUT", 1},
    [-E_NONFINITE] = {"E_NONFINITE", 65},
    [-E_INTERNAL] = {"E_INTERNAL", 1},
};

const char *status_name(int status) {
    return status <= 0 && -status < (int)(sizeof table / sizeof *table) ? table[-status].name : "?";
}

int status_exit_code(int status) {
    return status <= 0 && -status < (int)(sizeof table / sizeof *table) ? table[-status].exit_code : 1;
}
