// SPDX-License-Identifier: MIT
/*
 * comm: exchanges between the GPUs of one training run through NCCL, which is looked for when it is wanted: neither the build nor a
 * run on one GPU needs it. The prototypes below are NCCL 2's, whose ABI is stable.
 *
 * They run on a stream of their own, behind what was queued when they were asked for and beside what is queued later: a backward
 * pass goes on while its first gradients travel.
 */
#include "kernels/cuda/train.cuh"

#include <dlfcn.h>
#include <mutex>
#include <new>
#include <string.h>

struct nccl_id {
    char bytes[KERN_COMM_ID];
};
typedef struct ncclComm *nccl_comm;

struct comm { // cuda->comm
    void *library;
    nccl_comm comm;
    int rank;
    std::mutex lock; // an abort frees comm: not while another thread is in a call with it
    bool aborted;
    cudaStream_t stream;
    cudaEvent_t ready, done;
    int (*get_id)(struct nccl_id *);
    int (*init)(nccl_comm *, int size, struct nccl_id, int rank);
    int (*all_reduce)(const void *, void *, size_t, int type, int op, nccl_comm, cudaStream_t);
    int (*reduce_scatter)(const void *, void *, size_t, int type, int op, nccl_comm, cudaStream_t);
    int (*all_gather)(const void *, void *, size_t, int type, nccl_comm, cudaStream_t);
    int (*abort)(nccl_comm);
    int (*async_error)(nccl_comm, int *);
    const char *(*text)(int);
};
enum { NCCL_FLOAT32 = 7, NCCL_FLOAT64 = 8, NCCL_SUM = 0 };

static int failed(struct kern *k, const struct comm *c, int status, const char *what) {
    return status == 0 ? KERN_OK : cuda_fail(k, KERN_EDEVICE, "%s: NCCL says: %s", what, c->text(status));
}

static int open_library(struct kern *k, struct comm *c) {
    const struct {
        const char *name;
        void *to;
    } symbols[] = {{"ncclGetUniqueId", &c->get_id},
                   {"ncclCommInitRank", &c->init},
                   {"ncclAllReduce", &c->all_reduce},
                   {"ncclReduceScatter", &c->reduce_scatter},
                   {"ncclAllGather", &c->all_gather},
                   {"ncclCommAbort", &c->abort},
                   {"ncclCommGetAsyncError", &c->async_error},
                   {"ncclGetErrorString", &c->text}};
    c->library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!c->library)
        return cuda_fail(k, KERN_EUNSUPPORTED,
                         "several GPUs need NCCL (libnccl.so.2, on LD_LIBRARY_PATH if it lies elsewhere): %.120s", dlerror());
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        *(void **)symbols[i].to = dlsym(c->library, symbols[i].name);
        if (!*(void **)symbols[i].to) return cuda_fail(k, KERN_EUNSUPPORTED, "libnccl.so.2 has no %s", symbols[i].name);
    }
    return KERN_OK;
}

static int comm_get(struct kern *k, struct comm **out) {
    struct cuda *g = cuda_of(k);
    int rc = KERN_OK;
    if (!g->comm) {
        g->comm = new (std::nothrow) struct comm();
        if (!g->comm) return cuda_fail(k, KERN_ENOMEM, "out of memory");
        rc = open_library(k, g->comm);
    }
    if (rc < 0) comm_free(g);
    *out = g->comm;
    return rc;
}

void comm_free(struct cuda *g) {
    struct comm *c = g->comm;
    g->comm = NULL;
    if (!c) return;
    if (c->comm && !c->aborted) c->abort(c->comm); // also where all went well: a clean end would wait for ranks that may be gone
    if (c->ready) cudaEventDestroy(c->ready);
    if (c->done) cudaEventDestroy(c->done);
    if (c->stream) cudaStreamDestroy(c->stream);
    if (c->library) dlclose(c->library);
    delete c;
}

int cuda_comm_id(struct kern *k, char id[KERN_COMM_ID]) {
    struct comm *c = NULL;
    struct nccl_id n;
    int rc = comm_get(k, &c);
    if (rc == KERN_OK) rc = failed(k, c, c->get_id(&n), "beginning a run on several GPUs");
    if (rc == KERN_OK) memcpy(id, n.bytes, KERN_COMM_ID);
    return rc;
}

