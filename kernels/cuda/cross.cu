// SPDX-License-Identifier: MIT
// What in-context conditioning and cross-attention add: small beside their networks, one thread a number or a query.
#include "kernels/cuda/device.cuh"

template <typename X> __global__ static void set_token(X *x, const float *v, size_t n, int T, int C, int at) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) store_f32(x + (i / C * T + at) * C + i % C, v[i]);
}

int cuda_set_token(struct kern *k, void *x, enum kern_dtype t, const float *v, int R, int T, int C, int at) {
    size_t n = (size_t)R * (size_t)C;
    unsigned blocks = (unsigned)((n + 255) / 256);
    cudaStream_t s = cuda_of(k)->stream;
    if (n && t == KERN_F16) set_token<<<blocks, 256, 0, s>>>((__half *)x, v, n, T, C, at);
    else if (n) set_token<<<blocks, 256, 0, s>>>((float *)x, v, n, T, C, at);
    return cuda_launched(k, "set_token");
}

// A thread is one query of one head; keys are few
template <typename T>
__global__ void cross(T *o, const T *q, const float *kv, size_t n, int ld, int tokens, int S, int H, int D) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x, C = (size_t)H * D;
    if (i >= n) return;
    const size_t head = i % H * D, line = i / H, row = line / tokens;
    const T *mine = q + line * C + head;
    const float *keys = kv + row * S * ld + head;
    float p[KERN_CROSS_KEYS], top = -INFINITY, sum = 0;
    for (int j = 0; j < S; j++) {
        float s = 0;
        for (int d = 0; d < D; d++) s = fmaf(load_f32(mine + d), keys[(size_t)j * ld + d], s);
        p[j] = s / sqrtf((float)D);
        if (!(p[j] <= top)) top = p[j]; // NaN gets through
    }
    for (int j = 0; j < S; j++) sum += p[j] = expf(p[j] - top);
    for (int d = 0; d < D; d++) {
        float out = 0;
        for (int j = 0; j < S; j++) out = fmaf(p[j], keys[(size_t)j * ld + C + d], out);
        store_f32(o + line * C + head + d, out / sum);
    }
}

int cuda_cross_attention(struct kern *k, void *o, const void *q, const float *kv, int ld, int R, int T, int S, int H, int D) {
    size_t n = (size_t)R * (size_t)T * (size_t)H;
    unsigned blocks = (unsigned)((n + 255) / 256);
    cudaStream_t s = cuda_of(k)->stream;
    if (S < 1 || S > KERN_CROSS_KEYS)
        return cuda_fail(k, KERN_EUNSUPPORTED, "cross-attention to %d keys (1 to %d)", S, KERN_CROSS_KEYS);
    if (n == 0) return KERN_OK;
    if (k->act == KERN_F32) cross<float><<<blocks, 256, 0, s>>>((float *)o, (const float *)q, kv, n, ld, T, S, H, D);
    else if (k->act == KERN_F16) cross<__half><<<blocks, 256, 0, s>>>((__half *)o, (const __half *)q, kv, n, ld, T, S, H, D);
    else cross<__nv_bfloat16><<<blocks, 256, 0, s>>>((__nv_bfloat16 *)o, (const __nv_bfloat16 *)q, kv, n, ld, T, S, H, D);
    return cuda_launched(k, "cross_attention");
}
