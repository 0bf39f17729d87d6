// SPDX-License-Identifier: MIT
/*
 * Four rules of libmicrohttpd 0.9.75 shape this file.
 * - A connection is suspended only inside the access handler, and while it is suspended MHD neither times it out nor notices that
 * the client left: http_tick asks the kernel (POLLRDHUP) ten times a second. A client that closes its sending side early counts
 * as gone.
 * - An answer can be queued on the handler's first call (head read) or its last (body read), not in between. So an error found in
 * the head waits until the body has been read past, if that is a bounded amount: answering at once would close the connection on
 * a client that still sends, whose kernel then throws the answer away. `Expect: 100-continue` clients are answered at once, they
 * have not begun.
 * - Its timeout restarts with every byte, so a client that drips is caught by our own deadline. In mid-head and mid-body there is
 * no way to answer through MHD: the 408 is written on the socket itself, which MHD has not used yet for this request, and the
 * socket is shut.
 * - The handler must not be entered for a dead exchange: MHD_NO closes the connection.
 */
#include "server/http.h"

#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>

#include "core/base/log.h"
#include "core/base/mem.h"
#include "server/jobs.h"
#include "server/negotiate.h"
#include "server/routes.h"

#define HEAD_MAX (16u << 10)     // bytes of request head; MHD itself stops at twice that, with a page of its own
#define READ_PAST_MAX (8u << 20) // bytes of an unwanted body that are read to keep the connection
#define FRESH_MS 250             // a drain waits this long for an accepted connection's first request
#define SEND_BYTES_PER_MS 16     // the slowest reader that is put up with

// ---- Answers

struct MHD_Response *http_response(char *take, size_t n, const char *content_type) {
    struct MHD_Response *r = MHD_create_response_from_buffer_with_free_callback(n, take, mem_free);
    if (!r) mem_free(take);
    else if (content_type) MHD_add_response_header(r, "Content-Type", content_type);
    return r;
}

