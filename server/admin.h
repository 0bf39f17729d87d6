// SPDX-License-Identifier: MIT
/*
 * admin: the routes of KServe's model repository. Loop thread only. They are answered to callers on this machine (a loopback
 * address, a UNIX socket), to others 403.
 */
#ifndef SITD_ADMIN_H
#define SITD_ADMIN_H
#include "server/http.h"

void admin_index(struct exchange *); // GET /v2/repository/index: every model directory, what it serves, what is wrong with it
void admin_load(struct exchange *);  // POST /v2/repository/models/{}/load: 202, the engine tries it now

#endif
