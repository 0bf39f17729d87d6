// SPDX-License-Identifier: MIT
/*
 * listen: the address that the daemon answers on. Thread: start-up.
 */
#ifndef SITD_LISTEN_H
#define SITD_LISTEN_H
#include <stdbool.h>

#include "core/base/err.h"

struct listener {
    int fd;
    bool local;     // loopback or a UNIX socket: other machines cannot reach it
    char url[600];  // "http://127.0.0.1:8080" with the real port, or "unix:PATH"
    char path[108]; // the UNIX socket's file, to be removed; else ""
};

// Checks "HOST:PORT", "[V6]:PORT" or "unix:PATH" and says whether only this machine reaches it. E_RANGE when it is none of these.
int listen_check(const char *address, bool *local, struct err *);
// Binds and listens, non-blocking. E_PERM, E_IO (address in use: the text says so). A UNIX socket's file left by a dead daemon is
// replaced.
int listen_open(struct listener *, const char *address, struct err *);
void listen_close(struct listener *);

#endif
