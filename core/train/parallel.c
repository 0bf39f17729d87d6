// SPDX-License-Identifier: MIT
#include "core/train/parallel.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/mem.h"

#define PATIENCE 120             // seconds until all ranks must be there
#define HELLO 2                  // seconds for a caller to say who it is
#define PIECE ((size_t)64 << 20) // floats of one exchange: NCCL wants them large (SPEED.md)
#define MAGIC "sitdrank"
enum { BYE = 'b', LOST = 'l' };

struct hello { // what a rank sends first
    char magic[8];
    uint32_t rank, size; // big-endian
};

struct parallel {
    struct kern *k;
    float *grads;
    double *numbers; // a buffer, [PARALLEL_NUMBERS]
    int rank, size, peers;
    int *fd;     // [peers]: rank 0: of rank i + 1; else: of rank 0
    int wake[2]; // a pipe that ends the watcher
    pthread_t watcher;
    bool watching;
    atomic_int lost; // the rank that died, -1: none
    struct {
        size_t from, to;
    } ready[2];                   // floats whose gradients are ready and not yet summed: of blocks and of modulation, which come by turns
    struct parallel_piece *piece; // in the order of the backward pass
    int pieces, room, next;       // next: of this pass; behind the last one 0 again
    int failed;                   // the back end's status of an exchange, KERN_*
};

/* ---- meeting ---- */

// All of n bytes; false when the other side ends or says nothing for so many seconds
static bool receive(int fd, void *to, size_t n, int patience) {
    for (size_t at = 0; at < n;) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        ssize_t got = poll(&p, 1, patience * 1000) > 0 ? recv(fd, (char *)to + at, n - at, 0) : 0;
        if (got <= 0) return false;
        at += (size_t)got;
    }
    return true;
}
static bool give(int fd, const void *from, size_t n) { return send(fd, from, n, MSG_NOSIGNAL) == (ssize_t)n; }

// here: only for ranks of this host
static int listen_at(int port, bool here, struct err *e) {
    int one = 1, fd = here ? -1 : socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool six = fd >= 0;
    if (!six) fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in6 a6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port), .sin6_addr = IN6ADDR_ANY_INIT};
    struct sockaddr_in a4 = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(here ? INADDR_LOOPBACK : INADDR_ANY)};
    if (fd >= 0) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (fd < 0 || bind(fd, six ? (void *)&a6 : (void *)&a4, six ? sizeof a6 : sizeof a4) || listen(fd, 64)) {
        err_param(e, E_IO, "MASTER_PORT", "rank 0 cannot listen on port %d: %s", port, strerror(errno));
        if (fd >= 0) close(fd);
        return -1;
    }
    return fd;
}

// Rank 0: takes the others as they come; strangers are turned away
static int meet_all(struct parallel *p, int listener, const char id[KERN_COMM_ID], struct err *e) {
    double until = clock_seconds() + PATIENCE;
    for (int here = 0; here < p->peers;) {
        struct pollfd wait = {.fd = listener, .events = POLLIN};
        struct hello h;
        int left = (int)(1e3 * (until - clock_seconds())), fd;
        if (left <= 0 || poll(&wait, 1, left) <= 0)
            return err_set(e, E_TIMEOUT, "%d of %d ranks came within %d seconds", here + 1, p->size, PATIENCE);
        if ((fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) < 0) continue;
        bool known = receive(fd, &h, sizeof h, HELLO) && memcmp(h.magic, MAGIC, 8) == 0;
        uint32_t rank = known ? ntohl(h.rank) : 0;
        if (known && (ntohl(h.size) != (uint32_t)p->size || rank < 1 || rank >= (uint32_t)p->size || p->fd[rank - 1] >= 0)) {
            close(fd);
            return err_set(e, E_CONFLICT, "a process calls itself rank %u of %u, this run has %d, each once", rank, ntohl(h.size),
                           p->size);
        }
        if (!known || !give(fd, id, KERN_COMM_ID)) close(fd);
        else p->fd[rank - 1] = fd, here++;
    }
    return OK;
}

static int connect_once(const struct parallel_spec *s, const char **why) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list = NULL;
    char port[16];
    int fd = -1;
    snprintf(port, sizeof port, "%d", s->port);
    int rc = getaddrinfo(s->host, port, &hints, &list);
    *why = rc ? gai_strerror(rc) : "";
    for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen)) *why = strerror(errno), close(fd), fd = -1;
    }
    if (list) freeaddrinfo(list);
    return fd;
}

static int meet_first(struct parallel *p, const struct parallel_spec *s, char id[KERN_COMM_ID], struct err *e) {
    struct hello h = {MAGIC, htonl((uint32_t)s->rank), htonl((uint32_t)s->size)};
    const char *why = "";
    for (double until = clock_seconds() + PATIENCE; p->fd[0] < 0 && clock_seconds() < until;) {
        p->fd[0] = connect_once(s, &why);
        if (p->fd[0] < 0) nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
    }
    if (p->fd[0] < 0)
        return err_param(e, E_TIMEOUT, "MASTER_ADDR", "rank %d does not reach rank 0 at %s port %d: %s", s->rank, s->host,
                         s->port, why);
    if (!give(p->fd[0], &h, sizeof h) || !receive(p->fd[0], id, KERN_COMM_ID, PATIENCE))
        return err_set(e, E_IO, "rank 0 at %s port %d did not take rank %d in", s->host, s->port, s->rank);
    return OK;
}

