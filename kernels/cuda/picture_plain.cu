// SPDX-License-Identifier: MIT
// Convolutions and products of any shape, type and card: float32 sums, one chain of fmaf an output in the order of the index.
#include "kernels/cuda/picture.cuh"

#define TILE 64
#define STEP 16
#define PAD 4

// A block makes 64 x 64 of c(m, n) = sum over k of a(m, k) b(n, k), a thread 4 x 4; done(m, n, sum) takes each
template <typename A, typename B, typename Done>
__device__ __forceinline__ void product(const A &a, const B &b, const Done &done, int M, int N, int K) {
    __shared__ __align__(16) float sa[STEP][TILE + PAD], sb[STEP][TILE + PAD];
    const int tid = threadIdx.x, tn = tid % 16 * 4, tm = tid / 16 * 4, blocks = (N + TILE - 1) / TILE, n0 = blockIdx.x % blocks * TILE,
              m0 = blockIdx.x / blocks * TILE;
    float acc[4][4] = {};
    for (int k0 = 0; k0 < K; k0 += STEP) {
        for (int i = tid; i < TILE * STEP; i += 256) {
            const int line = i / STEP, k = i % STEP;
            const bool inside = k0 + k < K;
            sa[k][line] = inside && m0 + line < M ? a(m0 + line, k0 + k) : 0;
            sb[k][line] = inside && n0 + line < N ? b(n0 + line, k0 + k) : 0;
        }
        __syncthreads();
        const int most = min(STEP, K - k0);
        for (int k = 0; k < most; k++) {
            const float4 x = *(const float4 *)&sa[k][tm], w = *(const float4 *)&sb[k][tn];
            const float xs[4] = {x.x, x.y, x.z, x.w}, ws[4] = {w.x, w.y, w.z, w.w};
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) acc[i][j] = fmaf(xs[i], ws[j], acc[i][j]);
        }
        __syncthreads();
    }
    for (int i = 0; i < 4 && m0 + tm + i < M; i++)
        for (int j = 0; j < 4 && n0 + tn + j < N; j++) done(m0 + tm + i, n0 + tn + j, acc[i][j]);
}

static bool grid_for(dim3 *grid, size_t M, size_t N, int n) {
    size_t blocks = (M + TILE - 1) / TILE * ((N + TILE - 1) / TILE);
    *grid = dim3((unsigned)blocks, (unsigned)n);
    return M <= 0x7fffffff && blocks <= 0x7fffffff && n <= 65535;
}

__device__ __forceinline__ float element(const void *p, enum kern_dtype t, size_t i) {
    return t == KERN_F32 ? ((const float *)p)[i] : load_f32((const bf16 *)p + i);
}
__device__ __forceinline__ void keep(void *p, enum kern_dtype t, size_t i, float v) {
    if (t == KERN_F32) ((float *)p)[i] = v;
    else store_f32((bf16 *)p + i, v);
}

__global__ static void __launch_bounds__(256) conv_kernel(const plain_conv a) {
    const kern_conv_spec &s = a.spec;
    const int taps = s.side * s.side, up = s.kind == KERN_CONV_UP, down = s.kind == KERN_CONV_DOWN, height = s.height << up,
              width = s.width << up;
    const size_t pixels = (size_t)s.height * s.width, picture = blockIdx.y;
    const float *coef = a.coef ? a.coef + picture * 2 * s.in : NULL;
    auto value = [&](int pixel, int k) { // input under one tap of an output pixel
        const int tap = k / s.in, c = k % s.in, oy = pixel / a.out_width, ox = pixel % a.out_width;
        const int y = down ? 2 * oy + tap / s.side : oy + tap / s.side - s.side / 2,
                  x = down ? 2 * ox + tap % s.side : ox + tap % s.side - s.side / 2;
        if (y < 0 || y >= height || x < 0 || x >= width) return 0.0f;
        float v = element(a.x, a.xt, ((picture * pixels + (size_t)(y >> up) * s.width) + (x >> up)) * s.in + c);
        if (coef) v = fmaf(v, coef[c], coef[s.in + c]);
        return s.act == KERN_SILU ? v / (1 + expf(-v)) : v;
    };
    auto weight = [&](int n, int k) { return a.w[(size_t)n * taps * s.in + k]; };
    auto done = [&](int pixel, int n, float sum) {
        const size_t at = (picture * a.out_height * a.out_width + pixel) * s.out + n;
        keep(a.y, a.yt, at, sum + a.bias[n] + (s.add ? element(a.y, a.yt, at) : 0));
    };
    product(value, weight, done, a.out_height * a.out_width, s.out, taps * s.in);
}

int plain_conv_run(struct kern *k, const struct plain_conv *a) {
    dim3 grid;
    if (!grid_for(&grid, (size_t)a->out_height * (size_t)a->out_width, (size_t)a->spec.out, a->pictures))
        return cuda_fail(k, KERN_EUNSUPPORTED, "%d pictures of %d x %d pixels at once", a->pictures, a->out_height, a->out_width);
    conv_kernel<<<grid, 256, 0, cuda_of(k)->stream>>>(*a);
    return cuda_launched(k, "convolution");
}

__global__ static void __launch_bounds__(256)
    product_kernel(void *y, size_t y_line, size_t y_next, enum kern_dtype yt, const plain_matrix a, const plain_matrix b, int M, int N, int K) {
    const size_t which = blockIdx.y;
    auto left = [&](int m, int k) { return element(a.p, a.t, which * a.next + m * a.line + k * a.k); };
    auto right = [&](int n, int k) { return element(b.p, b.t, which * b.next + n * b.line + k * b.k); };
    auto done = [&](int m, int n, float sum) { keep(y, yt, which * y_next + m * y_line + n, sum); };
    product(left, right, done, M, N, K);
}

int plain_product(struct kern *k, void *y, size_t y_line, size_t y_next, enum kern_dtype yt, const struct plain_matrix *a,
                  const struct plain_matrix *b, int n, int M, int N, int K) {
    dim3 grid;
    if (!grid_for(&grid, (size_t)M, (size_t)N, n)) return cuda_fail(k, KERN_EUNSUPPORTED, "%d products of %d x %d", n, M, N);
    product_kernel<<<grid, 256, 0, cuda_of(k)->stream>>>(y, y_line, y_next, yt, *a, *b, M, N, K);
    return cuda_launched(k, "product");
}
