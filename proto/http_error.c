// SPDX-License-Identifier: MIT
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "proto/emit.h"
#include "proto/request.h"

static const char *type_of(int status, const char *code) {
    switch (status) {
    case 401:
        return "authentication_error";
    case 403:
        return "permission_error";
    case 404:
        return "not_found_error";
    case 429:
        return "rate_limit_error";
    case 503:
        return strcmp(code, "queue_full") == 0 ? "overloaded_error" : "unavailable_error";
    case 504:
        return "timeout_error";
    default:
        return status >= 500 ? "server_error" : "invalid_request_error";
    }
}

int http_error_set(struct http_error *e, int status, const char *code, const char *param, const char *fmt, ...) {
    *e = (struct http_error){.status = status};
    snprintf(e->type, sizeof e->type, "%s", type_of(status, code));
    snprintf(e->code, sizeof e->code, "%s", code);
    snprintf(e->param, sizeof e->param, "%s", param ? param : "");
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(e->message, sizeof e->message, fmt, ap);
    va_end(ap);
    return -1;
}

// What a status of the engine or of a sampler means to the client that asked. E_CANCELLED reaches a client only when the daemon
// is stopping.
static const struct {
    int http;
    const char *code;
} table[] = {
    [-E_NOMEM] = {503, "out_of_memory"},         [-E_IO] = {500, "io_error"},
    [-E_NOTFOUND] = {404, "not_found"},          [-E_FORMAT] = {400, "invalid_format"},
    [-E_RANGE] = {422, "out_of_range"},          [-E_CONFLICT] = {422, "conflicting_fields"},
    [-E_UNSUPPORTED] = {422, "not_supported"},   [-E_BUSY] = {503, "queue_full"},
    [-E_DEVICE] = {503, "device_failed"},        [-E_PERM] = {403, "forbidden"},
    [-E_CANCELLED] = {503, "cancelled"},         [-E_TIMEOUT] = {504, "deadline_exceeded"},
    [-E_NONFINITE] = {500, "non_finite_output"}, [-E_INTERNAL] = {500, "internal_error"},
};

int http_error_from(struct http_error *e, const struct err *err) {
    int i = -err->status;
    if (i <= 0 || i >= (int)(sizeof table / sizeof *table)) i = -E_INTERNAL;
    int http = table[i].http;
    const char *code = table[i].code;
    if (i == -E_NOTFOUND && strcmp(err->param, "model") == 0) code = "model_not_found";
    if (i == -E_CONFLICT && (!err->param[0] || strcmp(err->param, "digest") == 0))
        http = 409, code = "state_conflict"; // not a field of the request
    return http_error_set(e, http, code, err->param, "%s", err->text[0] ? err->text : status_name(err->status));
}

char *http_error_json(const struct http_error *e) {
    struct emit out = {0};
    emit_open(&out, NULL, '{');
    emit_open(&out, "error", '{');
    emit_string(&out, "message", e->message);
    emit_string(&out, "type", e->type);
    emit_string(&out, "param", e->param[0] ? e->param : NULL);
    emit_string(&out, "code", e->code);
    emit_close(&out, '}');
    emit_close(&out, '}');
    return emit_take(&out);
}
