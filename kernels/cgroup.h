// SPDX-License-Identifier: MIT
/*
 * cgroup: the control groups that this process is in. A limit binds all levels of the tree, so each ancestor is asked too.
 */
#ifndef KERN_CGROUP_H
#define KERN_CGROUP_H
#include <stdbool.h>

typedef void kern_cgroup_fn(void *ctx, const char *group, bool v2); // group: its folder
// Calls fn for our group and its ancestors, in version 2 and in version 1's tree of this controller ("cpu", "memory").
void kern_cgroups(const char *controller, kern_cgroup_fn *, void *ctx);

#endif
