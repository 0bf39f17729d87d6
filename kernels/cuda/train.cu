// SPDX-License-Identifier: MIT
// Training on the GPU: scratch memory, the small backward ops, and which op is whose.
#include "kernels/cuda/train.cuh"

/* ---- scratch ---- */

int cuda_scratch(struct kern *k, size_t bytes, void **out) {
    struct cuda *c = cuda_of(k);
    if (bytes > c->scratch_size) {
        size_t size = bytes > 2 * c->scratch_size
                          ? bytes
                          : 2 * c->scratch_size; // so that there are few, and together less than twice the last
        int rc = cuda_not_recorded(k, "an op of a new size");
        if (rc == KERN_OK) rc = cuda_check(k, cudaMalloc(&c->scratch[c->scratches], size), "scratch memory");
        if (rc < 0) return rc;
        c->scratches++, c->scratch_size = size;
    }
    *out = c->scratch[c->scratches - 1];
    return KERN_OK;
}

void cuda_scratch_free(struct cuda *c) {
    while (c->scratches) cudaFree(c->scratch[--c->scratches]);
}

/* ---- cross-attention: a block is one head of one row ---- */

#define QUERIES 128 // at a time

// Query at q and d_o; keys at kv. p: weights, ds: gradients of the scaled scores
template <typename T>
__device__ static void cross_weights(float *p, float *ds, const T *q, const T *d_o, const float *kv, int ld, int C, int S,
                                     int D) {
    float top = -INFINITY, sum = 0, mean = 0;
    for (int j = 0; j < S; j++) {
        float s = 0, g = 0;
        for (int d = 0; d < D; d++) {
            s = fmaf(load_f32(q + d), kv[(size_t)j * ld + d], s);
            g = fmaf(load_f32(d_o + d), kv[(size_t)j * ld + C + d], g);
        }
        p[j] = s / sqrtf((float)D), ds[j] = g;
        if (!(p[j] <= top)) top = p[j]; // NaN gets through
    }
    for (int j = 0; j < S; j++) sum += p[j] = expf(p[j] - top);
    for (int j = 0; j < S; j++) p[j] /= sum, mean = fmaf(p[j], ds[j], mean);
    for (int j = 0; j < S; j++) ds[j] = p[j] * (ds[j] - mean);
}

template <typename T>
__global__ void __launch_bounds__(QUERIES)
    cross_back(T *dq, float *dkv, const T *d_o, const T *q, const float *kv, int ld, int tokens, int S, int H, int D) {
    extern __shared__ float shared[];
    float *p = shared, *ds = p + QUERIES * KERN_CROSS_KEYS, *dk = ds + QUERIES * KERN_CROSS_KEYS, *dv = dk + S * D;
    const int C = H * D;
    const size_t row = blockIdx.y, head = (size_t)blockIdx.x * D;
    const float *keys = kv + row * S * ld + head, root = sqrtf((float)D);
    for (int i = threadIdx.x; i < 2 * S * D; i += QUERIES) dk[i] = 0;
    for (int t0 = 0; t0 < tokens; t0 += QUERIES) {
        const int t = t0 + threadIdx.x, count = min(QUERIES, tokens - t0);
        const size_t first = (row * tokens + t0) * C + head, at = first + (size_t)threadIdx.x * C;
        float *my_p = p + threadIdx.x * KERN_CROSS_KEYS, *my_ds = ds + threadIdx.x * KERN_CROSS_KEYS;
        __syncthreads();
        if (t < tokens) {
            cross_weights(my_p, my_ds, q + at, d_o + at, keys, ld, C, S, D);
            for (int d = 0; d < D; d++) {
                float sum = 0;
                for (int j = 0; j < S; j++) sum = fmaf(my_ds[j], keys[(size_t)j * ld + d], sum);
                store_f32(dq + at + d, sum / root);
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < S * D; i += QUERIES) {
            float a = dk[i], b = dv[i];
            for (int u = 0; u < count; u++) {
                a = fmaf(ds[u * KERN_CROSS_KEYS + i / D], load_f32(q + first + (size_t)u * C + i % D), a);
                b = fmaf(p[u * KERN_CROSS_KEYS + i / D], load_f32(d_o + first + (size_t)u * C + i % D), b);
            }
            dk[i] = a, dv[i] = b;
        }
    }
    float *out = dkv + row * S * ld + head;
    for (int i = threadIdx.x; i < S * D; i += QUERIES) { // each thread its own sums
        out[(size_t)(i / D) * ld + i % D] = dk[i] / root;
        out[(size_t)(i / D) * ld + C + i % D] = dv[i];
    }
}

template <typename T>
static int run_cross(struct kern *k, void *dq, float *dkv, const void *d_o, const void *q, const float *kv, int ld, int R,
                     int tokens, int S, int H, int D) {
    size_t bytes = (2 * QUERIES * KERN_CROSS_KEYS + 2 * (size_t)S * (size_t)D) * 4;
    cross_back<<<dim3((unsigned)H, (unsigned)R), QUERIES, bytes, cuda_of(k)->stream>>>((T *)dq, dkv, (const T *)d_o, (const T *)q,
                                                                                       kv, ld, tokens, S, H, D);
    return cuda_launched(k, "cross_attention_backward");
}

int cuda_cross_attention_backward(struct kern *k, void *dq, float *dkv, const void *d_o, const void *q, const float *kv, int ld,
                                  int R, int T, int S, int H, int D) {
    int rc = cuda_of(k)->host->check_attention(k, T, H, D);
    if (rc == KERN_OK && (S < 1 || S > KERN_CROSS_KEYS))
        rc = cuda_fail(k, KERN_EUNSUPPORTED, "cross-attention to %d keys (1 to %d)", S, KERN_CROSS_KEYS);
    if (rc < 0 || R == 0) return rc;
    if (R > 65535) return cuda_fail(k, KERN_EUNSUPPORTED, "%d rows at once", R);
    return k->act == KERN_F32 ? run_cross<float>(k, dq, dkv, d_o, q, kv, ld, R, T, S, H, D)
                              : run_cross<__nv_bfloat16>(k, dq, dkv, d_o, q, kv, ld, R, T, S, H, D);
}

/* ---- tokens, labels, images: one thread a number ---- */

static unsigned blocks_for(size_t n) { return (unsigned)((n + 255) / 256); }

__global__ static void take_token(float *v, const float *dx, size_t n, int T, int C, int at) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) v[i] = dx[(i / C * T + at) * C + i % C];
}

