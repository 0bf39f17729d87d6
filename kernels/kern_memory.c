// SPDX-License-Identifier: MIT
/*
 * kern_memory: how much memory this process can still have before somebody is killed for it.
 *
 * The kernel's own estimate (MemAvailable), or less where a control group has a limit: what is left of that, the files that it
 * caches counted as free, since they are dropped first. Version 2 says it in memory.max and memory.current, version 1 in
 * memory.*_in_bytes.
 */
#include "kernels/cgroup.h"
#include "kernels/kern.h"

#include <stdio.h>
#include <string.h>

// The number behind `key` in a file of "key number" lines; key "": the file is the number. false: there is none ("max").
static bool number_in(const char *group, const char *file, const char *key, double *out) {
    char path[640], line[256];
    size_t n = strlen(key);
    bool found = false;
    snprintf(path, sizeof path, "%s/%s", group, file);
    FILE *f = fopen(path, "re");
    if (!f) return false;
    while (!found && fgets(line, sizeof line, f))
        found = strncmp(line, key, n) == 0 && (!n || line[n] == ' ' || line[n] == ':') &&
                sscanf(line + n + (line[n] == ':'), "%lf", out) == 1;
    fclose(f);
    return found;
}

static void room_at(void *ctx, const char *group, bool v2) {
    double limit, used, cached, *least = ctx;
    if (!number_in(group, v2 ? "memory.max" : "memory.limit_in_bytes", "", &limit)) return;
    if (!number_in(group, v2 ? "memory.current" : "memory.usage_in_bytes", "", &used)) return;
    if (number_in(group, "memory.stat", v2 ? "inactive_file" : "total_inactive_file", &cached)) used -= cached;
    if (number_in(group, "memory.stat", v2 ? "active_file" : "total_active_file", &cached)) used -= cached;
    double room = limit > used ? limit - used : 0;
    if (room < *least) *least = room;
}

size_t kern_host_memory(void) {
    double kib, least = 9e18; // nobody says: no limit
    if (number_in("/proc", "meminfo", "MemAvailable", &kib)) least = kib * 1024;
    kern_cgroups("memory", room_at, &least);
    return (size_t)least;
}