int cuda_comm_join(struct kern *k, const char id[KERN_COMM_ID], int rank, int size) {
    struct comm *c = NULL;
    struct nccl_id n;
    int low = 0, high = 0, rc = comm_get(k, &c);
    memcpy(n.bytes, id, KERN_COMM_ID);
    if (rc == KERN_OK) c->rank = rank;
    if (rc == KERN_OK) rc = failed(k, c, c->init(&c->comm, size, n, rank), "joining a run on several GPUs");
    if (rc == KERN_OK) rc = cuda_check(k, cudaDeviceGetStreamPriorityRange(&low, &high), "stream priorities");
    if (rc == KERN_OK) rc = cuda_check(k, cudaStreamCreateWithPriority(&c->stream, cudaStreamNonBlocking, high), "a stream");
    if (rc == KERN_OK) rc = cuda_check(k, cudaEventCreateWithFlags(&c->ready, cudaEventDisableTiming), "an event");
    if (rc == KERN_OK) rc = cuda_check(k, cudaEventCreateWithFlags(&c->done, cudaEventDisableTiming), "an event");
    return rc;
}

void cuda_comm_abort(struct kern *k) {
    struct comm *c = cuda_of(k)->comm;
    if (!c) return;
    std::lock_guard<std::mutex> hold(c->lock);
    if (c->comm && !c->aborted) c->aborted = true, c->abort(c->comm);
}

static int usable(struct kern *k, const struct comm *c) {
    if (!c || !c->comm) return cuda_fail(k, KERN_EUNSUPPORTED, "an exchange between GPUs before comm_join");
    return c->aborted ? cuda_fail(k, KERN_EDEVICE, "exchanges between GPUs were given up") : KERN_OK;
}

// Queues one, behind the work so far. call: what NCCL is asked for, its status
template <class call_t> static int exchange(struct kern *k, const char *what, call_t call) {
    struct comm *c = cuda_of(k)->comm;
    if (!c) return usable(k, c);
    std::lock_guard<std::mutex> hold(c->lock);
    int rc = usable(k, c);
    if (rc == KERN_OK) rc = cuda_check(k, cudaEventRecord(c->ready, cuda_of(k)->stream), what);
    if (rc == KERN_OK) rc = cuda_check(k, cudaStreamWaitEvent(c->stream, c->ready, 0), what);
    return rc < 0 ? rc : failed(k, c, call(c), what);
}

int cuda_comm_sum(struct kern *k, float *p, size_t n) {
    return exchange(k, "a sum over GPUs",
                    [=](struct comm *c) { return c->all_reduce(p, p, n, NCCL_FLOAT32, NCCL_SUM, c->comm, c->stream); });
}
int cuda_comm_sum_double(struct kern *k, double *p, size_t n) {
    return exchange(k, "a sum over GPUs",
                    [=](struct comm *c) { return c->all_reduce(p, p, n, NCCL_FLOAT64, NCCL_SUM, c->comm, c->stream); });
}
int cuda_comm_scatter(struct kern *k, float *p, size_t n) {
    return exchange(k, "sums over GPUs in parts", [=](struct comm *c) {
        return c->reduce_scatter(p, p + (size_t)c->rank * n, n, NCCL_FLOAT32, NCCL_SUM, c->comm, c->stream);
    });
}
int cuda_comm_gather(struct kern *k, float *p, size_t n) {
    return exchange(k, "gathering from GPUs", [=](struct comm *c) {
        return c->all_gather(p + (size_t)c->rank * n, p, n, NCCL_FLOAT32, c->comm, c->stream);
    });
}

int cuda_comm_wait(struct kern *k) {
    struct comm *c = cuda_of(k)->comm;
    int status = 0;
    if (!c) return usable(k, c);
    std::lock_guard<std::mutex> hold(c->lock);
    int rc = usable(k, c);
    if (rc == KERN_OK) rc = failed(k, c, c->async_error(c->comm, &status), "an exchange between GPUs");
    if (rc == KERN_OK) rc = failed(k, c, status, "an exchange between GPUs");
    if (rc == KERN_OK) rc = cuda_check(k, cudaEventRecord(c->done, c->stream), "an exchange between GPUs");
    return rc < 0 ? rc : cuda_check(k, cudaStreamWaitEvent(cuda_of(k)->stream, c->done, 0), "an exchange between GPUs");
}
