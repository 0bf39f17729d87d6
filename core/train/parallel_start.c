// SPDX-License-Identifier: MIT
// How the processes of a run begin: ranks from the environment, or started and watched over here.
#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/train/parallel.h"

#define PORT 29400
#define GRACE 10 // seconds between SIGTERM and SIGKILL

/* ---- the environment ---- */

static int number(const char *name, long low, long high, int *out, struct err *e) {
    const char *text = getenv(name);
    char *end;
    if (!text) return err_param(e, E_CONFLICT, name, "%s is not set, though its like are", name);
    errno = 0;
    long v = strtol(text, &end, 10);
    if (end == text || *end || errno || v < low || v > high)
        return err_param(e, E_RANGE, name, "%s is \"%.40s\", not a number from %ld to %ld", name, text, low, high);
    *out = (int)v;
    return OK;
}

// The first host of a list as Slurm writes them: "a[03-07,9],b" gives a03
static bool first_host(char *out, size_t size, const char *list) {
    size_t n = strcspn(list, "[,"), digits = 0;
    if (list[n] == '[') digits = strspn(list + n + 1, "0123456789");
    if (n == 0 || n + digits >= size) return false;
    memcpy(out, list, n);
    memcpy(out + n, list + n + 1, digits);
    out[n + digits] = 0;
    return true;
}

static int find_first(struct parallel_spec *s, bool one_host, bool slurm, struct err *e) {
    const char *host = getenv("MASTER_ADDR"), *nodes = getenv("SLURM_STEP_NODELIST");
    if (!nodes) nodes = getenv("SLURM_JOB_NODELIST");
    s->port = PORT;
    if (getenv("MASTER_PORT") && number("MASTER_PORT", 1, 65535, &s->port, e)) return e ? e->status : E_RANGE;
    if (host && *host && strlen(host) < sizeof s->host) return snprintf(s->host, sizeof s->host, "%s", host), OK;
    if (slurm && nodes && first_host(s->host, sizeof s->host, nodes)) return OK;
    if (one_host) return snprintf(s->host, sizeof s->host, "127.0.0.1"), OK;
    return err_param(e, E_CONFLICT, "MASTER_ADDR",
                     "MASTER_ADDR does not say where rank 0 is, and the ranks are on several hosts");
}

int parallel_from_environment(struct parallel_spec *s, struct err *e) {
    static const struct {
        const char *rank, *size, *local, *local_size;
    } launchers[] = {{"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
                     {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"},
                     {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
                     {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"}};
    struct err local = {0};
    if (!e) e = &local;
    *s = (struct parallel_spec){.size = 1};
    for (size_t i = 0; i < sizeof launchers / sizeof *launchers; i++) {
        int here = 0;
        if (!getenv(launchers[i].rank)) continue;
        if (number(launchers[i].size, 1, 255, &s->size, e) || number(launchers[i].rank, 0, s->size - 1, &s->rank, e) ||
            number(launchers[i].local, 0, s->size - 1, &s->local, e))
            return e->status;
        if (s->size == 1) return OK;
        if (getenv(launchers[i].local_size) && number(launchers[i].local_size, 1, 255, &here, e)) return e->status;
        return find_first(s, here == s->size, i == 3, e);
    }
    return OK;
}

/* ---- starting ranks on this host ---- */

static int free_port(void) {
    struct sockaddr_in a = {.sin_family = AF_INET};
    socklen_t size = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), port = PORT;
    if (fd >= 0 && bind(fd, (struct sockaddr *)&a, sizeof a) == 0 && getsockname(fd, (struct sockaddr *)&a, &size) == 0)
        port = ntohs(a.sin_port);
    if (fd >= 0) close(fd);
    return port;
}

static void set_number(const char *name, int v) {
    char text[16];
    snprintf(text, sizeof text, "%d", v);
    setenv(name, text, 1);
}

// In the child: never returns
static void become_rank(char *const argv[], int rank, int size, int port, pid_t parent, const sigset_t *mask) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(127);
    set_number("RANK", rank);
    set_number("LOCAL_RANK", rank);
    set_number("WORLD_SIZE", size);
    set_number("MASTER_PORT", port);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    sigprocmask(SIG_SETMASK, mask, NULL);
    execv("/proc/self/exe", argv);
    _exit(127);
}

struct family {
    pid_t *pid; // 0: ended
    int n, left;
};

static void tell(const struct family *f, int signal_number) {
    for (int i = 0; i < f->n; i++)
        if (f->pid[i]) kill(f->pid[i], signal_number);
}

// Children that ended; e gets the first that ended badly
static void collect(struct family *f, struct err *e) {
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        for (int i = 0; i < f->n; i++) {
            if (f->pid[i] != pid) continue;
            f->pid[i] = 0, f->left--;
            if (WIFSIGNALED(status))
                err_set(e, E_DEVICE, "rank %d ended by signal %d (%s)", i, WTERMSIG(status), strsignal(WTERMSIG(status)));
            else if (WEXITSTATUS(status) == 127) err_set(e, E_IO, "rank %d did not start", i);
            else if (WEXITSTATUS(status)) err_set(e, E_DEVICE, "rank %d ended with status %d", i, WEXITSTATUS(status));
        }
}

static void supervise(struct family *f, const sigset_t *wanted, struct err *e) {
    int told = 0; // seconds since SIGTERM; 0: not yet
    double last = 0; // when one came
    while (f->left) {
        int got = sigtimedwait(wanted, NULL, &(struct timespec){.tv_sec = 1});
        if (got == SIGTERM || got == SIGINT) {
            if (clock_seconds() - last > PARALLEL_ECHO) tell(f, got);
            last = clock_seconds();
        }
        collect(f, e);
        if (!e->status || !f->left) continue;
        if (!told) tell(f, SIGTERM);
        if (got < 0 || !told) told++;
        if (told > GRACE) tell(f, SIGKILL);
    }
}

int parallel_launch(char *const argv[], int n, struct err *e) {
    struct err local = {0};
    struct family f = {.pid = mem_array((size_t)n, sizeof *f.pid)};
    sigset_t wanted, before;
    pid_t self = getpid();
    int port = free_port();
    if (!e) e = &local;
    if (!f.pid) return err_set(e, E_NOMEM, "no memory for %d ranks", n);
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGCHLD), sigaddset(&wanted, SIGTERM), sigaddset(&wanted, SIGINT);
    sigprocmask(SIG_BLOCK, &wanted, &before);
    for (; f.n < n && !e->status; f.n++) {
        f.pid[f.n] = fork();
        if (f.pid[f.n] == 0) become_rank(argv, f.n, n, port, self, &before);
        if (f.pid[f.n] < 0) err_set(e, E_NOMEM, "rank %d does not start: %s", f.n, strerror(errno)), f.pid[f.n] = 0;
        else f.left++;
    }
    supervise(&f, &wanted, e);
    sigprocmask(SIG_SETMASK, &before, NULL);
    mem_free(f.pid);
    return e->status;
}
