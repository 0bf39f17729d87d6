// SPDX-License-Identifier: MIT
/*
 * plan: cuBLASLt products whose bits do not depend on the number of lines.
 *
 * cuBLASLt chooses an algorithm by shape, so the same line could be summed in another order in a larger batch. Here each product
 * (N, K, types, epilogue) gets its algorithms once, when its first layer is made:
 *   1. Only algorithms without split-K and without workspace are considered: then one block sums one output over K in order.
 *   2. The first choice of the heuristics at the largest size is the reference; what it computes from random factors are the
 * reference bits. (Not the fastest: timings differ from start to start, and a seed's picture must not.)
 *   3. For each size (unit, 2 unit, 4 unit, ... lines) every candidate is run on the first and on the last lines of those
 * factors. Only candidates whose output equals the reference bits everywhere are admitted; of them the fastest is kept. A product
 * of any number of lines takes the algorithm of the next size up. Layers of one shape share a plan. If there is no memory for
 * trying, the reference algorithm serves all sizes.
 *
 * cuBLASLt is column-major: our row-major w [N, K] is its A, transposed; x [M, K] its B; y [M, N] its D; bias runs along N.
 */
#include "kernels/cuda/linear.cuh"

#include <stdlib.h>

#define LEVELS 16
#define MOST_LINES 16384
#define CANDIDATES 24

struct plan {
    struct plan *next;
    struct plan_key key;
    int levels;
    struct {
        long lines;
        cublasLtMatmulAlgo_t algo;
    } level[LEVELS]; // ascending
};

void plans_free(struct cuda *c) {
    for (struct plan *p = c->plans, *next; p; p = next) {
        next = p->next;
        free(p);
    }
    c->plans = NULL;
}

static cudaDataType_t type_of(enum kern_dtype t) { return t == KERN_F32 ? CUDA_R_32F : CUDA_R_16BF; }

/* ---- one product described ---- */

struct product {
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t a, b, d;
};

static int describe(struct kern *k, struct product *p, const struct plan_key *key, const void *bias, long lines) {
    cublasOperation_t t = CUBLAS_OP_T;
    cublasLtEpilogue_t epilogue = key->gelu ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_BIAS;
    cudaDataType_t xt = type_of(key->xt), yt = type_of(key->yt);
    bool ok = cublasLtMatmulDescInit(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS;
    ok = ok && cublasLtMatmulDescSetAttribute(&p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t) == CUBLAS_STATUS_SUCCESS;
    ok = ok && cublasLtMatmulDescSetAttribute(&p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue) ==
                   CUBLAS_STATUS_SUCCESS;
    ok = ok &&
         cublasLtMatmulDescSetAttribute(&p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias) == CUBLAS_STATUS_SUCCESS;
    ok = ok && cublasLtMatrixLayoutInit(&p->a, xt, (uint64_t)key->K, (uint64_t)key->N, key->K) == CUBLAS_STATUS_SUCCESS;
    ok = ok && cublasLtMatrixLayoutInit(&p->b, xt, (uint64_t)key->K, (uint64_t)lines, key->K) == CUBLAS_STATUS_SUCCESS;
    ok = ok && cublasLtMatrixLayoutInit(&p->d, yt, (uint64_t)key->N, (uint64_t)lines, key->N) == CUBLAS_STATUS_SUCCESS;
    return ok ? KERN_OK : cuda_fail(k, KERN_EDEVICE, "cuBLASLt refuses a product of %ld x %d x %d", lines, key->N, key->K);
}

static cublasStatus_t multiply(struct kern *k, const struct product *p, void *y, const void *x, const void *w,
                               const cublasLtMatmulAlgo_t *algo) {
    const float one = 1, zero = 0;
    const struct cuda *c = cuda_of(k);
    return cublasLtMatmul(c->lt, (cublasLtMatmulDesc_t)&p->desc, &one, w, (cublasLtMatrixLayout_t)&p->a, x,
                          (cublasLtMatrixLayout_t)&p->b, &zero, y, (cublasLtMatrixLayout_t)&p->d, y,
                          (cublasLtMatrixLayout_t)&p->d, algo, NULL, 0, c->stream);
}

int plan_run(struct kern *k, const struct plan *plan, void *y, const void *x, const void *w, const void *bias, long lines) {
    struct product p;
    int i = 0, rc = describe(k, &p, &plan->key, bias, lines);
    if (rc < 0) return rc;
    while (i + 1 < plan->levels && plan->level[i].lines < lines) i++;
    cublasStatus_t s = multiply(k, &p, y, x, w, &plan->level[i].algo);
    if (s == CUBLAS_STATUS_SUCCESS) return KERN_OK;
    int e = cuda_check(k, cudaGetLastError(), "linear");
    return e < 0 ? e
                 : cuda_fail(k, KERN_EDEVICE, "linear: cuBLASLt status %d at %ld x %d x %d", (int)s, lines, plan->key.N,
                             plan->key.K);
}

/* ---- choosing ---- */

// Candidates without split-K and workspace, best guess first; their number
static int candidates(struct kern *k, cublasLtMatmulHeuristicResult_t *out, const struct plan_key *key, const void *bias,
                      long lines) {
    struct product p;
    cublasLtMatmulPreferenceOpaque_t pref;
    cublasLtMatmulHeuristicResult_t all[CANDIDATES];
    uint32_t none = CUBLASLT_REDUCTION_SCHEME_NONE;
    uint64_t bytes = 0;
    int n = 0, kept = 0;
    if (describe(k, &p, key, bias, lines) < 0 || cublasLtMatmulPreferenceInit(&pref) != CUBLAS_STATUS_SUCCESS) return 0;
    cublasLtMatmulPreferenceSetAttribute(&pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &none, sizeof none);
    cublasLtMatmulPreferenceSetAttribute(&pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    if (cublasLtMatmulAlgoGetHeuristic(cuda_of(k)->lt, &p.desc, &p.a, &p.b, &p.d, &p.d, &pref, CANDIDATES, all, &n) !=
        CUBLAS_STATUS_SUCCESS)
        return 0;
    for (int i = 0; i < n; i++) {
        int32_t splits = 0;
        size_t size;
        cublasLtMatmulAlgoConfigGetAttribute(&all[i].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &splits, sizeof splits, &size);
        if (all[i].state == CUBLAS_STATUS_SUCCESS && all[i].workspaceSize == 0 && splits <= 1) out[kept++] = all[i];
    }
    return kept;
}

__global__ static void fill_random(void *p, size_t n, bool f32) { // uniform in [-1, 1), a hash of the index
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    uint32_t h = (uint32_t)i * 2654435761u + (uint32_t)(i >> 32);
    h = (h ^ h >> 15) * 2246822519u;
    h = (h ^ h >> 13) * 3266489917u;
    float v = (float)(int32_t)(h ^ h >> 16) * 0x1p-31f;
    if (f32) ((float *)p)[i] = v;
    else ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(v);
}

__global__ static void count_differences(const uint32_t *a, const uint32_t *b, size_t words, unsigned *count) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < words && a[i] != b[i]) atomicAdd(count, 1);
}

