// SPDX-License-Identifier: MIT
/*
 * parallel: one training run in several processes, a GPU each (data parallel, its optimiser in shares: ZeRO stage 1 of Rajbhandari
 * et al. 2020): who is who, how they find each other, sums of gradients behind the backward pass, and what happens when one dies.
 *
 * The flat arrays are cut into pieces, and each piece into a share for every rank. A rank gets its share of the summed gradients,
 * steps it, and gives the new weights to all while the next piece is stepped. Weights are therefore whole everywhere after each step; moments and averages are up
 * to date in a rank's own shares only, until parallel_gather.
 *
 * Rank 0 listens at host:port; the others connect, get the id that the back end's sums want, and stay connected for as long as
 * the run lasts. A connection that breaks before its end was announced means a rank that died: every other rank then gives up its
 * sums (which could wait for ever), and the next parallel_finish or parallel_check fails with that rank's number. What the GPU
 * computed in between is worthless: check before a checkpoint is written.
 */
#ifndef SITD_TRAIN_PARALLEL_H
#define SITD_TRAIN_PARALLEL_H
#include <stdbool.h>

#include "core/base/err.h"
#include "kernels/kern.h"

struct parallel_spec {
    int rank, size, local; // local: number of this process on its host
    char host[256];        // of rank 0
    int port;
    void (*bring)(struct kern *); // NULL; tests: gives a back end exchanges that it lacks
};
/*
 * From what torchrun (RANK, WORLD_SIZE, LOCAL_RANK), Open MPI (OMPI_COMM_WORLD_*), MPICH and Intel MPI (PMI_RANK, PMI_SIZE,
 * MPI_LOCALRANKID) or Slurm (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID) set, the first of them that is there. MASTER_ADDR and
 * MASTER_PORT say where rank 0 is; without them Slurm's first node, or this host where all ranks are on it, and port 29400. None
 * there: rank 0 of 1. E_RANGE: a variable that is no such number; E_CONFLICT: rank 0's address is not to be found. e->param names
 * the variable.
 */
int parallel_from_environment(struct parallel_spec *, struct err *);

struct parallel;
// Meets the other ranks (waits two minutes for them). grads: the flat array that parallel_gradients' ranges are of.
int parallel_join(struct parallel **, const struct parallel_spec *, struct kern *, float *grads, struct err *);
// well: the run ended as it will for all ranks, a goodbye; else the others hear that this rank is lost. NULL is fine
void parallel_free(struct parallel *, bool well);
// For dit_train_on_grads, ctx the struct parallel: neighbouring ranges are summed in pieces of 256 MB, the same in every step.
void parallel_gradients(void *ctx, size_t offset, size_t count);
// Sums what is not yet summed; the work that follows comes after all sums. E_DEVICE: a rank died or a sum failed.
int parallel_finish(struct parallel *, struct err *);

// Floats of the flat arrays. A piece's last few, too few for a share each, are summed and stepped by every rank.
struct parallel_piece {
    size_t from, own, share; // where it begins, where this rank's share does; floats of a share
    size_t rest, rest_count;
};
int parallel_pieces(const struct parallel *, const struct parallel_piece **); // of the last backward pass: how many; borrowed
// Queues that every rank gets every share of piece i of `array`. parallel_wait: the work that follows comes after it.
void parallel_share(struct parallel *, float *array, int i);
void parallel_sum(struct parallel *, double *p, size_t n); // p, a buffer: queues its sum over the ranks
int parallel_wait(struct parallel *, struct err *);
int parallel_gather(struct parallel *, float *array, struct err *); // all pieces shared and waited for
#define PARALLEL_NUMBERS 16
// Each of n numbers of the host becomes the sum of all ranks', the same bits everywhere; waits for it. For what all ranks must see
// alike: losses, a wish to stop.
int parallel_numbers(struct parallel *, double *v, int n, struct err *);
int parallel_check(const struct parallel *, struct err *); // E_DEVICE: a rank died. Any thread

/*
 * Starts `n` processes of this program with these arguments, rank i on this host with RANK, WORLD_SIZE, LOCAL_RANK = i,
 * MASTER_ADDR and MASTER_PORT set, and waits for all. SIGTERM and SIGINT are passed on, but for echoes of the last one. When one fails the others get SIGTERM
 * and, ten seconds later, SIGKILL. Returns 0 when all ended well; else e says which rank ended how. Call before threads are made.
 */
int parallel_launch(char *const argv[], int n, struct err *);
#define PARALLEL_ECHO 0.2 // seconds in which the same wish may come twice

#endif
