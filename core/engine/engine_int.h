// SPDX-License-Identifier: MIT
/*
 * engine_int: what engine.c, loader.c, worker.c and served.c share. Nobody else includes it.
 *
 * Three kinds of thread meet here: callers (any thread, through engine.h), the loader and the worker (one device, so one worker today). Who may
 * touch what:
 *   - struct engine: `lock` guards every field under that heading; callers, loader and worker take it for a few instructions and never
 *     call out (events, files, kernels) while holding it.
 *   - struct served (one version of one model on the device) belongs to the worker, except its `facts`, which are immutable, and the two
 *     counters that say they are under the lock.
 *   - struct job belongs to the caller until it is in the inbox, then to the worker. Callers reach a job that runs only through the list of
 *     alive jobs, under the lock, and only to set `cancel`.
 * The bell and the basket: a caller puts a job into the inbox (or sets a flag) and rings; the worker takes the whole inbox and works without the lock.
 */
#ifndef SITD_ENGINE_INT_H
#define SITD_ENGINE_INT_H
#include <pthread.h>
#include <stdatomic.h>

#include "core/engine/engine.h"
#include "core/engine/runner.h"
#include "core/engine/sched.h"
#include "core/model/vae.h"

struct facts { // what engine_model_ref lends; outlives the engine if somebody still holds it
    struct engine_model model; // first: engine_model_unref finds the rest by it
    atomic_int refs;
};
void facts_unref(struct facts *);

struct job {
    uint64_t id;
    struct served *on;        // the version that was served when it was submitted
    int n, priority, peak_rows, evaluations_each;
    int32_t *classes;         // [n], owned
    uint64_t seed;
    uint32_t seed_index;
    struct sampler_spec spec;
    bool progress;
    int64_t submit_us, deadline_ms; // deadline 0: none
    atomic_bool cancel;       // set by callers, read by the worker
    struct job *alive_prev, *alive_next; // engine.alive, under its lock
    struct job *prev, *next;  // the inbox (under the lock), then served.jobs
    /* the worker's account */
    int done, evaluations;
    int decoding;             // of its images, that are finished samples and not yet pictures
    double decode_share;      // of an image's work
    int64_t first_us, last_us; // first slot, last image read
    double decode_ms;
    double running_progress;   // sum over its running images, of this turn
    double told_progress;
};

struct run { // one slot of the device and the job whose image is in it
    struct runner_slot slot;
    struct job *job; // NULL: free
};

struct decode { // a finished sample that waits for the VAE
    struct decode *next;
    struct job *job;
    int index;       // of the image in its job
    float latent[];
};

struct served { // one version of one model, ready on the device
    struct facts *facts;
    struct runner *runner;
    struct sched *sched;
    struct run *runs;            // [slots]
    struct runner_slot **batch;  // [slots]
    int *slots;                  // [slots] scratch for sched_admit and sched_running
    int *freed;                  // [slots] scratch for sched_cancel
    float *pixels;               // [numel] host copy of a finished sample
    struct job *jobs;            // those that the worker has taken
    int n_jobs;
    struct vae *vae;             // NULL: samples are pictures
    float *z, *picture;          // [numel], what the VAE gets; [vae_numel], what it gives
    struct decode *decodes;      // waiting, in order; the first is in the VAE's hand if in_hand
    int n_decodes;
    bool in_hand;
    double slice_flops;          // decode.c
    bool retired;                // replaced by a newer version: freed when its last job has ended
    struct served *next;         // engine.served
    /* under the engine's lock */
    struct sched_stats published; // of sched, after the worker's last turn
    struct sched_stats pending;   // of jobs that are accepted but not in `published` yet
};

enum entry_state { ENTRY_LOADING, ENTRY_READY, ENTRY_FAILED };
struct entry { // a model directory that was found
    char name[64];
    char *dir;
    enum entry_state state; // under the lock, as is `current`
    struct served *current; // the version that new jobs get; NULL until the first load
};

struct load { // what the loader hands to the worker; lives on the loader's stack until `taken` is back to NULL
    struct entry *entry;
    struct model_dir *dir;
    struct vae_file *vae; // NULL: none
};

enum stop { STOP_NOT, STOP_FINISH, STOP_CANCEL, STOP_CLOSE };

struct engine {
    /* constant after engine_open */
    struct engine_options options; // its strings are not kept
    struct sched_limits limits;
    char device[96];
    struct entry *entries; // [n_entries], sorted by name
    int n_entries;
    pthread_t worker, loader;

    /* the worker's own */
    struct kern *kern;
    struct served *last; // whose turn was last
    int jobs;            // taken and not ended, over all models
    bool dead;           // the device failed: nothing runs any more
    struct engine_stats counters; // copied to `published` each turn

    pthread_mutex_t lock;
    pthread_cond_t bell;  // to the worker
    pthread_cond_t built; // to the loader
    /* under the lock */
    struct job *inbox, **inbox_end;
    struct job *alive;    // every accepted job whose last event is not sent yet
    bool cancels;         // some alive job has cancel set
    struct load *load;    // waits for the worker, or is being built
    enum stop stop;
    uint64_t last_id;
    struct served *served; // changed by the worker only
    struct engine_stats published;
};

int64_t engine_now_us(void); // CLOCK_MONOTONIC
void engine_emit(struct engine *, struct engine_event *); // calls the daemon; never with the lock held
int engine_thread(pthread_t *, void *(*)(void *), struct engine *, const char *what, struct err *);

/* loader.c */
int loader_scan(struct engine *, const char *models_dir, struct err *); // fills entries; E_NOTFOUND, E_IO, E_RANGE, E_NOMEM
void *loader_main(void *engine);
void loader_report(struct engine *, struct entry *, struct err *); // EV_MODEL and the log line; puts the model's name before an error's text

/* served.c */
// Can this engine serve it at all? vae: of the one that its latent.vae names, NULL: it names none
int served_check(const struct model_desc *, const struct vae_arch *vae, struct sampler_model *, struct err *);
// Takes load->dir->desc (on success). Builds the networks and slots on kern and evaluates the first once. row_ms: of that evaluation.
int served_new(struct served **, struct kern *, const struct sched_limits *, const struct load *, double *row_ms, struct err *);
void served_free(struct served *);
// dst [h, w, channels] from planes x [channels, h, w] in -1..1, as the family's authors write the pictures that they evaluate, clamped and cut to
// whole numbers: 127.5x + 128 (DiT, SiT), (x + 1)127.5 with edm (MaskDiT), which is darker by half a level on average. E_NONFINITE.
int served_pixels(uint8_t *dst, const float *x, int channels, int side, bool edm, struct err *);

/* decode.c: pictures out of latents */
int decode_add(struct served *, struct job *, int index, const float *latent, struct err *); // E_NOMEM
void decode_drop(struct served *, const struct job *); // all that belongs to the job; NULL: everything
// Works on the first until the clock says until_us, and a little. 1: its picture is in served->picture; 0: not yet, or nothing waits; negative: it
// failed. After 1 and after a failure decode_pop, or decode_drop, must follow.
int decode_work(struct served *, int64_t until_us, struct err *);
void decode_pop(struct served *); // forgets the first

/* worker.c */
void *worker_main(void *engine);

#endif
