// SPDX-License-Identifier: MIT
#include "kernels/cpu/cpu.h"

#include <dlfcn.h>

/*
 * oneDNN here is built on OpenMP, elsewhere perhaps not, so the symbols are looked up instead of linked. The number of threads is
 * a setting of each calling thread: 1 in a pool thread, for good, and around the making of primitives in the owner's.
 */
int cpu_omp_single(int threads) {
    int (*get)(void);
    void (*set)(int);
    *(void **)&get = dlsym(RTLD_DEFAULT, "omp_get_max_threads");
    *(void **)&set = dlsym(RTLD_DEFAULT, "omp_set_num_threads");
    if (!get || !set) return 0;
    int was = get();
    if (threads > 0 && was != threads) set(threads);
    return was;
}
