// SPDX-License-Identifier: MIT
/*
 * kern_threads: how many threads this process may really run at once.
 *
 * The affinity mask says on which processors, the cgroup's quota for how much of the time: a container limited to two processors'
 * worth of time on a 64-core machine has all 64 in its mask, and 64 threads would be throttled for most of each period. A quota
 * binds all levels of the tree, so each ancestor of our group is asked, in version 2 (cpu.max) and in version 1 (cpu.cfs_*).
 */
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

// Processors' worth of time that the group at root/path may use; 0: no limit there
static double quota_at(const char *root, const char *path, bool v2) {
    char file[640], line[64], period_line[64];
    double quota = 0, period = 0;
    snprintf(file, sizeof file, "%s%s/%s", root, path, v2 ? "cpu.max" : "cpu.cfs_quota_us");
    if (!read_line(file, line, sizeof line)) return 0;
    if (v2) return sscanf(line, "%lf %lf", &quota, &period) == 2 && period > 0 ? quota / period : 0; // "max 100000": no number
    snprintf(file, sizeof file, "%s%s/cpu.cfs_period_us", root, path);
    if (!read_line(file, period_line, sizeof period_line)) return 0;
    quota = strtod(line, NULL); // -1: none
    period = strtod(period_line, NULL);
    return quota > 0 && period > 0 ? quota / period : 0;
}

static double least_quota(const char *root, char *path, bool v2, double least) {
    for (;;) {
        double q = quota_at(root, path, v2);
        if (q > 0 && (least == 0 || q < least)) least = q;
        char *slash = strrchr(path, '/');
        if (!slash) return least;
        *slash = 0; // the parent; "" is the root
    }
}

// /proc/self/cgroup has lines "0::/path" (version 2) and "4:cpu,cpuacct:/path" (version 1)
static double cgroup_quota(void) {
    char line[512];
    double least = 0;
    FILE *f = fopen("/proc/self/cgroup", "re");
    if (!f) return 0;
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        char *names = strchr(line, ':'), *path = names ? strchr(names + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        names++;
        if (strcmp(path, "/") == 0) *path = 0;
        if (!*names) {
            least = least_quota("/sys/fs/cgroup", path, true, least);
            continue;
        }
        for (char *save = NULL, *name = strtok_r(names, ",", &save); name; name = strtok_r(NULL, ",", &save))
            if (strcmp(name, "cpu") == 0) least = least_quota("/sys/fs/cgroup/cpu", path, false, least);
    }
    fclose(f);
    return least;
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
    double quota = cgroup_quota();
    if (quota > 0 && quota < n) n = (int)quota;
    return n < 1 ? 1 : n;
}
