// SPDX-License-Identifier: MIT
/*
 * cuda: finds the CUDA back end at run time.
 *
 * Everything that needs NVIDIA's compiler or libraries lives in libsitd_cuda.so, which the build puts beside the executable. One
 * executable thus runs everywhere: where that file, the driver or cuBLASLt is missing, opening "cuda" fails with a text that says
 * which, and the other back ends work. The library stays loaded until the process ends: unloading a CUDA runtime that still owns
 * a context is not safe.
 */
#include "kernels/cuda/cuda.h"
#include "kernels/backend.h"

#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>

// Path of the library beside the executable; false when it does not fit
static bool library_path(char *path, size_t size) {
    ssize_t n = readlink("/proc/self/exe", path, size - 1);
    if (n <= 0) return false;
    path[n] = 0;
    char *slash = strrchr(path, '/');
    if (!slash || (size_t)(slash + 1 - path) + sizeof KERN_CUDA_LIBRARY > size) return false;
    memcpy(slash + 1, KERN_CUDA_LIBRARY, sizeof KERN_CUDA_LIBRARY);
    return true;
}

// The library, or NULL with the reason. The caller drops the count with dlclose; RTLD_NODELETE keeps the code.
static void *open_library(char *path, size_t path_size, char *why, size_t why_size) {
    void *library = NULL;
    if (!library_path(path, path_size)) snprintf(why, why_size, "cannot tell where this program lies");
    else if (access(path, F_OK) != 0) snprintf(why, why_size, "this build has no CUDA back end (no %s)", path);
    else if (!(library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE)))
        snprintf(why, why_size, "the CUDA back end does not load: %s", dlerror());
    return library;
}

int kern_cuda_devices(char *why, size_t why_size) {
    char path[512];
    void *library = open_library(path, sizeof path, why, why_size);
    if (!library) return 0;
    cuda_devices_fn *devices;
    *(void **)&devices = dlsym(library, KERN_CUDA_DEVICES);
    int n = devices ? devices(why, why_size) : 0;
    if (!devices) snprintf(why, why_size, "%s is not this program's", path);
    dlclose(library);
    return n;
}

int kern_cuda_open(struct kern *k, const struct kern_config *cfg) {
    static const struct cuda_host host = {.kern_size = sizeof(struct kern),
                                          .update_size = sizeof(struct kern_row_update),
                                          .check_linear = kern_check_linear,
                                          .check_attention = kern_check_attention,
                                          .check_conv = kern_check_conv,
                                          .check_wide = kern_check_wide};
    char path[512];
    void *library = open_library(path, sizeof path, k->why, sizeof k->why);
    if (!library) return KERN_EUNSUPPORTED;
    cuda_open_fn *open;
    *(void **)&open = dlsym(library, KERN_CUDA_ENTRY);
    int rc = open ? open(k, cfg, &host) : kern_fail(k, KERN_EUNSUPPORTED, "%s is not this program's", path);
    if (rc < 0) dlclose(library);
    return rc;
}
