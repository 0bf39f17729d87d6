// SPDX-License-Identifier: MIT
/*
 * http: connections, and exchanges (one request with its answer). Loop thread only.
 *
 * An exchange begins when libmicrohttpd has read a request's head and ends when the answer has left or the connection has died.
 * Its route runs once the body is there, and either answers at once (http_answer*) or leaves it waiting: the connection is then
 * suspended until an answer is given. A waiting exchange whose client leaves is ended by the tick; its job hears of it through
 * jobs_abandon.
 */
#ifndef SITD_HTTP_H
#define SITD_HTTP_H
#include "proto/request.h"
#include "server/server.h"
#include "server/text.h"

enum ex_state {
    EX_BODY,     // the body is arriving
    EX_WAITING,  // suspended: a job is on its way
    EX_ANSWERED, // the answer is there, MHD has not got it yet
    EX_SENDING,  // MHD sends it
    EX_GONE,     // the client left while waiting
};

struct route;
struct exchange {
    struct server *server;
    struct conn *conn;
    struct MHD_Connection *mhd;
    const struct route *route;
    const char *part; // what a {} in the route's path stands for; borrowed from `path`
    char *path;
    char method[12], id[132], trace[56];
    bool mhd_close; // the answer closes the connection
    enum ex_state state;
    struct text body;
    uint64_t received;       // bytes of body, kept or not
    struct http_error error; // found before the body had been read: the body is read past and then this is the answer
    struct MHD_Response *response;
    int code;
    size_t bytes; // of the answer
    uint64_t job; // 0: none
    // for the log and the metrics
    int64_t start_us, deadline_ms;
    char model[64];
    int images;
    double receive_ms, queue_ms, denoise_ms, decode_ms, encode_ms; // receive: from the head to the body's last byte
};

struct conn { // one accepted socket
    struct conn *next, **self;
    int fd;
    int aborted;      // status that was written past MHD; 0: none
    int64_t since_ms; // accepted, or last request ended
    int64_t head_deadline_ms;
    bool used;           // it has carried a request
    bool nul_in_uri;     // of the request at hand: what MHD hands over as its path ends there
    bool hung_up;        // the client's end was closed at the last tick, between requests
    struct exchange *ex; // NULL between requests
};

// MHD's callbacks; cls is the server.
enum MHD_Result http_handle(void *cls, struct MHD_Connection *, const char *url, const char *method, const char *version,
                            const char *upload, size_t *upload_size, void **exchange);
void http_completed(void *cls, struct MHD_Connection *, void **exchange, enum MHD_RequestTerminationCode);
void http_connection(void *cls, struct MHD_Connection *, void **conn, enum MHD_ConnectionNotificationCode);
void *http_request_line(void *cls, const char *uri, struct MHD_Connection *);

// Answers, once per exchange, from its route or later. The response and the buffer are taken, also on failure.
void http_answer(struct exchange *, int code, struct MHD_Response *take);
void http_answer_take(struct exchange *, int code, const char *content_type, char *take, size_t n); // take NULL: 500, no memory
void http_answer_error(struct exchange *, const struct http_error *, int64_t retry_ms); // retry_ms > 0: Retry-After, rounded up
struct MHD_Response *http_response(char *take, size_t n, const char *content_type);     // NULL on no memory (take is freed)
void http_header(struct MHD_Response *, const char *name, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
char *http_accept(const struct exchange *); // all Accept headers joined; caller mem_free's; NULL: none

void http_tick(struct server *, int64_t now_ms); // slow senders, clients that left
void http_give_up(struct server *);              // the daemon stops: requests that are still arriving are answered 503
bool http_quiet(const struct server *); // no exchange, and no connection so young that its first request may be under way

#endif
