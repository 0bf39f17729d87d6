// SPDX-License-Identifier: MIT
#if defined(__x86_64__)
#include <immintrin.h>

#define W 16
#define GM 12
#define TRAIN train_avx512
#define V_FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define V_SQRT(x) ((vf)_mm512_sqrt_ps((__m512)(x)))
#define V_MAX(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define V_MIN(a, b) ((vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define V_SUM(x) _mm512_reduce_add_ps((__m512)(x))
#include "kernels/cpu/train_body.h"
#endif
