// SPDX-License-Identifier: MIT
/*
 * kern_threads: how many threads this process may really run at once.
 *
 * The affinity mask says on which processors, the cgroup's quota for how much of the time: a container limited to two processors'
 * worth of time on a 64-core machine has all 64 in its mask, and 64 threads would be throttled for most of each period.
 * Version 2 says it in cpu.max, version 1 in cpu.cfs_*.
 */
#include "kernels/cgroup.h"
#include "kernels/kern.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool read_line(const char *path, char *line, int size) {
    FILE *f = fopen(path, "re");
    if (!f) return false;
    bool ok = fgets(line, size, f) != NULL;
    fclose(f);
    return ok;
}

// ctx: the least number of processors that some level may use; 0: no limit so far
static void quota_at(void *ctx, const char *group, bool v2) {
    char file[640], line[64], period_line[64];
    double quota = 0, period = 0, *least = ctx;
    snprintf(file, sizeof file, "%s/%s", group, v2 ? "cpu.max" : "cpu.cfs_quota_us");
    if (!read_line(file, line, sizeof line)) return;
    if (v2) {
        if (sscanf(line, "%lf %lf", &quota, &period) != 2) return; // "max 100000": no number
    } else {
        snprintf(file, sizeof file, "%s/cpu.cfs_period_us", group);
        if (!read_line(file, period_line, sizeof period_line)) return;
        quota = strtod(line, NULL); // -1: none
        period = strtod(period_line, NULL);
    }
    if (quota > 0 && period > 0 && (*least == 0 || quota / period < *least)) *least = quota / period;
}

int kern_threads_allowed(void) {
    int n = 1;
    for (int cpus = 1024; cpus <= 1 << 20; cpus *= 4) { // the kernel refuses a mask smaller than its own
        cpu_set_t *set = CPU_ALLOC((size_t)cpus);
        size_t size = CPU_ALLOC_SIZE((size_t)cpus);
        if (!set) break;
        bool ok = sched_getaffinity(0, size, set) == 0;
        if (ok) n = CPU_COUNT_S(size, set);
        CPU_FREE(set);
        if (ok) break;
    }
    double quota = 0;
    kern_cgroups("cpu", quota_at, &quota);
    if (quota > 0 && quota < n) n = (int)quota;
    return n < 1 ? 1 : n;
}
