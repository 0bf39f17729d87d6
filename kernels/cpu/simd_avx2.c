// SPDX-License-Identifier: MIT
#if defined(__x86_64__)
#include <immintrin.h>

#define W 8
#define MR 4
#define SIMD simd_avx2
#define SIMD_NAME "AVX2"
#define V_FMA(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define V_SQRT(x) ((vf)_mm256_sqrt_ps((__m256)(x)))
#define V_MAX(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define V_MIN(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#include "kernels/cpu/simd_body.h"
#endif