struct trial { // buffers for trying; NULL x: no memory for it
    char *x, *y, *want, *bias;
    unsigned *count;
    cudaEvent_t start, end;
    size_t x_size, y_size; // of an element
    long lines;            // of x and want
};

static void trial_end(struct trial *t) {
    void *buffers[] = {t->x, t->y, t->want, t->bias, t->count};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (buffers[i]) cudaFree(buffers[i]);
    if (t->start) cudaEventDestroy(t->start);
    if (t->end) cudaEventDestroy(t->end);
    (void)cudaGetLastError();
}

static bool trial_begin(struct kern *k, struct trial *t, const struct plan_key *key, long lines) {
    *t = (struct trial){.x_size = kern_size(key->xt), .y_size = kern_size(key->yt), .lines = lines};
    size_t xs = (size_t)lines * key->K, ys = (size_t)lines * key->N * t->y_size;
    cudaStream_t s = cuda_of(k)->stream;
    bool ok = cudaMalloc((void **)&t->x, xs * t->x_size) == cudaSuccess && cudaMalloc((void **)&t->y, ys) == cudaSuccess &&
              cudaMalloc((void **)&t->want, ys) == cudaSuccess &&
              cudaMalloc((void **)&t->bias, (size_t)key->N * 4) == cudaSuccess &&
              cudaMalloc((void **)&t->count, 4) == cudaSuccess && cudaEventCreate(&t->start) == cudaSuccess &&
              cudaEventCreate(&t->end) == cudaSuccess;
    if (!ok) return false;
    fill_random<<<(unsigned)((xs + 255) / 256), 256, 0, s>>>(t->x, xs, key->xt == KERN_F32);
    fill_random<<<(unsigned)((key->N + 255) / 256), 256, 0, s>>>(t->bias, (size_t)key->N, key->yt == KERN_F32);
    return true;
}

