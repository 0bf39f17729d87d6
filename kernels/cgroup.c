// SPDX-License-Identifier: MIT
#include "kernels/cgroup.h"

#include <stdio.h>
#include <string.h>

static void walk_up(const char *root, char *path, bool v2, kern_cgroup_fn *fn, void *ctx) {
    for (;;) {
        char group[576];
        snprintf(group, sizeof group, "%s%s", root, path);
        fn(ctx, group, v2);
        char *slash = strrchr(path, '/');
        if (!slash) return;
        *slash = 0; // the parent; "" is the root
    }
}

// /proc/self/cgroup has lines "0::/path" (version 2) and "4:cpu,cpuacct:/path" (version 1)
void kern_cgroups(const char *controller, kern_cgroup_fn *fn, void *ctx) {
    char line[512], root[64];
    FILE *f = fopen("/proc/self/cgroup", "re");
    if (!f) return;
    snprintf(root, sizeof root, "/sys/fs/cgroup/%s", controller);
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        char *names = strchr(line, ':'), *path = names ? strchr(names + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        names++;
        if (strcmp(path, "/") == 0) *path = 0;
        if (!*names) {
            walk_up("/sys/fs/cgroup", path, true, fn, ctx);
            continue;
        }
        for (char *save = NULL, *name = strtok_r(names, ",", &save); name; name = strtok_r(NULL, ",", &save))
            if (strcmp(name, controller) == 0) walk_up(root, path, false, fn, ctx);
    }
    fclose(f);
}
