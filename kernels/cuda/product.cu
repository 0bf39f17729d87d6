// SPDX-License-Identifier: MIT
/*
 * product: the matrix products of training through cuBLASLt: forward with the value before GELU kept, dx, and dw with float32
 * sums that may be added to what is there.
 *
 * Unlike the forward plans (plan.cu) a product may split its sum (dw of XL has 243 tiles for 132 multiprocessors and 16,384
 * terms), and a batch has one size, so nothing binds its bits to those of other sizes. At first use of a shape the first
 * candidates of the heuristics are timed on the operands at hand, into memory of its own, and the fastest is kept; no candidate
 * uses atomics, so a run's sums have one order.
 *
 * cuBLASLt is column-major: our row-major [rows, columns] is its columns x rows.
 */
#include "kernels/cuda/train.cuh"

#include <stdlib.h>

#define WORKSPACE ((size_t)32 << 20)
#define CANDIDATES 24

struct product { // of the list cuda->products
    struct product *next;
    struct product_key key;
    cublasLtMatmulAlgo_t algo;
    bool none; // cuBLASLt has no algorithm
};

void products_free(struct cuda *c) {
    for (struct product *p = c->products, *next; p; p = next) next = p->next, free(p);
    c->products = NULL;
    if (c->lt_work) cudaFree(c->lt_work);
    c->lt_work = NULL;
}

struct call {
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t a, b, d;
    const void *first, *second; // cuBLASLt's A and B
    float beta;
};

template <typename V> static bool set(struct call *c, cublasLtMatmulDescAttributes_t what, const V &value) {
    return cublasLtMatmulDescSetAttribute(&c->desc, what, &value, sizeof value) == CUBLAS_STATUS_SUCCESS;
}

static cudaDataType_t type_of(enum kern_dtype t) { return t == KERN_F32 ? CUDA_R_32F : CUDA_R_16BF; }

static cublasLtEpilogue_t epilogue_of(enum product_kind kind) {
    return kind == PRODUCT_FORWARD        ? CUBLASLT_EPILOGUE_BIAS
           : kind == PRODUCT_FORWARD_GELU ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS
           : kind == PRODUCT_DX_GELU      ? CUBLASLT_EPILOGUE_DGELU
                                          : CUBLASLT_EPILOGUE_DEFAULT;
}

