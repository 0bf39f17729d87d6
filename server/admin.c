// SPDX-License-Identifier: MIT
#include "server/admin.h"

#include <arpa/inet.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

#include "core/base/log.h"
#include "core/base/mem.h"
#include "proto/emit.h"

#define ENTRIES_MAX 1024 // of the index

static bool is_loopback(const struct sockaddr *a) {
    if (!a || a->sa_family == AF_UNIX) return true; // MHD knows no address of a UNIX socket's client
    if (a->sa_family == AF_INET) return ntohl(((const struct sockaddr_in *)a)->sin_addr.s_addr) >> 24 == 127;
    if (a->sa_family != AF_INET6) return false;
    const struct in6_addr *v6 = &((const struct sockaddr_in6 *)a)->sin6_addr;
    return IN6_IS_ADDR_LOOPBACK(v6) || (IN6_IS_ADDR_V4MAPPED(v6) && v6->s6_addr[12] == 127);
}

static bool refused(struct exchange *ex) {
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(ex->mhd, MHD_CONNECTION_INFO_CLIENT_ADDRESS);
    struct http_error e;
    if (is_loopback(info ? info->client_addr : NULL)) return false;
    http_error_set(&e, 403, "forbidden", NULL, "only callers on the daemon's own machine may look after its models");
    http_answer_error(ex, &e, 0);
    return true;
}

static void put_entry(struct emit *e, const struct engine_entry *entry) {
    static const char *const states[] = {[MODEL_LOADS] = "LOADING", [MODEL_SERVES] = "READY", [MODEL_REFUSED] = "UNAVAILABLE"};
    char version[24] = "";
    if (entry->digest[0]) snprintf(version, sizeof version, "%" PRId64, entry->version);
    emit_open(e, NULL, '{');
    emit_string(e, "name", entry->name);
    emit_string(e, "version", version);
    emit_string(e, "state", states[entry->state]);
    emit_string(e, "reason", entry->reason);
    emit_string(e, "digest", entry->digest[0] ? entry->digest : NULL);
    emit_close(e, '}');
}

void admin_index(struct exchange *ex) {
    struct emit e = {0};
    if (refused(ex)) return;
    struct engine_entry *entries = mem_array(ENTRIES_MAX, sizeof *entries);
    int n = entries ? engine_repository(ex->server->engine, entries, ENTRIES_MAX) : 0;
    emit_open(&e, NULL, '[');
    for (int i = 0; i < n; i++) put_entry(&e, &entries[i]);
    emit_close(&e, ']');
    char *text = emit_take(&e);
    if (!entries) mem_free(text), text = NULL;
    mem_free(entries);
    http_answer_take(ex, 200, "application/json", text, text ? strlen(text) : 0);
}

void admin_load(struct exchange *ex) {
    struct emit e = {0};
    struct err err = {0};
    struct http_error error;
    if (refused(ex)) return;
    if (engine_reload(ex->server->engine, ex->part, &err)) {
        http_error_from(&error, &err);
        http_answer_error(ex, &error, 0);
        return;
    }
    log_info("model load asked for", log_str("model", ex->part), log_str("id", ex->id));
    emit_open(&e, NULL, '{');
    emit_string(&e, "name", ex->part);
    emit_close(&e, '}');
    char *text = emit_take(&e);
    http_answer_take(ex, 202, "application/json", text, text ? strlen(text) : 0);
}
