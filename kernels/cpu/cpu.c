// SPDX-License-Identifier: MIT
#include "kernels/backend.h"

int kern_cpu_open(struct kern *k, const struct kern_config *cfg) {
    (void)cfg;
    return kern_fail(k, KERN_EUNSUPPORTED, "the cpu back end is not in this build");
}

bool kern_cpu_has_bf16(void) { return false; }
