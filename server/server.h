// SPDX-License-Identifier: MIT
/*
 * server: what the daemon's files share, all of it owned by the loop thread.
 *
 * loop.c turns the loop and owns start, drain and stop; http.c owns connections and exchanges (one request and its answer);
 * routes.c says what each path does; watch.c sees new models; jobs.c owns the jobs in the engine; encode.c is the work that libuv's pool does; events.c
 * carries the engine's events over. Between threads go ids and plain values: an event or a finished encoding names a job, and the
 * loop looks it up and shrugs when it is gone.
 */
#ifndef SITD_SERVER_H
#define SITD_SERVER_H
#include <microhttpd.h>
#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#include "core/engine/engine.h"
#include "server/config.h"
#include "server/events.h"
#include "server/listen.h"
#include "server/metrics.h"
#include "server/watch.h"

struct conn;
struct job;
struct pollfd;

#define JOB_BUCKETS 1024
enum stage { SERVING, DRAINING, CLOSED, CUT }; // ready turned off; listener closed and no new work; whatever is left is given up

struct server {
    const struct config *config;
    struct listener listener;
    struct MHD_Daemon *mhd;
    struct engine *engine;
    uv_loop_t uv;
    uv_poll_t mhd_poll;     // MHD's epoll descriptor
    uv_timer_t mhd_timer;   // MHD's own timeout
    uv_timer_t tick;        // deadlines and clients that left, ten times a second while there is anything to look at
    uv_timer_t stage_timer; // --drain-delay, then --exit-timeout, then the last flush
    uv_async_t bell;        // the engine's events
    uv_signal_t signals[4];
    struct watch watch;
    struct inbox inbox;
    struct conn *conns;
    struct pollfd *polls; // scratch of the tick, max_connections long
    int n_conns, n_exchanges;
    bool mhd_again; // MHD_run must be called once more
    struct job *jobs[JOB_BUCKETS];
    int n_jobs;
    struct metrics metrics;
    enum stage stage;
    uint64_t asked; // when the first signal to stop came, ms
    bool was_ready; // every model found at the start is loaded
    int exit_code;
    int64_t started_unix;
};

int64_t now_ms(void); // monotonic
int64_t now_us(void);

// loop.c. Loads nothing itself: the engine is open, the listener too, and both are the server's from then on. Returns the process
// exit code.
int server_run(struct server *, const struct config *, const struct listener *, struct err *);
void server_kick(struct server *);  // lets MHD look at resumed connections; call after the last resume of a batch
void server_watch(struct server *); // makes sure that the tick runs
// Why the daemon cannot take work now: NULL when ready, else "loading", "draining" or "device_failed".
const char *server_unready(struct server *);

#endif
