// SPDX-License-Identifier: MIT
/*
 * The loop thread turns libuv's loop and owns everything that libmicrohttpd and libuv know. MHD has no thread of its own: its
 * epoll descriptor sits under one uv_poll_t, its timeout under one uv_timer_t, and MHD_run is called from both. A resumed
 * connection is looked at when MHD_run is next called, so server_kick sets that timer to nothing; it is never called from inside
 * MHD.
 *
 * Stopping has stages. SIGTERM: not ready, --drain-delay passes while requests are still taken, so that a load balancer can look
 * away. Then the listener closes and new work is refused, but what was taken is finished, for up to --exit-timeout. Then, or at a
 * second signal (not its echo: `timeout` signals a process and its group), what is left is cancelled and answered 503. The daemon leaves with 1 if anything was cut off. A third signal
 * finds the default action.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/base/mem.h"
#include "server/cache.h"
#include "server/http.h"
#include "server/jobs.h"
#include "server/server.h"

#define TICK_MS 100
#define FLUSH_MS 2000          // for the last answers, when work was cut off
#define MHD_MEMORY (32u << 10) // of a connection: request head, response head and read buffer

static void set_stage(struct server *s, enum stage stage);

int64_t now_us(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

int64_t now_ms(void) { return now_us() / 1000; }

// ---- MHD under libuv

static void run_mhd(struct server *s);

static void on_mhd_timer(uv_timer_t *t) { run_mhd(t->data); }

static void run_mhd(struct server *s) {
    MHD_UNSIGNED_LONG_LONG ms;
    do {
        s->mhd_again = false;
        MHD_run(s->mhd);
    } while (s->mhd_again);
    if (MHD_get_timeout(s->mhd, &ms) != MHD_YES) {
        uv_timer_stop(&s->mhd_timer);
        return;
    }
    uv_update_time(&s->uv);
    uv_timer_start(&s->mhd_timer, on_mhd_timer, ms, 0);
}

static void on_mhd_readable(uv_poll_t *p, int status, int events) {
    (void)status, (void)events;
    run_mhd(p->data);
}

void server_kick(struct server *s) { uv_timer_start(&s->mhd_timer, on_mhd_timer, 0, 0); }

static void log_mhd(void *cls, const char *fmt, va_list ap) {
    char text[256];
    (void)cls;
    vsnprintf(text, sizeof text, fmt, ap);
    text[strcspn(text, "\n")] = 0;
    log_at(LOG_DEBUG, "http", log_str("text", text));
}

static int start_mhd(struct server *s, struct err *e) {
    const struct config *c = s->config;
    s->mhd = MHD_start_daemon(MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, 0, NULL, NULL, http_handle, s,
                              MHD_OPTION_EXTERNAL_LOGGER, log_mhd, NULL, // first, so that it sees the others' complaints
                              MHD_OPTION_LISTEN_SOCKET, s->listener.fd, MHD_OPTION_CONNECTION_LIMIT, (unsigned)c->max_connections,
                              MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)((c->idle_timeout + 999) / 1000),
                              MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)MHD_MEMORY, MHD_OPTION_SIGPIPE_HANDLED_BY_APP, 1,
                              MHD_OPTION_NOTIFY_COMPLETED, http_completed, s, MHD_OPTION_NOTIFY_CONNECTION, http_connection, s,
                              MHD_OPTION_URI_LOG_CALLBACK, http_request_line, s, MHD_OPTION_END);
    if (!s->mhd) return err_set(e, E_INTERNAL, "libmicrohttpd could not start");
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(s->mhd, MHD_DAEMON_INFO_EPOLL_FD);
    if (!info || uv_poll_init(&s->uv, &s->mhd_poll, info->epoll_fd))
        return err_set(e, E_INTERNAL, "libmicrohttpd's epoll descriptor is not usable");
    uv_poll_start(&s->mhd_poll, UV_READABLE, on_mhd_readable);
    return 0;
}

// ---- What happens

const char *server_unready(struct server *s) {
    struct engine_stats st;
    if (s->stage != SERVING) return "draining";
    engine_stats(s->engine, &st);
    if (!st.device_ok) return "device_failed";
    return s->was_ready ? NULL : "loading";
}

// A model that does not load at the start ends the daemon: it would otherwise run for ever without what it was told to serve.
static void on_model(struct server *s, const struct engine_event *ev) {
    s->metrics.loads[!ev->err.status]++;
    if (ev->err.status) {
        if (s->was_ready) return; // the engine has logged why
        s->exit_code = status_exit_code(ev->err.status);
        set_stage(s, CUT);
        return;
    }
    if (s->was_ready || !engine_ready(s->engine)) return;
    s->was_ready = true;
    log_info("ready", log_str("device", engine_device(s->engine)));
}

static void on_bell(uv_async_t *bell) {
    struct server *s = bell->data;
    for (struct event_node *n = inbox_take(&s->inbox), *next; n; n = next) {
        next = n->next;
        if (n->event.kind == EV_MODEL) on_model(s, &n->event);
        else jobs_event(s, &n->event);
        mem_free(n);
    }
}

static void on_tick(uv_timer_t *t) {
    struct server *s = t->data;
    int64_t now = now_ms();
    http_tick(s, now);
    jobs_tick(s, now);
    if (s->stage >= CLOSED && http_quiet(s)) {
        uv_stop(&s->uv);
        return;
    }
    if (!s->n_conns && s->stage == SERVING) uv_timer_stop(t);
}

void server_watch(struct server *s) {
    if (!uv_is_active((uv_handle_t *)&s->tick)) uv_timer_start(&s->tick, on_tick, TICK_MS, TICK_MS);
}

// ---- Stopping

static void close_listener(struct server *s) {
    run_mhd(s); // takes what waits in the kernel's queue
    MHD_quiesce_daemon(s->mhd);
    listen_close(&s->listener);
}

static void on_stage_timer(uv_timer_t *t) {
    struct server *s = t->data;
    if (s->stage == CUT) uv_stop(&s->uv);
    else set_stage(s, s->stage + 1);
}

static void set_stage(struct server *s, enum stage stage) {
    const struct config *c = s->config;
    if (stage <= s->stage) return;
    enum stage before = s->stage;
    s->stage = stage;
    if (before < CLOSED && stage >= CLOSED) close_listener(s);
    if (stage == DRAINING) {
        log_info("draining", log_int("jobs", s->n_jobs), log_int("delay_ms", c->drain_delay),
                 log_int("exit_timeout_ms", c->exit_timeout));
        uv_timer_start(&s->stage_timer, on_stage_timer, (uint64_t)c->drain_delay, 0);
    } else if (stage == CLOSED) {
        log_info("listener closed", log_int("jobs", s->n_jobs), log_int("requests", s->n_exchanges));
        engine_stop(s->engine, true);
        uv_timer_start(&s->stage_timer, on_stage_timer, (uint64_t)c->exit_timeout, 0);
    } else {
        if (s->n_exchanges) {
            log_warn("work was cut off", log_int("jobs", s->n_jobs), log_int("requests", s->n_exchanges));
            if (!s->exit_code) s->exit_code = 1;
        }
        engine_stop(s->engine, false);
        jobs_give_up(s);
        http_give_up(s);
        uv_timer_start(&s->stage_timer, on_stage_timer, s->n_exchanges ? FLUSH_MS : 0, 0);
    }
    server_watch(s);
}

static void log_state(struct server *s) {
    struct engine_stats st;
    engine_stats(s->engine, &st);
    const char *unready = server_unready(s);
    log_info("state", log_str("ready", unready ? unready : "ready"), log_int("connections", s->n_conns),
             log_int("requests", s->n_exchanges), log_int("jobs", s->n_jobs), log_int("queued_images", st.queued_images),
             log_int("running_images", st.running_images), log_int("running_rows", st.running_rows),
             log_int("max_rows", st.max_rows), log_int("models", st.models_ready), log_int("batches", (int64_t)st.batches),
             log_int("evaluations", (int64_t)st.evaluations), log_real("row_ms", st.row_ms));
}

static void on_log_file(uv_fs_t *req) {
    if (req->result < 0) log_error("log file cannot be reopened", log_str("error", uv_strerror((int)req->result)));
    else {
        log_reopen((int)req->result);
        log_info("log file reopened");
    }
    uv_fs_req_cleanup(req);
    mem_free(req);
}

static void reopen_log(struct server *s) {
    uv_fs_t *req = *s->config->log_file ? mem_alloc(sizeof *req) : NULL;
    if (req && uv_fs_open(&s->uv, req, s->config->log_file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0640, on_log_file))
        mem_free(req);
}

#define ECHO_MS 200

static void on_signal(uv_signal_t *sig, int number) {
    struct server *s = sig->data;
    if (number == SIGUSR1) log_state(s);
    else if (number == SIGHUP) {
        reopen_log(s);
        watch_look(&s->watch);
    }
    else if (s->stage == SERVING) s->asked = uv_now(&s->uv), set_stage(s, DRAINING);
    else if (uv_now(&s->uv) - s->asked > ECHO_MS) {
        for (int i = 0; i < 2; i++) uv_signal_stop(&s->signals[i]); // a third one kills
        set_stage(s, CUT);
    }
}

// ---- Start and end

static int start_uv(struct server *s, struct err *e) {
    static const int numbers[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1};
    s->mhd_poll.data = s->mhd_timer.data = s->tick.data = s->stage_timer.data = s->bell.data = s;
    uv_timer_init(&s->uv, &s->mhd_timer);
    uv_timer_init(&s->uv, &s->tick);
    uv_timer_init(&s->uv, &s->stage_timer);
    int rc = uv_async_init(&s->uv, &s->bell, on_bell);
    for (int i = 0; i < 4 && !rc; i++) {
        rc = uv_signal_init(&s->uv, &s->signals[i]);
        s->signals[i].data = s;
        if (!rc) rc = uv_signal_start(&s->signals[i], on_signal, numbers[i]);
    }
    return rc ? err_set(e, E_INTERNAL, "libuv: %s", uv_strerror(rc)) : 0;
}

static int start_engine(struct server *s, struct err *e) {
    const struct config *c = s->config;
    char cache[CONFIG_TEXT];
    struct engine_options o = {.models_dir = c->models,
                               .cache = cache_folder(c->cache, cache, sizeof cache),
                               .backend = c->backend,
                               .devices = c->device,
                               .n_devices = c->n_devices,
                               .precision = c->precision,
                               .any_bits = c->any_bits,
                               .exact_residual = c->exact_residual,
                               .max_rows = (int)c->max_rows,
                               .threads = (int)c->threads,
                               .nice = (int)c->nice,
                               .max_jobs = (int)c->max_jobs,
                               .max_images = (int)c->max_images,
                               .event = inbox_post,
                               .ctx = &s->inbox};
    return engine_open(&s->engine, &o, e);
}

static void close_handle(uv_handle_t *h, void *arg) {
    (void)arg;
    if (!uv_is_closing(h)) uv_close(h, NULL);
}

// Whatever was started is stopped, in the order that lets nothing speak to what is gone: connections, engine, loop, table.
static void server_end(struct server *s) {
    if (s->mhd) {
        jobs_give_up(s);
        MHD_run(s->mhd); // lets MHD take back what was resumed, which it wants before it stops
        MHD_stop_daemon(s->mhd);
    }
    watch_stop(&s->watch);
    if (s->engine) {
        engine_stop(s->engine, false);
        engine_close(s->engine);
    }
    uv_walk(&s->uv, close_handle, NULL);
    uv_run(&s->uv, UV_RUN_DEFAULT); // the pool's work comes back too and finds no job
    uv_loop_close(&s->uv);
    inbox_deinit(&s->inbox);
    mem_free(s->polls);
    listen_close(&s->listener);
}

int server_run(struct server *s, const struct config *c, const struct listener *listener, struct err *e) {
    *s = (struct server){.config = c, .listener = *listener, .started_unix = (int64_t)time(NULL)};
    if (uv_loop_init(&s->uv)) return status_exit_code(err_set(e, E_INTERNAL, "libuv could not start"));
    inbox_init(&s->inbox, &s->bell);
    s->polls = mem_array((size_t)c->max_connections, sizeof *s->polls);
    int rc = s->polls ? start_uv(s, e) : err_set(e, E_NOMEM, "no memory for %lld connections", (long long)c->max_connections);
    if (!rc) rc = start_engine(s, e);
    if (!rc) rc = start_mhd(s, e);
    if (!rc) {
        printf("listening on %s\n", s->listener.url);
        fflush(stdout);
        log_info("listening", log_str("url", s->listener.url), log_int("pid", getpid()));
        watch_start(&s->watch, &s->uv, s->engine, c->models);
        run_mhd(s);
        uv_run(&s->uv, UV_RUN_DEFAULT);
        log_info("stopped", log_int("exit", s->exit_code));
    }
    server_end(s);
    if (rc == E_UNSUPPORTED) rc = E_DEVICE; // models are judged later, on their own: what is unsupported here is the processor
    return rc ? status_exit_code(rc) : s->exit_code;
}
