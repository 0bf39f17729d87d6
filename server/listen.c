// SPDX-License-Identifier: MIT
#include "server/listen.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

struct address { // what either kind of --listen comes to
    int family;
    socklen_t len;
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_un un;
        struct sockaddr_storage room;
    } u;
};

static bool is_loopback(const struct address *a) {
    if (a->family == AF_UNIX) return true;
    if (a->family == AF_INET) return ntohl(a->u.v4.sin_addr.s_addr) >> 24 == 127;
    const struct in6_addr *v6 = &a->u.v6.sin6_addr;
    return IN6_IS_ADDR_LOOPBACK(v6) || (IN6_IS_ADDR_V4MAPPED(v6) && v6->s6_addr[12] == 127);
}

static int parse_unix(struct address *a, const char *path, struct err *e) {
    a->family = AF_UNIX;
    a->u.un.sun_family = AF_UNIX;
    a->len = sizeof a->u.un;
    if (!*path || strlen(path) >= sizeof a->u.un.sun_path)
        return err_param(e, E_RANGE, "listen", "listen: the path of a UNIX socket has 1 to %zu bytes",
                         sizeof a->u.un.sun_path - 1);
    strcpy(a->u.un.sun_path, path);
    return 0;
}

static int parse_address(struct address *a, const char *text, struct err *e) {
    *a = (struct address){0};
    if (!strncmp(text, "unix:", 5)) return parse_unix(a, text + 5, e);
    const char *colon = strrchr(text, ':');
    char host[256];
    size_t len = colon ? (size_t)(colon - text) : 0;
    bool bracket = len >= 2 && text[0] == '[' && text[len - 1] == ']';
    bool digits = colon && colon[1] && strspn(colon + 1, "0123456789") == strlen(colon + 1) && strlen(colon + 1) <= 5;
    if (!digits || atoi(colon + 1) > 65535 || len >= sizeof host || (!bracket && memchr(text, ':', len)))
        return err_param(e, E_RANGE, "listen", "listen: '%s' is not HOST:PORT, [V6]:PORT or unix:PATH", text);
    snprintf(host, sizeof host, "%.*s", (int)(bracket ? len - 2 : len), text + bracket);
    struct addrinfo hints = {.ai_family = bracket ? AF_INET6 : AF_UNSPEC,
                             .ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_PASSIVE | AI_NUMERICSERV},
                    *found;
    int rc = getaddrinfo(*host ? host : NULL, colon + 1, &hints, &found);
    if (rc) return err_param(e, E_RANGE, "listen", "listen: '%s': %s", text, gai_strerror(rc));
    a->family = found->ai_family;
    a->len = found->ai_addrlen;
    memcpy(&a->u, found->ai_addr, found->ai_addrlen);
    freeaddrinfo(found);
    return 0;
}

int listen_check(const char *text, bool *local, struct err *e) {
    struct address a;
    if (parse_address(&a, text, e)) return e->status;
    *local = is_loopback(&a);
    return 0;
}

// A socket file that nobody answers on was left by a daemon that died: connecting tells.
static void remove_stale(const struct address *a) {
    struct stat st;
    if (lstat(a->u.un.sun_path, &st) || !S_ISSOCK(st.st_mode)) return;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return;
    if (connect(fd, &a->u.any, a->len) && errno == ECONNREFUSED) unlink(a->u.un.sun_path);
    close(fd);
}

static void write_url(struct listener *l, const struct address *a) {
    char host[INET6_ADDRSTRLEN] = "";
    if (a->family == AF_UNIX) snprintf(l->url, sizeof l->url, "unix:%s", l->path);
    else if (a->family == AF_INET)
        snprintf(l->url, sizeof l->url, "http://%s:%d", inet_ntop(AF_INET, &a->u.v4.sin_addr, host, sizeof host),
                 ntohs(a->u.v4.sin_port));
    else
        snprintf(l->url, sizeof l->url, "http://[%s]:%d", inet_ntop(AF_INET6, &a->u.v6.sin6_addr, host, sizeof host),
                 ntohs(a->u.v6.sin6_port));
}

int listen_open(struct listener *l, const char *text, struct err *e) {
    struct address a;
    *l = (struct listener){.fd = -1};
    if (parse_address(&a, text, e)) return e->status;
    l->local = is_loopback(&a);
    if (a.family == AF_UNIX) remove_stale(&a);
    l->fd = socket(a.family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int on = 1, off = 0;
    if (l->fd >= 0 && a.family != AF_UNIX) setsockopt(l->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (l->fd >= 0 && a.family == AF_INET6) setsockopt(l->fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (l->fd < 0 || bind(l->fd, &a.u.any, a.len) || listen(l->fd, SOMAXCONN)) {
        int why = errno;
        listen_close(l);
        return err_param(e, why == EACCES || why == EPERM ? E_PERM : E_IO, "listen", "listen: '%s': %s", text, strerror(why));
    }
    if (a.family == AF_UNIX) {
        strcpy(l->path, a.u.un.sun_path);
        chmod(l->path, 0660);
    } else {
        socklen_t len = sizeof a.u.room;
        getsockname(l->fd, &a.u.any, &len);
    }
    write_url(l, &a);
    return 0;
}

void listen_close(struct listener *l) {
    if (l->fd >= 0) close(l->fd);
    if (*l->path) unlink(l->path);
    l->fd = -1;
    *l->path = 0;
}
