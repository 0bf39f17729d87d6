// SPDX-License-Identifier: MIT
/*
 * keeper: what becomes of snapshots: checkpoints in OUT/checkpoints, written behind the trainer's back, old ones removed by rule;
 * versions of the model in a directory that a daemon serves.
 *
 * One snapshot, one writer thread a save: keeper_wait before the snapshot is filled anew, keeper_start after. A save that fails
 * (disk full) removes only its own temporary file: checkpoints before it stay, the failure is told and the run goes on. Thread:
 * the trainer's.
 */
#ifndef SITD_TRAIN_KEEPER_H
#define SITD_TRAIN_KEEPER_H
#include <pthread.h>

#include "core/train/snapshot.h"

struct keeper {
    const struct train_config *config;
    const struct snapshot *snapshot;
    char last[600]; // path of the newest checkpoint that is whole, or of what the run continues, or ""
    /* PRIVATE: of the work that is under way */
    bool running, save, publish;
    int lock, publish_lock; // descriptors of the run's folder and of the model's, or -1
    pthread_t thread;
    char path[600];
    struct model_desc desc; // with its loss curve and VAE
    struct latent vae;      // where the published VAE lies
    struct loss_knot curve[OBJECTIVE_BINS];
    struct err save_err, publish_err;
};

// Of a run's first process: makes the folder and the one to publish in, locks them until keeper_close and removes what killed
// writers left there. E_BUSY: another process holds it; E_CONFLICT: models are published beside others, not over them. Of the others (!first): nothing; they only read.
int keeper_open(struct keeper *, const struct train_config *, const struct snapshot *, bool first, struct err *);
void keeper_close(struct keeper *); // waits for what runs; zeros are nothing
// Path [600] of the newest checkpoint there is, back = 1: of the one before it, and so on. E_NOTFOUND where there is none.
int keeper_find(const struct train_config *, int back, char *path, struct err *);
// Where versions of a latent model will be published: the VAE, which a daemon needs beside the weights. One process's business.
int keeper_publish_vae(struct keeper *, struct err *);
// Its folder must hold nothing newer than the step at which a run begins: what is newer belongs to another run, and both would be
// mixed. E_CONFLICT
int keeper_check_new(const struct train_config *, int64_t step, struct err *);
// Writes the snapshot as a checkpoint, and publishes its first EMA, at once.
void keeper_start(struct keeper *, bool save, bool publish);
struct keeper_result {                // of what keeper_start was asked for, once it has ended
    bool saved, published;            // asked for, and done
    struct err save_err, publish_err; // asked for, and failed
    int64_t step;
};
// Waits for what runs. false: nothing did.
bool keeper_wait(struct keeper *, struct keeper_result *);

#endif