/* ---- watching ---- */

static void give_up(struct parallel *p, int rank) {
    int none = -1;
    if (!atomic_compare_exchange_strong(&p->lost, &none, rank)) return;
    unsigned char text[2] = {LOST, (unsigned char)rank};
    for (int i = 0; p->rank == 0 && i < p->peers; i++) (void)give(p->fd[i], text, 2);
    if (p->k->comm_abort) p->k->comm_abort(p->k);
}

// Something came from peer i: its end, announced or not, or word of another's
static void heard(struct parallel *p, struct pollfd *peer, int i) {
    unsigned char text[2] = {0, 0};
    ssize_t n = recv(peer->fd, text, 2, 0);
    if (n == 2 && text[0] == LOST) give_up(p, text[1]);
    else if (!(n >= 1 && text[0] == BYE)) give_up(p, p->rank == 0 ? i + 1 : 0);
    peer->fd = -1; // poll passes it over
}

static void *watch(void *ctx) {
    struct parallel *p = ctx;
    struct pollfd *set = mem_array((size_t)p->peers + 1, sizeof *set);
    if (!set) return NULL;
    for (int i = 0; i < p->peers; i++) set[i] = (struct pollfd){.fd = p->fd[i], .events = POLLIN};
    set[p->peers] = (struct pollfd){.fd = p->wake[0], .events = POLLIN};
    while (!set[p->peers].revents) {
        if (poll(set, (nfds_t)p->peers + 1, -1) < 0) continue;
        for (int i = 0; i < p->peers; i++)
            if (set[i].fd >= 0 && set[i].revents) heard(p, &set[i], i);
    }
    mem_free(set);
    return NULL;
}

int parallel_check(const struct parallel *p, struct err *e) {
    int lost = atomic_load(&p->lost);
    return lost < 0 ? OK : err_set(e, E_DEVICE, "rank %d of %d ended: the run cannot go on", lost, p->size);
}

/* ---- a run ---- */