int cuda_take_token(struct kern *k, float *v, const float *dx, int R, int T, int C, int at) {
    size_t n = (size_t)R * (size_t)C;
    if (n) take_token<<<blocks_for(n), 256, 0, cuda_of(k)->stream>>>(v, dx, n, T, C, at);
    return cuda_launched(k, "take_token");
}

// A block takes all rows of one label, in order, where its row is the label's first
__global__ static void condition_back(float *dtable, const float *dc, const int32_t *y, int R, int C) {
    const int32_t label = y[blockIdx.x];
    if (label < 0) return;
    for (int r = 0; r < (int)blockIdx.x; r++)
        if (y[r] == label) return;
    for (int i = threadIdx.x; i < C; i += 256) {
        float sum = dtable[(size_t)label * C + i];
        for (int r = blockIdx.x; r < R; r++)
            if (y[r] == label) sum += dc[(size_t)r * C + i];
        dtable[(size_t)label * C + i] = sum;
    }
}

int cuda_condition_backward(struct kern *k, float *dtable, const float *dc, const int32_t *y, int R, int C) {
    if (R) condition_back<<<(unsigned)R, 256, 0, cuda_of(k)->stream>>>(dtable, dc, y, R, C);
    return cuda_launched(k, "condition_backward");
}

__global__ static void unpatchify_back(float *dtok, const float *dimg, size_t n, int Cout, int keep, int I, int P) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    const int g = I / P, c = (int)(i % Cout), e = (int)(i / Cout % (P * P)), t = (int)(i / ((size_t)Cout * P * P) % (g * g));
    const size_t row = i / ((size_t)Cout * P * P * g * g);
    dtok[i] = c < keep ? dimg[((row * keep + c) * I + t / g * P + e / P) * I + t % g * P + e % P] : 0;
}

int cuda_unpatchify_backward(struct kern *k, float *dtok, const float *dimg, int R, int Cout, int keep, int I, int P) {
    size_t n = (size_t)R * (size_t)(I / P * P) * (size_t)(I / P * P) * (size_t)Cout;
    if (n) unpatchify_back<<<blocks_for(n), 256, 0, cuda_of(k)->stream>>>(dtok, dimg, n, Cout, keep, I, P);
    return cuda_launched(k, "unpatchify_backward");
}

static int cuda_zero(struct kern *k, void *dst, size_t bytes) {
    return bytes ? cuda_check(k, cudaMemsetAsync(dst, 0, bytes, cuda_of(k)->stream), "zero") : KERN_OK;
}

void cuda_train_fill(struct kern *k) {
    k->zero = cuda_zero;
    k->linear_wrap = cuda_linear_wrap;
    k->linear_refresh = cuda_linear_refresh;
    k->linear_backward = cuda_linear_backward;
    k->linear_gradients = cuda_linear_gradients;
    k->gate_norm_backward = cuda_gate_norm_backward;
    k->attention_backward = cuda_attention_backward;
    k->cross_attention_backward = cuda_cross_attention_backward;
    k->take_token = cuda_take_token;
    k->condition_backward = cuda_condition_backward;
    k->unpatchify_backward = cuda_unpatchify_backward;
    k->mix = cuda_mix;
    k->loss = cuda_loss;
    k->sum_squares = cuda_sum_squares;
    k->adamw = cuda_adamw;
    k->comm_id = cuda_comm_id;
    k->comm_join = cuda_comm_join;
    k->comm_sum = cuda_comm_sum;
    k->comm_sum_double = cuda_comm_sum_double;
    k->comm_scatter = cuda_comm_scatter;
    k->comm_gather = cuda_comm_gather;
    k->comm_wait = cuda_comm_wait;
    k->comm_abort = cuda_comm_abort;
}
