// SPDX-License-Identifier: MIT
#if defined(__x86_64__)
#include <immintrin.h>

#define W 16
#define MR 8
#define SIMD simd_avx512bf16
#define SIMD_NAME "AVX-512 BF16"
#define V_FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define V_SQRT(x) ((vf)_mm512_sqrt_ps((__m512)(x)))
#define V_MAX(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define V_MIN(a, b) ((vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define V_SUM(x) _mm512_reduce_add_ps((__m512)(x))
#define V_TOP(x) _mm512_reduce_max_ps((__m512)(x))
#define V_NARROW(x) ((vh)_mm512_cvtneps_pbh((__m512)(x))) // rounds as ours, but takes subnormal numbers for 0
#include "kernels/cpu/simd_body.h"
#endif