static bool describe(struct call *c, const struct product_key *p, const void *a, const void *b, void *bias, void *pre, bool add) {
    const bool forward = p->kind == PRODUCT_FORWARD || p->kind == PRODUCT_FORWARD_GELU,
               dx = p->kind == PRODUCT_DX || p->kind == PRODUCT_DX_GELU;
    const uint64_t N = (uint64_t)p->N, K = (uint64_t)p->K, M = (uint64_t)p->M;
    const cublasOperation_t ta = forward ? CUBLAS_OP_T : CUBLAS_OP_N, tb = forward || dx ? CUBLAS_OP_N : CUBLAS_OP_T;
    const cudaDataType_t t = type_of(p->t), yt = type_of(p->yt);
    const int64_t aux_ld = forward ? p->N : p->K;
    // column-major: forward y^T[N,M] = w[N,K] x^T; dx^T[K,M] = w^T[K,N] dy^T[N,M]; dw^T[K,N] = x^T[K,M] dy[M,N]
    c->first = b, c->second = a;
    c->beta = add;
    bool ok = cublasLtMatmulDescInit(&c->desc, p->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F) ==
              CUBLAS_STATUS_SUCCESS;
    ok = ok && set(c, CUBLASLT_MATMUL_DESC_TRANSA, ta) && set(c, CUBLASLT_MATMUL_DESC_TRANSB, tb) &&
         set(c, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(p->kind));
    if (forward) ok = ok && set(c, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    if (p->kind == PRODUCT_FORWARD_GELU || p->kind == PRODUCT_DX_GELU)
        ok = ok && set(c, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, pre) && set(c, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, aux_ld);
    ok = ok && (dx || forward ? cublasLtMatrixLayoutInit(&c->a, t, K, N, (int64_t)K)
                              : cublasLtMatrixLayoutInit(&c->a, t, K, M, (int64_t)K)) == CUBLAS_STATUS_SUCCESS;
    ok = ok && (forward ? cublasLtMatrixLayoutInit(&c->b, t, K, M, (int64_t)K)
                        : cublasLtMatrixLayoutInit(&c->b, t, N, M, dx ? (int64_t)N : p->ld)) == CUBLAS_STATUS_SUCCESS;
    const uint64_t m = forward ? N : K, n = forward || dx ? M : N;
    return ok && cublasLtMatrixLayoutInit(&c->d, yt, m, n, (int64_t)m) == CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t multiply(struct kern *k, const struct call *c, void *y, const cublasLtMatmulAlgo_t *algo) {
    const float one = 1;
    const struct cuda *g = cuda_of(k);
    return cublasLtMatmul(g->lt, (cublasLtMatmulDesc_t)&c->desc, &one, c->first, (cublasLtMatrixLayout_t)&c->a, c->second,
                          (cublasLtMatrixLayout_t)&c->b, &c->beta, y, (cublasLtMatrixLayout_t)&c->d, y,
                          (cublasLtMatrixLayout_t)&c->d, algo, g->lt_work, WORKSPACE, g->stream);
}

static int candidates(struct kern *k, const struct call *c, cublasLtMatmulHeuristicResult_t *list) {
    cublasLtMatmulPreferenceOpaque_t pref;
    int n = 0, kept = 0;
    if (cublasLtMatmulPreferenceInit(&pref) != CUBLAS_STATUS_SUCCESS) return 0;
    const uint64_t bytes = WORKSPACE;
    cublasLtMatmulPreferenceSetAttribute(&pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    const uint32_t align = 16; // parts of gradients begin anywhere on 16 bytes
    const cublasLtMatmulPreferenceAttributes_t all[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (cublasLtMatmulPreferenceAttributes_t a : all) cublasLtMatmulPreferenceSetAttribute(&pref, a, &align, sizeof align);
    if (cublasLtMatmulAlgoGetHeuristic(cuda_of(k)->lt, (cublasLtMatmulDesc_t)&c->desc, (cublasLtMatrixLayout_t)&c->a,
                                       (cublasLtMatrixLayout_t)&c->b, (cublasLtMatrixLayout_t)&c->d,
                                       (cublasLtMatrixLayout_t)&c->d, &pref, CANDIDATES, list, &n) != CUBLAS_STATUS_SUCCESS)
        return 0;
    for (int i = 0; i < n; i++)
        if (list[i].state == CUBLAS_STATUS_SUCCESS) list[kept++] = list[i];
    return kept;
}

// Milliseconds, the best of three
static float time_one(struct kern *k, const struct call *c, void *y, const cublasLtMatmulAlgo_t *algo, cudaEvent_t from,
                      cudaEvent_t to) {
    float best = 1e30f;
    for (int i = 0; i < 3; i++) {
        float ms = 1e30f;
        cudaEventRecord(from, cuda_of(k)->stream);
        if (multiply(k, c, y, algo) != CUBLAS_STATUS_SUCCESS) return (void)cudaGetLastError(), 1e30f;
        cudaEventRecord(to, cuda_of(k)->stream);
        if (cudaEventSynchronize(to) != cudaSuccess || cudaEventElapsedTime(&ms, from, to) != cudaSuccess) return 1e30f;
        best = fminf(best, ms);
    }
    return best;
}

static void choose(struct kern *k, struct product *p, const struct call *c) {
    cublasLtMatmulHeuristicResult_t list[CANDIDATES];
    const struct product_key *key = &p->key;
    const int n = candidates(k, c, list);
    const size_t rows = key->kind == PRODUCT_DW ? (size_t)key->N : (size_t)key->M,
                 columns = key->kind == PRODUCT_FORWARD || key->kind == PRODUCT_FORWARD_GELU ? (size_t)key->N : (size_t)key->K;
    cudaEvent_t from = NULL, to = NULL;
    void *y = NULL;
    float best = 1e30f;
    p->none = n == 0;
    if (n > 0) p->algo = list[0].algo;
    if (n > 1 && cudaMalloc(&y, rows * columns * kern_size(key->yt)) == cudaSuccess && cudaEventCreate(&from) == cudaSuccess &&
        cudaEventCreate(&to) == cudaSuccess) {
        cudaMemsetAsync(y, 0, rows * columns * kern_size(key->yt), cuda_of(k)->stream);
        for (int i = 0; i < n; i++) {
            float ms = time_one(k, c, y, &list[i].algo, from, to);
            if (ms < best) best = ms, p->algo = list[i].algo;
        }
    }
    if (y) cudaFree(y);
    if (from) cudaEventDestroy(from);
    if (to) cudaEventDestroy(to);
    (void)cudaGetLastError();
}

static bool same(const struct product_key *a, const struct product_key *b) {
    return a->kind == b->kind && a->N == b->N && a->K == b->K && a->M == b->M && a->t == b->t && a->yt == b->yt &&
           a->tf32 == b->tf32 && a->ld == b->ld;
}

static int find(struct kern *k, struct product **out, const struct product_key *key, const struct call *c) {
    struct cuda *g = cuda_of(k);
    for (*out = g->products; *out; *out = (*out)->next)
        if (same(&(*out)->key, key)) return KERN_OK;
    int rc = cuda_not_recorded(k, "a product of a new size");
    if (rc == KERN_OK && !g->lt_work) rc = cuda_check(k, cudaMalloc(&g->lt_work, WORKSPACE), "workspace of products");
    if (rc < 0) return rc;
    struct product *p = (struct product *)calloc(1, sizeof *p);
    if (!p) return cuda_fail(k, KERN_ENOMEM, "out of memory");
    p->key = *key;
    choose(k, p, c);
    p->next = g->products;
    g->products = *out = p;
    return cuda_check(k, cudaStreamSynchronize(g->stream), "trying out products");
}

int product_run(struct kern *k, const struct product_key *key, void *y, const void *a, const void *b, void *bias, void *pre,
                bool add) {
    struct call c;
    struct product *p;
    if (!describe(&c, key, a, b, bias, pre, add))
        return cuda_fail(k, KERN_EUNSUPPORTED, "cuBLASLt refuses a product of %ld x %d x %d", key->M, key->N, key->K);
    int rc = find(k, &p, key, &c);
    if (rc < 0) return rc;
    if (p->none)
        return cuda_fail(k, KERN_EUNSUPPORTED, "cuBLASLt has no algorithm for a product of %ld x %d x %d", key->M, key->N,
                         key->K);
    cublasStatus_t s = multiply(k, &c, y, &p->algo);
    if (s == CUBLAS_STATUS_SUCCESS) return KERN_OK;
    rc = cuda_check(k, cudaGetLastError(), "a product");
    return rc < 0
               ? rc
               : cuda_fail(k, KERN_EDEVICE, "cuBLASLt status %d at a product of %ld x %d x %d", (int)s, key->M, key->N, key->K);
}
