// SPDX-License-Identifier: MIT
#if defined(__x86_64__)
#include <immintrin.h>

static inline float sum8(__m256 v) { // halves added to halves
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

#define W 8
#define GM 6
#define TRAIN train_avx2
#define V_FMA(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define V_SQRT(x) ((vf)_mm256_sqrt_ps((__m256)(x)))
#define V_MAX(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define V_MIN(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define V_SUM(x) sum8((__m256)(x))
#include "kernels/cpu/train_body.h"
#endif