void http_header(struct MHD_Response *r, const char *name, const char *fmt, ...) {
    char value[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(value, sizeof value, fmt, ap);
    va_end(ap);
    MHD_add_response_header(r, name, value);
}

static void cors_headers(const struct exchange *ex, struct MHD_Response *r) {
    const char *allowed = ex->server->config->cors_origin,
               *origin = MHD_lookup_connection_value(ex->mhd, MHD_HEADER_KIND, "Origin");
    if (!*allowed) return;
    MHD_add_response_header(r, "Vary", "Origin");
    if (!origin || strcmp(origin, allowed) != 0) return;
    MHD_add_response_header(r, "Access-Control-Allow-Origin", allowed);
    MHD_add_response_header(r, "Access-Control-Expose-Headers",
                            "X-Request-Id, X-Seed, X-Model-Version, X-Model-Digest, Server-Timing, Retry-After");
    if (strcmp(ex->method, "OPTIONS") != 0) return;
    MHD_add_response_header(r, "Access-Control-Allow-Methods", "GET, POST");
    MHD_add_response_header(r, "Access-Control-Allow-Headers", "Content-Type, Accept, X-Request-Id, traceparent");
    MHD_add_response_header(r, "Access-Control-Max-Age", "600");
}

void http_answer(struct exchange *ex, int code, struct MHD_Response *take) {
    if (ex->state == EX_GONE || ex->response) {
        if (take) MHD_destroy_response(take);
        return;
    }
    if (!take) take = MHD_create_response_from_buffer(0, (void *)"", MHD_RESPMEM_PERSISTENT), code = 500;
    if (!take) ex->conn->aborted = 500; // not even that: the handler closes the connection
    else {
        MHD_add_response_header(take, "X-Request-Id", ex->id);
        MHD_add_response_header(take, "X-Content-Type-Options", "nosniff");
        if (!MHD_get_response_header(take, "Cache-Control")) MHD_add_response_header(take, "Cache-Control", "no-store");
        if (ex->server->stage != SERVING || ex->mhd_close) MHD_add_response_header(take, "Connection", "close");
        cors_headers(ex, take);
    }
    ex->response = take;
    ex->code = code;
    bool waiting = ex->state == EX_WAITING;
    ex->state = EX_ANSWERED;
    if (!waiting) return; // still inside the handler, which will queue it
    MHD_resume_connection(ex->mhd);
    server_kick(ex->server);
}

void http_answer_take(struct exchange *ex, int code, const char *content_type, char *take, size_t n) {
    ex->bytes = take ? n : 0;
    http_answer(ex, code, take ? http_response(take, n, content_type) : NULL);
}

void http_answer_error(struct exchange *ex, const struct http_error *e, int64_t retry_ms) {
    char *json = http_error_json(e);
    ex->bytes = json ? strlen(json) : 0;
    struct MHD_Response *r = json ? http_response(json, ex->bytes, "application/json") : NULL;
    if (r && retry_ms > 0) http_header(r, "Retry-After", "%lld", (long long)(retry_ms + 999) / 1000);
    if (r && e->status == 405)
        http_header(r, "Allow", "%s, OPTIONS", strcmp(ex->route->method, "GET") ? ex->route->method : "GET, HEAD");
    http_answer(ex, e->status, r);
}

static enum MHD_Result queue_answer(struct exchange *ex) {
    if (!ex->response) return MHD_NO;
    enum MHD_Result rc = MHD_queue_response(ex->mhd, (unsigned)ex->code, ex->response);
    MHD_destroy_response(ex->response); // MHD holds its own reference
    ex->response = NULL;
    ex->state = EX_SENDING;
    ex->deadline_ms = now_ms() + ex->server->config->idle_timeout + (int64_t)(ex->bytes / SEND_BYTES_PER_MS);
    return rc;
}

// ---- The head

static void make_id(char id[132]) {
    unsigned char bytes[16] = {0};
    if (getrandom(bytes, sizeof bytes, GRND_NONBLOCK) != (ssize_t)sizeof bytes)
        memcpy(bytes, &(int64_t){now_us()}, sizeof(int64_t));
    for (size_t i = 0; i < sizeof bytes; i++) snprintf(id + 2 * i, 3, "%02x", bytes[i]);
}

static struct exchange *exchange_new(struct server *s, struct conn *conn, struct MHD_Connection *mhd, const char *url,
                                     const char *method) {
    struct exchange *ex = mem_alloc(sizeof *ex);
    const char *id = MHD_lookup_connection_value(mhd, MHD_HEADER_KIND, "X-Request-Id"), *part = NULL;
    const char *trace = MHD_lookup_connection_value(mhd, MHD_HEADER_KIND, "traceparent");
    size_t part_len = 0;
    if (!ex || !(ex->path = mem_strdup(url))) {
        mem_free(ex);
        return NULL;
    }
    ex->server = s;
    ex->conn = conn;
    ex->mhd = mhd;
    snprintf(ex->method, sizeof ex->method, "%s", method);
    ex->route = conn->nul_in_uri ? NULL : routes_find(ex->path, &part, &part_len);
    if (part) ex->path[(size_t)(part - ex->path) + part_len] = 0, ex->part = part;
    if (id && request_id_valid(id)) snprintf(ex->id, sizeof ex->id, "%s", id);
    else make_id(ex->id);
    if (trace && traceparent_valid(trace)) snprintf(ex->trace, sizeof ex->trace, "%s", trace);
    ex->start_us = now_us();
    ex->deadline_ms = now_ms() + s->config->request_timeout;
    conn->ex = ex;
    conn->used = true;
    conn->hung_up = false;
    s->n_exchanges++;
    return ex;
}

static enum MHD_Result first_name(void *cls, enum MHD_ValueKind kind, const char *name, const char *value) {
    (void)kind, (void)value;
    *(const char **)cls = name;
    return MHD_NO;
}

static void check_post(struct exchange *ex, const char *length, struct http_error *e) {
    const char *type = MHD_lookup_connection_value(ex->mhd, MHD_HEADER_KIND, "Content-Type");
    const char *coding = MHD_lookup_connection_value(ex->mhd, MHD_HEADER_KIND, "Content-Encoding");
    const char *in_query = NULL;
    int64_t most = ex->server->config->max_body;
    MHD_get_connection_values(ex->mhd, MHD_GET_ARGUMENT_KIND, first_name, &in_query);
    if (length && strtoull(length, NULL, 10) > (unsigned long long)most)
        http_error_set(e, 413, "body_too_large", NULL, "the body has %.20s bytes; at most %lld are taken", length,
                       (long long)most);
    else if (!content_type_is_json(type))
        http_error_set(e, 415, "unsupported_media_type", NULL,
                       "the body must be application/json in UTF-8; Content-Type is %.80s", type ? type : "missing");
    else if (coding && strcasecmp(coding, "identity") != 0)
        http_error_set(e, 415, "unsupported_media_type", NULL, "Content-Encoding %.40s is not understood", coding);
    else if (in_query)
        http_error_set(e, 422, "unknown_field", in_query, "%.80s: fields belong into the body, not into the query", in_query);
}

static enum MHD_Result count_length(void *cls, enum MHD_ValueKind kind, const char *key, const char *value) {
    (void)kind, (void)value;
    *(int *)cls += !strcasecmp(key, "Content-Length");
    return MHD_YES;
}

// Where the body ends must be beyond doubt: a proxy before us that reads these otherwise would take the rest for another request.
static bool ambiguous_length(struct exchange *ex) {
    const char *coding = MHD_lookup_connection_value(ex->mhd, MHD_HEADER_KIND, "Transfer-Encoding");
    int lengths = 0;
    MHD_get_connection_values(ex->mhd, MHD_HEADER_KIND, count_length, &lengths);
    return lengths + (coding != NULL) > 1 || (coding && strcasecmp(coding, "chunked"));
}

// What the head alone shows to be wrong.
static void check_head(struct exchange *ex, const char *length) {
    struct http_error *e = &ex->error;
    const union MHD_ConnectionInfo *head = MHD_get_connection_info(ex->mhd, MHD_CONNECTION_INFO_REQUEST_HEADER_SIZE);
    bool options = !strcmp(ex->method, "OPTIONS"), head_only = !strcmp(ex->method, "HEAD");
    if (head && head->header_size > HEAD_MAX)
        http_error_set(e, 431, "head_too_large", NULL, "the request's head has %zu bytes; at most %u are taken",
                       head->header_size, HEAD_MAX);
    else if (ambiguous_length(ex))
        http_error_set(e, 400, "invalid_framing", NULL,
                       "a body needs one Content-Length or Transfer-Encoding: chunked, not more and no other coding");
    else if (!ex->route) http_error_set(e, 404, "not_found", NULL, "no such path: %.200s", ex->path);
    else if (!options && strcmp(head_only ? "GET" : ex->method, ex->route->method) != 0)
        http_error_set(e, 405, "method_not_allowed", NULL, "%s takes %s, not %s", ex->route->path, ex->route->method, ex->method);
    else if (!strcmp(ex->method, "POST")) check_post(ex, length, e);
    if (e->status == 413) ex->server->metrics.rejected[REJECT_TOO_LARGE]++;
}

static enum MHD_Result begin(struct server *s, struct MHD_Connection *mhd, const char *url, const char *method, void **con_cls) {
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    struct conn *conn = info ? info->socket_context : NULL;
    if (!conn || conn->aborted) return MHD_NO;
    struct exchange *ex = exchange_new(s, conn, mhd, url, method);
    if (!ex) return MHD_NO;
    *con_cls = ex;
    const char *length = MHD_lookup_connection_value(mhd, MHD_HEADER_KIND, "Content-Length");
    const char *expect = MHD_lookup_connection_value(mhd, MHD_HEADER_KIND, "Expect");
    check_head(ex, length);
    if (!ex->error.status) return MHD_YES;
    bool endless = ex->error.status == 400 || (length && strtoull(length, NULL, 10) > READ_PAST_MAX);
    if (!expect && !endless) return MHD_YES; // read past the body first
    ex->mhd_close = true;
    http_answer_error(ex, &ex->error, 0);
    return queue_answer(ex);
}

// ---- The body

static void write_past_mhd(struct conn *c, int code, const char *reason, const char *error_code, const char *id) {
    struct http_error e;
    char text[1200];
    http_error_set(&e, code, error_code, NULL, "%s", reason);
    char *json = http_error_json(&e);
    if (json) {
        int n = snprintf(
            text, sizeof text,
            "HTTP/1.1 %d %s\r\nConnection: close\r\nContent-Type: application/json\r\n%s%s%sContent-Length: %zu\r\n\r\n%s", code,
            code == 408   ? "Request Timeout"
            : code == 413 ? "Content Too Large"
                          : "Service Unavailable",
            id ? "X-Request-Id: " : "", id ? id : "", id ? "\r\n" : "", strlen(json), json);
        if (n > 0 && n < (int)sizeof text && send(c->fd, text, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
            n = 0; // the client sees a bare close
    }
    mem_free(json);
    c->aborted = code;
    shutdown(c->fd, SHUT_RDWR); // MHD sees the end and frees the connection
}

static enum MHD_Result take_body(struct exchange *ex, const char *upload, size_t *size) {
    if (ex->conn->aborted) return MHD_NO;
    ex->received += *size;
    int64_t most = ex->server->config->max_body;
    if (!ex->error.status && ex->received > (uint64_t)most) { // chunked: the length was not known before
        http_error_set(&ex->error, 413, "body_too_large", NULL, "the body is larger than %lld bytes", (long long)most);
        ex->server->metrics.rejected[REJECT_TOO_LARGE]++;
        text_deinit(&ex->body);
    }
    if (ex->received > READ_PAST_MAX) {
        write_past_mhd(ex->conn, 413, ex->error.message, "body_too_large", ex->id);
        return MHD_NO;
    }
    if (!ex->error.status && !strcmp(ex->method, "POST")) text_add(&ex->body, upload, *size);
    *size = 0;
    return MHD_YES;
}

static void answer_options(struct exchange *ex) {
    struct MHD_Response *r = MHD_create_response_from_buffer(0, (void *)"", MHD_RESPMEM_PERSISTENT);
    if (r) http_header(r, "Allow", "%s, OPTIONS", strcmp(ex->route->method, "GET") ? ex->route->method : "GET, HEAD");
    http_answer(ex, 204, r);
}

static enum MHD_Result run(struct exchange *ex) {
    ex->receive_ms = (double)(now_us() - ex->start_us) / 1000;
    if (ex->body.failed) http_error_set(&ex->error, 503, "out_of_memory", NULL, "no memory for the body");
    if (ex->error.status) http_answer_error(ex, &ex->error, ex->error.status == 503 ? 1000 : 0);
    else if (!strcmp(ex->method, "OPTIONS")) answer_options(ex);
    else ex->route->run(ex);
    if (ex->state == EX_ANSWERED) return queue_answer(ex);
    ex->state = EX_WAITING;
    MHD_suspend_connection(ex->mhd);
    return MHD_YES;
}

enum MHD_Result http_handle(void *cls, struct MHD_Connection *mhd, const char *url, const char *method, const char *version,
                            const char *upload, size_t *upload_size, void **con_cls) {
    struct exchange *ex = *con_cls;
    (void)version;
    if (!ex) return begin(cls, mhd, url, method, con_cls);
    switch (ex->state) {
    case EX_BODY:
        return *upload_size ? take_body(ex, upload, upload_size) : ex->conn->aborted ? MHD_NO : run(ex);
    case EX_ANSWERED:
        return queue_answer(ex);
    default:
        return MHD_NO;
    }
}

static enum MHD_Result join_accept(void *cls, enum MHD_ValueKind kind, const char *key, const char *value) {
    (void)kind;
    if (!strcasecmp(key, "Accept") && value) text_printf(cls, ", %s", value);
    return MHD_YES;
}

char *http_accept(const struct exchange *ex) {
    struct text t = {0};
    MHD_get_connection_values(ex->mhd, MHD_HEADER_KIND, join_accept, &t);
    return t.n ? text_take(&t, NULL) : NULL;
}

// ---- The end

static void log_exchange(const struct exchange *ex, int code, double total_ms) {
    struct log_field f[16] = {log_str("id", ex->id), log_str("method", ex->method),
                              log_str("route", routes_name(routes_index(ex->route))), log_int("code", code),
                              log_int("bytes", (int64_t)ex->bytes)};
    int n = 5;
    if (!ex->route) f[n++] = log_str("path", ex->path);
    if (ex->trace[0]) f[n++] = log_str("traceparent", ex->trace);
    if (ex->images) {
        f[n++] = log_str("model", ex->model);
        f[n++] = log_int("images", ex->images);
        f[n++] = log_real("receive_ms", ex->receive_ms);
        f[n++] = log_real("queue_ms", ex->queue_ms);
        f[n++] = log_real("denoise_ms", ex->denoise_ms);
        f[n++] = log_real("decode_ms", ex->decode_ms);
        f[n++] = log_real("encode_ms", ex->encode_ms);
    }
    f[n++] = log_real("total_ms", total_ms);
    log_event(code >= 500 && code != 503 && code != 504 ? LOG_ERROR : LOG_INFO, "request", f, n);
}

void http_completed(void *cls, struct MHD_Connection *mhd, void **con_cls, enum MHD_RequestTerminationCode toe) {
    struct server *s = cls;
    struct exchange *ex = *con_cls;
    (void)mhd;
    if (!ex) return;
    *con_cls = NULL;
    struct conn *c = ex->conn;
    int code = c->aborted                                                                        ? c->aborted
               : toe != MHD_REQUEST_TERMINATED_COMPLETED_OK || ex->state == EX_GONE || !ex->code ? 499
                                                                                                 : ex->code;
    double total_us = (double)(now_us() - ex->start_us);
    log_exchange(ex, code, total_us / 1000);
    metrics_request(&s->metrics, routes_index(ex->route), code, total_us / 1e6);
    if (ex->job) jobs_abandon(s, ex->job);
    if (ex->response) MHD_destroy_response(ex->response);
    c->ex = NULL;
    c->since_ms = now_ms();
    c->head_deadline_ms = c->since_ms + s->config->idle_timeout + s->config->request_timeout;
    text_deinit(&ex->body);
    mem_free(ex->path);
    mem_free(ex);
    s->n_exchanges--;
}

void http_connection(void *cls, struct MHD_Connection *mhd, void **socket_context, enum MHD_ConnectionNotificationCode what) {
    struct server *s = cls;
    struct conn *c = *socket_context;
    if (what == MHD_CONNECTION_NOTIFY_CLOSED) {
        if (!c) return;
        *c->self = c->next;
        if (c->next) c->next->self = c->self;
        s->n_conns--;
        s->mhd_again = true; // MHD that stopped accepting (limit reached, no descriptors left) begins again only at its next turn
        mem_free(c);
        *socket_context = NULL;
        return;
    }
    if (!(c = mem_alloc(sizeof *c))) return; // its first request is then refused
    c->fd = MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
    c->since_ms = now_ms();
    c->head_deadline_ms = c->since_ms + s->config->request_timeout;
    c->next = s->conns;
    c->self = &s->conns;
    if (c->next) c->next->self = &c->next;
    s->conns = c;
    s->n_conns++;
    *socket_context = c;
    server_watch(s);
}

void *http_request_line(void *cls, const char *uri, struct MHD_Connection *mhd) {
    const struct server *s = cls;
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    struct conn *c = info ? info->socket_context : NULL;
    int64_t latest = now_ms() + s->config->request_timeout;
    if (c) c->nul_in_uri = strstr(uri, "%00");
    if (c && c->head_deadline_ms > latest) c->head_deadline_ms = latest;
    return NULL; // *con_cls of the first call
}

// ---- The tick

static void check_slow(struct server *s, struct conn *c, int64_t now) {
    struct exchange *ex = c->ex;
    if (c->aborted) return;
    if (ex && ex->state == EX_SENDING && now > ex->deadline_ms) { // reads too slowly
        c->aborted = 499;
        shutdown(c->fd, SHUT_RDWR);
    } else if ((!ex && now > c->head_deadline_ms) || (ex && ex->state == EX_BODY && now > ex->deadline_ms)) {
        s->metrics.rejected[REJECT_SLOW]++;
        if (!ex) log_info("slow request head", log_int("code", 408));
        write_past_mhd(c, 408, "the request did not arrive in time", "request_timeout", ex ? ex->id : NULL);
    }
}

static void client_left(struct exchange *ex) {
    uint64_t job = ex->job;
    ex->job = 0;
    ex->state = EX_GONE;
    if (job) jobs_abandon(ex->server, job);
    MHD_resume_connection(ex->mhd); // the handler then refuses, which closes it
}

// MHD takes a short read for the end of what there is and so misses the end of a stream that came with it: a connection whose
// client has been gone for a whole tick while a request was awaited or arriving is shut, which MHD does notice.
static void close_hung_up(struct conn *c) {
    if (c->hung_up && !c->aborted) {
        c->aborted = 499;
        shutdown(c->fd, SHUT_RDWR);
    }
    c->hung_up = true;
}

// Returns whether a waiting exchange was ended.
static bool look_at(struct conn *c, short events) {
    bool gone = events & (POLLHUP | POLLERR | POLLNVAL), closed = gone || events & POLLRDHUP;
    enum ex_state state = c->ex ? c->ex->state : EX_BODY;
    if (closed && state == EX_WAITING) {
        client_left(c->ex);
        return true;
    }
    if ((closed && state == EX_BODY) || (gone && state == EX_SENDING))
        close_hung_up(c); // who closed one side only may still read
    else c->hung_up = false;
    return false;
}

void http_tick(struct server *s, int64_t now) {
    int n = 0, i = 0, left = 0;
    for (struct conn *c = s->conns; c && n < s->config->max_connections; c = c->next) {
        check_slow(s, c, now);
        s->polls[n++] = (struct pollfd){.fd = c->fd, .events = POLLRDHUP};
    }
    if (!n || poll(s->polls, (nfds_t)n, 0) <= 0) return;
    for (struct conn *c = s->conns; c && i < n; c = c->next) left += look_at(c, s->polls[i++].revents); // the same walk as above
    if (left) server_kick(s);
}

void http_give_up(struct server *s) {
    for (struct conn *c = s->conns; c; c = c->next)
        if (c->ex && c->ex->state == EX_BODY && !c->aborted)
            write_past_mhd(c, 503, "the daemon is stopping", "stopping", c->ex->id);
}

bool http_quiet(const struct server *s) {
    if (s->n_exchanges) return false;
    for (const struct conn *c = s->conns; c; c = c->next)
        if (!c->used && now_ms() - c->since_ms < FRESH_MS) return false;
    return true;
}