// Does the algorithm give the reference bits on the first and the last `lines` lines?
static bool same_bits(struct kern *k, struct trial *t, const struct plan_key *key, const struct product *p, const void *w,
                      long lines, const cublasLtMatmulAlgo_t *algo) {
    cudaStream_t s = cuda_of(k)->stream;
    size_t bytes = (size_t)lines * key->N * t->y_size, words = bytes / 4;
    unsigned differ = 1;
    cudaMemsetAsync(t->count, 0, 4, s);
    for (int last = 0; last < 2; last++) {
        size_t from = last ? (size_t)(t->lines - lines) : 0;
        cudaMemsetAsync(t->y, 0xff, bytes, s);
        if (multiply(k, p, t->y, t->x + from * key->K * t->x_size, w, algo) != CUBLAS_STATUS_SUCCESS)
            return (void)cudaGetLastError(), false;
        const char *want = t->want + from * key->N * t->y_size;
        count_differences<<<(unsigned)((words + 255) / 256), 256, 0, s>>>((const uint32_t *)t->y, (const uint32_t *)want, words,
                                                                          t->count);
    }
    cudaMemcpyAsync(&differ, t->count, 4, cudaMemcpyDeviceToHost, s);
    return cudaStreamSynchronize(s) == cudaSuccess && differ == 0;
}

// Microseconds of one product, the best of a few runs in a row
static float time_one(struct kern *k, struct trial *t, const struct product *p, const void *w, long lines,
                      const cublasLtMatmulAlgo_t *algo) {
    cudaStream_t s = cuda_of(k)->stream;
    int runs = lines >= 8192 ? 4 : 12;
    float best = 1e30f;
    for (int round = 0; round < 3; round++) {
        float ms = 1e30f;
        cudaEventRecord(t->start, s);
        for (int i = 0; i < runs; i++) multiply(k, p, t->y, t->x, w, algo);
        cudaEventRecord(t->end, s);
        if (cudaEventSynchronize(t->end) != cudaSuccess || cudaEventElapsedTime(&ms, t->start, t->end) != cudaSuccess)
            return 1e30f;
        best = fminf(best, 1e3f * ms / (float)runs);
    }
    return best;
}

static void choose_level(struct kern *k, struct plan *plan, int i, struct trial *t, const void *w) {
    cublasLtMatmulHeuristicResult_t list[CANDIDATES];
    struct product p;
    long lines = plan->level[i].lines;
    int n = candidates(k, list, &plan->key, t->bias, lines);
    float best = 1e30f;
    if (describe(k, &p, &plan->key, t->bias, lines) < 0) return;
    for (int j = 0; j < n; j++) {
        if (!same_bits(k, t, &plan->key, &p, w, lines, &list[j].algo)) continue;
        float us = time_one(k, t, &p, w, lines, &list[j].algo);
        if (us < best) best = us, plan->level[i].algo = list[j].algo;
    }
}

static int choose(struct kern *k, struct plan *plan, const void *w) {
    cublasLtMatmulHeuristicResult_t list[CANDIDATES];
    struct trial t;
    struct product p;
    long most = plan->level[plan->levels - 1].lines;
    int n = candidates(k, list, &plan->key, w, most); // w stands for a bias: aligned alike
    if (n == 0)
        return cuda_fail(k, KERN_EUNSUPPORTED, "cuBLASLt has no algorithm for a product of %ld x %d x %d", most, plan->key.N,
                         plan->key.K);
    for (int i = 0; i < plan->levels; i++) plan->level[i].algo = list[0].algo;
    if (trial_begin(k, &t, &plan->key, most) && describe(k, &p, &plan->key, t.bias, most) == KERN_OK &&
        multiply(k, &p, t.want, t.x, w, &list[0].algo) == CUBLAS_STATUS_SUCCESS)
        for (int i = 0; i < plan->levels; i++) choose_level(k, plan, i, &t, w);
    int rc = cuda_check(k, cudaStreamSynchronize(cuda_of(k)->stream), "trying out products");
    trial_end(&t);
    return rc;
}

int plan_get(struct kern *k, struct plan **out, const struct plan_key *key, const void *w) {
    struct cuda *c = cuda_of(k);
    for (struct plan *p = c->plans; p; p = p->next)
        if (p->key.N == key->N && p->key.K == key->K && p->key.unit == key->unit && p->key.gelu == key->gelu &&
            p->key.xt == key->xt && p->key.yt == key->yt)
            return *out = p, KERN_OK;
    int rc = cuda_not_recorded(k, "a new layer");
    struct plan *p = rc == KERN_OK ? (struct plan *)calloc(1, sizeof *p) : NULL;
    if (!p) return rc < 0 ? rc : cuda_fail(k, KERN_ENOMEM, "out of memory");
    p->key = *key;
    long lines = key->unit;
    do p->level[p->levels++].lines = lines;
    while (p->levels < LEVELS && (lines *= 2) <= MOST_LINES);
    rc = choose(k, p, w);
    if (rc < 0) return free(p), rc;
    p->next = c->plans;
    c->plans = p;
    *out = p;
    return KERN_OK;
}
