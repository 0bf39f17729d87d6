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

static int no_training(struct kern *k, const struct kern_linear_spec *spec, const float *w, const float *b,
                       struct kern_linear **out) {
    (void)spec, (void)w, (void)b;
    *out = NULL;
    return kern_fail(k, KERN_EUNSUPPORTED, "the CUDA back end does not train yet");
}

int kern_cuda_open(struct kern *k, const struct kern_config *cfg) {
    static const struct cuda_host host = {.kern_size = sizeof(struct kern),
                                          .update_size = sizeof(struct kern_row_update),
                                          .check_linear = kern_check_linear,
                                          .check_attention = kern_check_attention,
                                          .check_conv = kern_check_conv,
                                          .check_wide = kern_check_wide};
    char path[512];
    if (!library_path(path, sizeof path)) return kern_fail(k, KERN_EUNSUPPORTED, "cannot tell where this program lies");
    if (access(path, F_OK) != 0) return kern_fail(k, KERN_EUNSUPPORTED, "this build has no CUDA back end (no %s)", path);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!library) return kern_fail(k, KERN_EUNSUPPORTED, "the CUDA back end does not load: %s", dlerror());
    cuda_open_fn *open;
    *(void **)&open = dlsym(library, KERN_CUDA_ENTRY);
    k->linear_wrap = no_training; // unless the library has its own; nothing learns without it
    int rc = open ? open(k, cfg, &host) : kern_fail(k, KERN_EUNSUPPORTED, "%s is not this program's", path);
    if (rc < 0) dlclose(library); // drops the count; RTLD_NODELETE keeps the code
    return rc;
}
