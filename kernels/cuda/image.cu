// SPDX-License-Identifier: MIT
// Images, tokens and conditioning: small or memory-bound, one thread an element.
#include "kernels/cuda/device.cuh"

static unsigned blocks_for(size_t n) { return (unsigned)((n + 255) / 256); }

__global__ static void patchify(float *tok, const float *img, size_t n, int Cin, int I, int P) {
    size_t at = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= n) return;
    int g = I / P, j = (int)(at % P), i = (int)(at / P % P), c = (int)(at / (P * P) % Cin),
        t = (int)(at / (P * P * Cin) % (g * g));
    size_t r = at / ((size_t)P * P * Cin * g * g);
    tok[at] = img[((r * Cin + c) * I + t / g * P + i) * I + t % g * P + j];
}

int cuda_patchify(struct kern *k, float *tok, const float *img, int R, int Cin, int I, int P) {
    size_t n = (size_t)R * (size_t)(I / P * P) * (size_t)(I / P * P) * (size_t)Cin;
    if (n) patchify<<<blocks_for(n), 256, 0, cuda_of(k)->stream>>>(tok, img, n, Cin, I, P);
    return cuda_launched(k, "patchify");
}

__global__ static void unpatchify(float *img, const float *tok, size_t n, int Cout, int keep, int I, int P) {
    size_t at = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= n) return;
    int g = I / P, x = (int)(at % I), y = (int)(at / I % I), c = (int)(at / ((size_t)I * I) % keep);
    size_t r = at / ((size_t)I * I * keep), t = r * (size_t)(g * g) + (size_t)(y / P * g + x / P);
    img[at] = tok[(t * (size_t)(P * P) + (size_t)(y % P * P + x % P)) * (size_t)Cout + (size_t)c];
}

int cuda_unpatchify(struct kern *k, float *img, const float *tok, int R, int Cout, int keep, int I, int P) {
    size_t n = (size_t)R * (size_t)keep * (size_t)I * (size_t)I;
    if (n) unpatchify<<<blocks_for(n), 256, 0, cuda_of(k)->stream>>>(img, tok, n, Cout, keep, I, P);
    return cuda_launched(k, "unpatchify");
}

template <typename X> __global__ static void add_table(X *x, const float *table, size_t n, size_t period) {
    size_t at = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (at < n) store_f32(x + at, load_f32(x + at) + table[at % period]);
}

struct alignas(8) half4 {
    __half2 a, b;
};
__device__ static void add4(float4 &x, float4 b) { x = make_float4(x.x + b.x, x.y + b.y, x.z + b.z, x.w + b.w); }
__device__ static void add4(half4 &x, float4 b) {
    float2 l = __half22float2(x.a), h = __half22float2(x.b);
    x.a = __floats2half2_rn(l.x + b.x, l.y + b.y);
    x.b = __floats2half2_rn(h.x + b.z, h.y + b.w);
}

template <typename X> __global__ static void add_table4(X *x, const float4 *table, size_t n, size_t period) {
    size_t at = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (at < n) add4(x[at], table[at % period]);
}

int cuda_add_table(struct kern *k, void *x, const float *table, int R, int T, int C) {
    size_t period = (size_t)T * (size_t)C, n = (size_t)R * period;
    cudaStream_t s = cuda_of(k)->stream;
    if (n == 0) return KERN_OK;
    bool four = period % 4 == 0 && ((size_t)x | (size_t)table) % 16 == 0, half = k->stream == KERN_F16;
    if (four && half) add_table4<<<blocks_for(n / 4), 256, 0, s>>>((half4 *)x, (const float4 *)table, n / 4, period / 4);
    else if (four) add_table4<<<blocks_for(n / 4), 256, 0, s>>>((float4 *)x, (const float4 *)table, n / 4, period / 4);
    else if (half) add_table<<<blocks_for(n), 256, 0, s>>>((__half *)x, table, n, period);
    else add_table<<<blocks_for(n), 256, 0, s>>>((float *)x, table, n, period);
    return cuda_launched(k, "add_table");
}

// Frequencies and angles in float32 as the authors have them; exp, cos and sin in double: R*F numbers are nothing to a GPU
__global__ static void timestep_embed(float *out, const float *t, int n, int half) {
    int at = (int)(blockIdx.x * 256 + threadIdx.x), r = at / half, i = at % half;
    if (at >= n) return;
    float power = -9.210340371976184f * (float)i / (float)half;
    float angle = t[r] * (float)exp((double)power);
    out[(size_t)r * 2 * half + i] = (float)cos((double)angle);
    out[(size_t)r * 2 * half + half + i] = (float)sin((double)angle);
}

int cuda_timestep_embed(struct kern *k, float *out, const float *t, int R, int F) {
    int half = F / 2, n = R * half;
    if (n) timestep_embed<<<blocks_for((size_t)n), 256, 0, cuda_of(k)->stream>>>(out, t, n, half);
    return cuda_launched(k, "timestep_embed");
}

__global__ static void condition(float *silu_c, const float *temb, const float *table, const int32_t *y, size_t n, int C,
                                 float *save_c) {
    size_t at = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= n) return;
    int label = y[at / C];
    float c = temb[at];
    if (label >= 0) c += table[(size_t)label * C + at % C];
    if (save_c) save_c[at] = c;
    silu_c[at] = (float)((double)c / (1 + exp(-(double)c)));
}

int cuda_condition(struct kern *k, float *silu_c, const float *temb, const float *table, const int32_t *y, int R, int C,
                   float *save_c) {
    size_t n = (size_t)R * (size_t)C;
    if (n) condition<<<blocks_for(n), 256, 0, cuda_of(k)->stream>>>(silu_c, temb, table, y, n, C, save_c);
    return cuda_launched(k, "condition");
}
