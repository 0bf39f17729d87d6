// SPDX-License-Identifier: MIT
/*
 * watch: asks the engine to look at the model directories when something moves there. Loop thread only.
 *
 * The models folder and each directory in it are watched through libuv. What counts is model.json and, in the folder, names that
 * come and go; a burst of events is one look, SETTLE_MS after the last, but no later than SETTLE_MOST_MS after the first. Network
 * file systems tell nothing of what other machines write, so there is a look every RESCAN_MS in any case.
 */
#ifndef SITD_WATCH_H
#define SITD_WATCH_H
#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#include "core/engine/engine.h"

#define WATCH_DIRS 128 // directories that are watched; what lies in more waits for the next rescan

struct watch {
    struct engine *engine; // NULL: stopped
    const char *folder;    // borrowed
    uv_timer_t settle, rescan;
    uv_fs_event_t on_folder, on_dir[WATCH_DIRS];
    uv_fs_t list;
    bool listing, again; // the folder is being listed on libuv's pool; it must be listed once more
    bool blind;          // some watch could not be had, and that was said
    int64_t first_ms;    // event of the burst
};

void watch_start(struct watch *, uv_loop_t *, struct engine *,
                 const char *folder); // what was missed before is looked for at once
void watch_look(struct watch *);      // now, whatever was seen
void watch_stop(struct watch *);      // before the engine closes; the handles are the loop's to close. Fine when never started

#endif