static int meet(struct parallel *p, const struct parallel_spec *s, struct err *e) {
    char id[KERN_COMM_ID];
    int rc = OK;
    if (s->rank == 0) {
        int listener = listen_at(s->port, strcmp(s->host, "127.0.0.1") == 0, e);
        if (listener < 0) return E_IO;
        if (p->k->comm_id(p->k, id)) rc = err_set(e, E_DEVICE, "%s", p->k->why);
        if (rc == OK) rc = meet_all(p, listener, id, e);
        close(listener);
    } else rc = meet_first(p, s, id, e);
    for (int i = 0, one = 1; i < p->peers && rc == OK; i++) setsockopt(p->fd[i], SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    if (rc == OK && pipe(p->wake)) rc = err_set(e, E_IO, "no pipe: %s", strerror(errno));
    if (rc == OK) p->watching = pthread_create(&p->watcher, NULL, watch, p) == 0;
    if (rc == OK && !p->watching) rc = err_set(e, E_NOMEM, "no thread to watch over %d ranks", p->size);
    if (rc == OK && p->k->alloc(p->k, PARALLEL_NUMBERS * sizeof(double), (void **)&p->numbers))
        rc = err_set(e, E_NOMEM, "%s", p->k->why);
    if (rc == OK && p->k->comm_join(p->k, id, s->rank, s->size)) rc = err_set(e, E_DEVICE, "%s", p->k->why);
    return rc;
}

int parallel_join(struct parallel **out, const struct parallel_spec *s, struct kern *k, float *grads, struct err *e) {
    *out = NULL;
    if (s->bring) s->bring(k);
    if (!k->comm_join) return err_set(e, E_UNSUPPORTED, "the %s back end trains in one process", k->name);
    if (s->size > 255) return err_set(e, E_RANGE, "%d ranks, 255 are the most", s->size);
    struct parallel *p = mem_alloc(sizeof *p);
    if (!p) return err_set(e, E_NOMEM, "no memory");
    *p = (struct parallel){
        .k = k, .grads = grads, .rank = s->rank, .size = s->size, .peers = s->rank ? 1 : s->size - 1, .wake = {-1, -1}};
    atomic_init(&p->lost, -1);
    p->fd = mem_array((size_t)p->peers + 1, sizeof *p->fd);
    for (int i = 0; p->fd && i < p->peers; i++) p->fd[i] = -1;
    int rc = p->fd ? meet(p, s, e) : err_set(e, E_NOMEM, "no memory for %d ranks", s->size);
    if (rc != OK) return parallel_free(p, false), rc;
    *out = p;
    return OK;
}

void parallel_free(struct parallel *p, bool well) {
    if (!p) return;
    unsigned char bye = BYE;
    for (int i = 0; well && p->fd && i < p->peers; i++)
        if (p->fd[i] >= 0) (void)give(p->fd[i], &bye, 1);
    if (p->watching) {
        (void)!write(p->wake[1], "", 1);
        pthread_join(p->watcher, NULL);
    }
    for (int i = 0; i < 2; i++)
        if (p->wake[i] >= 0) close(p->wake[i]);
    for (int i = 0; p->fd && i < p->peers; i++)
        if (p->fd[i] >= 0) close(p->fd[i]);
    if (p->numbers) p->k->free(p->k, p->numbers);
    mem_free(p->piece);
    mem_free(p->fd);
    mem_free(p);
}

/* ---- sums ---- */

// Floats [from, to) as a piece: shares of whole vectors of four, and a rest
static struct parallel_piece cut(const struct parallel *p, size_t from, size_t to) {
    const size_t size = (size_t)p->size, share = (to - from) / size & ~(size_t)3;
    return (struct parallel_piece){.from = from,
                                   .own = from + (size_t)p->rank * share,
                                   .share = share,
                                   .rest = from + size * share,
                                   .rest_count = to - from - size * share};
}

static int refuse(struct parallel *p, int status, const char *why) {
    snprintf(p->k->why, sizeof p->k->why, "%s", why);
    return status;
}

// The first pass lays the pieces down; later ones bring the same, or moments would lie with ranks that no longer step them.
static int keep(struct parallel *p, const struct parallel_piece *piece) {
    if (p->next < p->pieces)
        return memcmp(&p->piece[p->next], piece, sizeof *piece) == 0
                   ? KERN_OK
                   : refuse(p, KERN_EUNSUPPORTED, "gradients came in another order than in the first step");
    if (p->pieces == p->room) {
        struct parallel_piece *more = mem_resize(p->piece, (size_t)(p->room = 2 * p->room + 16), sizeof *more);
        if (!more) return refuse(p, KERN_ENOMEM, "no memory for a list of pieces");
        p->piece = more;
    }
    p->piece[p->pieces++] = *piece;
    return KERN_OK;
}

static void sum_ready(struct parallel *p, int i) {
    struct kern *k = p->k;
    const struct parallel_piece piece = cut(p, p->ready[i].from, p->ready[i].to);
    p->ready[i].from = p->ready[i].to = 0;
    if (!piece.share && !piece.rest_count) return;
    if (!p->failed) p->failed = keep(p, &piece);
    p->next++;
    if (!p->failed && piece.share) p->failed = k->comm_scatter(k, p->grads + piece.from, piece.share);
    if (!p->failed && piece.rest_count) p->failed = k->comm_sum(k, p->grads + piece.rest, piece.rest_count);
}

void parallel_gradients(void *ctx, size_t offset, size_t count) {
    struct parallel *p = ctx;
    int i = 0;
    while (i < 2 && p->ready[i].from != offset + count) i++; // a neighbour of what waits
    if (i == 2) {
        i = p->ready[0].to > 0;
        if (i && p->ready[1].to > 0) sum_ready(p, 1);
        p->ready[i].to = offset + count;
    }
    p->ready[i].from = offset;
    if (p->ready[i].to - offset >= PIECE) sum_ready(p, i);
}

int parallel_wait(struct parallel *p, struct err *e) {
    int rc = p->failed ? p->failed : p->k->comm_wait(p->k);
    p->failed = 0;
    if (parallel_check(p, e)) return E_DEVICE; // the cause, where an exchange failed for it
    return rc ? err_set(e, E_DEVICE, "%s", p->k->why) : OK;
}

int parallel_finish(struct parallel *p, struct err *e) {
    for (int i = 0; i < 2; i++) sum_ready(p, i);
    p->next = 0;
    return parallel_wait(p, e);
}

int parallel_pieces(const struct parallel *p, const struct parallel_piece **out) { return *out = p->piece, p->pieces; }

void parallel_share(struct parallel *p, float *array, int i) {
    const struct parallel_piece *piece = &p->piece[i];
    if (!p->failed && piece->share) p->failed = p->k->comm_gather(p->k, array + piece->from, piece->share);
}

int parallel_gather(struct parallel *p, float *array, struct err *e) {
    for (int i = 0; i < p->pieces; i++) parallel_share(p, array, i);
    return parallel_wait(p, e);
}

void parallel_sum(struct parallel *p, double *sum, size_t n) {
    if (!p->failed) p->failed = p->k->comm_sum_double(p->k, sum, n);
}

int parallel_numbers(struct parallel *p, double *v, int n, struct err *e) {
    struct kern *k = p->k;
    size_t bytes = (size_t)n * sizeof *v;
    if (!p->failed) p->failed = k->upload(k, p->numbers, v, bytes);
    parallel_sum(p, p->numbers, (size_t)n);
    int rc = parallel_wait(p, e);
    if (rc == OK && k->download(k, v, p->numbers, bytes)) rc = err_set(e, E_DEVICE, "%s", k->why);
    return parallel_check(p, e) ? E_DEVICE : rc;
}
