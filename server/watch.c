// SPDX-License-Identifier: MIT
#include "server/watch.h"

#include <stdio.h>
#include <string.h>

#include "core/base/log.h"

#define SETTLE_MS 100
#define SETTLE_MOST_MS 1000
#define RESCAN_MS 5000

static void on_settled(uv_timer_t *t) { watch_look(t->data); }

static void note(struct watch *w) {
    uv_update_time(w->settle.loop);
    int64_t now = (int64_t)uv_now(w->settle.loop);
    if (!uv_is_active((uv_handle_t *)&w->settle)) w->first_ms = now;
    int64_t left = w->first_ms + SETTLE_MOST_MS - now;
    uv_timer_start(&w->settle, on_settled, (uint64_t)(left < 0 ? 0 : left < SETTLE_MS ? left : SETTLE_MS), 0);
}

static void on_event(uv_fs_event_t *h, const char *name, int events, int status) {
    struct watch *w = h->data;
    bool model = !name || status < 0 || !strcmp(name, "model.json");
    if (model || (h == &w->on_folder && events & UV_RENAME)) note(w);
}

// Anew each time: a directory of the same name may be another one by now.
static void watch_path(struct watch *w, uv_fs_event_t *h, const char *path) {
    uv_fs_event_stop(h);
    int rc = uv_fs_event_start(h, on_event, path, 0);
    bool there = rc != UV_ENOENT && rc != UV_ELOOP && rc != UV_ENOTDIR && rc != UV_EACCES; // else the scan tells, and others are watched
    if (rc == 0 || !there || w->blind) return;
    w->blind = true;
    log_warn("changes cannot be watched: models are looked at from time to time", log_str("path", path),
             log_str("error", uv_strerror(rc)), log_int("every_ms", RESCAN_MS));
}

static void watch_dirs(struct watch *w, uv_fs_t *list) {
    uv_dirent_t entry;
    int n = 0;
    while (n < WATCH_DIRS && uv_fs_scandir_next(list, &entry) == 0) {
        char path[1024];
        bool may = entry.type == UV_DIRENT_DIR || entry.type == UV_DIRENT_LINK || entry.type == UV_DIRENT_UNKNOWN;
        if (!may || entry.name[0] == '.' || snprintf(path, sizeof path, "%s/%s", w->folder, entry.name) >= (int)sizeof path)
            continue;
        watch_path(w, &w->on_dir[n++], path);
    }
    for (; n < WATCH_DIRS; n++) uv_fs_event_stop(&w->on_dir[n]);
}

// The watches come first, then the look: what changes in between is not missed.
static void on_list(uv_fs_t *list) {
    struct watch *w = list->data;
    w->listing = false;
    if (w->engine) {
        watch_path(w, &w->on_folder, w->folder);
        if (list->result >= 0) watch_dirs(w, list);
        engine_scan(w->engine);
    }
    uv_fs_req_cleanup(list);
    if (w->engine && w->again) watch_look(w);
}

void watch_look(struct watch *w) {
    if (!w->engine) return;
    w->again = w->listing;
    if (w->listing) return;
    w->listing = uv_fs_scandir(w->settle.loop, &w->list, w->folder, 0, on_list) == 0;
    if (!w->listing) engine_scan(w->engine);
}

void watch_start(struct watch *w, uv_loop_t *loop, struct engine *engine, const char *folder) {
    *w = (struct watch){.engine = engine, .folder = folder};
    w->settle.data = w->rescan.data = w->on_folder.data = w->list.data = w;
    uv_timer_init(loop, &w->settle);
    uv_timer_init(loop, &w->rescan);
    uv_fs_event_init(loop, &w->on_folder);
    for (int i = 0; i < WATCH_DIRS; i++) {
        uv_fs_event_init(loop, &w->on_dir[i]);
        w->on_dir[i].data = w;
    }
    uv_timer_start(&w->rescan, on_settled, RESCAN_MS, RESCAN_MS);
    watch_look(w);
}

void watch_stop(struct watch *w) { w->engine = NULL; }
