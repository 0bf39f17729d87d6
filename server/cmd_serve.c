// SPDX-License-Identifier: MIT
/* sitd serve: the daemon. Options, log, listener; then the loop has it. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/log.h"
#include "server/assets.h"
#include "server/cmd.h"
#include "server/server.h"

static int complain(const struct err *e, int code) {
    fprintf(stderr, "sitd serve: %s\n", e->text);
    return code;
}

// Without keys whoever reaches the port may use it, so an address that other machines reach wants a word.
static int check_public(const struct config *c, struct err *e) {
    bool local;
    if (listen_check(c->listen, &local, e)) return e->status;
    if (local || c->insecure_public) return 0;
    return err_param(
        e, E_RANGE, "listen",
        "listen: %s can be reached from other machines and there are no keys: give --insecure-public if that is meant",
        c->listen);
}

// The pipe of a log reader that has stopped reading must not stop the daemon: such a sink is opened anew without blocking (a
// descriptor that is shared with other programs keeps its mode), and lines that do not fit are lost.
static int stderr_sink(void) {
    struct stat st;
    if (fstat(STDERR_FILENO, &st) || !S_ISFIFO(st.st_mode)) return STDERR_FILENO;
    int fd = open("/proc/self/fd/2", O_WRONLY | O_NONBLOCK | O_CLOEXEC);
    return fd >= 0 ? fd : STDERR_FILENO;
}

static int open_log(const struct config *c, struct err *e) {
    static const char *const levels[] = {"debug", "info", "warn", "error"};
    int level = LOG_DEBUG, fd = *c->log_file ? open(c->log_file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0640) : stderr_sink();
    if (fd < 0)
        return err_param(e, errno == EACCES ? E_PERM : E_IO, "log-file", "log-file: %s: %s", c->log_file, strerror(errno));
    while (strcmp(levels[level], c->log_level) != 0) level++;
    log_open(fd, (enum log_level)level, !strcmp(c->log_format, "json"));
    return 0;
}

static int check_models(const struct config *c, struct err *e) {
    struct stat st;
    int why = stat(c->models, &st) ? errno : !S_ISDIR(st.st_mode) ? ENOTDIR : access(c->models, R_OK | X_OK) ? errno : 0;
    if (!why) return 0;
    return err_param(e, why == EACCES ? E_PERM : E_NOTFOUND, "models", "models: %s: %s", c->models, strerror(why));
}

#define OTHER_FILES 64 // descriptors beside the connections' own: engine, loop, log, files being read

// So many connections need as many descriptors; a daemon that runs out of them hangs its clients instead of queueing them.
static int reserve_descriptors(const struct config *c, struct err *e) {
    struct rlimit files;
    rlim_t need = (rlim_t)c->max_connections + OTHER_FILES;
    if (getrlimit(RLIMIT_NOFILE, &files) || files.rlim_cur == RLIM_INFINITY || files.rlim_cur >= need) return 0;
    struct rlimit more = {.rlim_cur = need, .rlim_max = files.rlim_max < need ? need : files.rlim_max};
    if (!setrlimit(RLIMIT_NOFILE, &more)) return 0;
    return err_param(e, E_RANGE, "max-connections",
                     "max-connections is %lld, but this process may open %llu files and %d are needed beside the connections",
                     (long long)c->max_connections, (unsigned long long)files.rlim_max, OTHER_FILES);
}

// PNG and base64 only. Half the processors, so that the compute threads lose little, but 2 to 8: a batch of pictures is finished at once, and
// of a burst of requests the last batch's encoding is waited for.
static void size_pool(void) {
    char text[16];
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) ? 4 : CPU_COUNT(&set);
    snprintf(text, sizeof text, "%d", n < 4 ? 2 : n > 16 ? 8 : n / 2);
    setenv("UV_THREADPOOL_SIZE", text, 0);
}

int cmd_serve(int argc, char **argv) {
    static struct config config;
    static struct server server;
    struct err e = {0};
    struct listener listener;
    bool usage;
    if (config_load(&config, argc, argv, &usage, &e)) return complain(&e, usage ? 2 : status_exit_code(e.status));
    if (config.help) return config_help(stdout), 0;
    if (config.version) return printf("sitd %s (%s)\n", sitd_version, sitd_commit) < 0;
    if (check_public(&config, &e)) return complain(&e, status_exit_code(e.status));
    if (config.print_config) config_print(&config, stdout);
    if (check_models(&config, &e)) return complain(&e, status_exit_code(e.status));
    if (reserve_descriptors(&config, &e)) return complain(&e, status_exit_code(e.status));
    if (config.check_config || config.print_config) return 0;
    if (open_log(&config, &e) || listen_open(&listener, config.listen, &e)) return complain(&e, status_exit_code(e.status));
    signal(SIGPIPE, SIG_IGN);
    size_pool();
    assets_init();
    int code = server_run(&server, &config, &listener, &e);
    if (e.status) complain(&e, code);
    return code;
}
