// SPDX-License-Identifier: MIT
// What the loader (cuda.c, part of every build) and libsitd_cuda.so agree on.
#ifndef KERN_CUDA_H
#define KERN_CUDA_H
#include "kernels/kern.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KERN_CUDA_LIBRARY "libsitd_cuda.so"
#define KERN_CUDA_ENTRY "sitd_cuda_open"
#define KERN_CUDA_DEVICES "sitd_cuda_devices"

struct cuda_host { // the executable's side; both sizes must be the library's own, or it belongs to another build
    size_t kern_size, update_size;
    int (*check_linear)(struct kern *, const struct kern_linear_spec *);
    int (*check_attention)(struct kern *, int T, int H, int D);
    int (*check_conv)(struct kern *, const struct kern_conv_spec *);
    int (*check_wide)(struct kern *, int T, int C, int pictures);
};
typedef int cuda_open_fn(struct kern *, const struct kern_config *, const struct cuda_host *);
typedef int cuda_devices_fn(char *why, size_t why_size); // as kern_devices

#ifdef __cplusplus
}
#endif
#endif
