// SPDX-License-Identifier: MIT
/*
 * engine_int: what engine.c, repository.c, loader.c, worker.c and served.c share. Nobody else includes it.
 *
 * Three kinds of thread meet here: callers (any thread, through engine.h), the loader and the workers, one a device. Who may touch what:
 *   - struct engine, struct device: `lock` (one for all) guards every field under that heading; callers, loader and workers take it for a few
 *     instructions and never call out (events, files, kernels) while holding it.
 *   - struct entry belongs to the loader, which alone adds and removes entries; what says so is under the lock.
 *   - struct served (one version of one model on one device) belongs to the loader while it is being built, then to its device's worker, then, when it is
 *     retired and its last job has ended, to the loader again, which frees it; except its `facts`, which are immutable, and what says that it
 *     is under the lock. It has a handle of the back end of its own, so that building and freeing never wait for the steps of others, nor these
 *     for them.
 *   - struct job belongs to the caller until it is in an inbox, then to that device's worker, who may hand it on to another. Callers reach a job that runs only through the list of
 *     alive jobs, under the lock, and only to set `cancel`.
 * The bell and the basket: a caller puts a job into the inbox (or sets a flag) and rings; the worker takes the whole inbox and works without the lock.
 *
 * A version of a model is its facts; it is on every device, and all devices' versions share them. A job is placed when it is accepted: on the
 * device that would be done first. When that device fails, another makes what is still to be made.
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
    struct served *on;        // the version that was served when it was submitted, on the device that makes it; changes under the lock
    int n, priority, peak_rows, evaluations_each;
    int32_t *classes;         // [n], owned
    int *todo;                // [n], owned: the images that this device is to make, of which there are `left`
    bool *handed;             // [n], owned: images that are out
    int left;
    bool moved;               // its device failed once: it does not get a third
    uint64_t seed;
    uint32_t seed_index;
    enum rng_kind rng;
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
    struct stream stream; // of a job with another random generator
};

struct decode { // a finished sample that waits for the VAE
    struct decode *next;
    struct job *job;
    int index;       // of the image in its job
    int at;          // its place among those that the VAE has in hand, or that came out together; -1: none yet
    bool ready;      // it came out
    float latent[];
};

struct served { // one version of one model, ready on a device
    struct facts *facts;
    struct device *device;
    size_t bytes;                // on the device
    struct kern *kern;
    uint64_t overflows;          // of its residual stream, as last counted
    double row_ms;               // of the trial evaluation
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
    float *z, *picture;          // [vae_pictures, numel], what the VAE gets; [vae_pictures, vae_numel], what it gives
    struct decode *decodes;      // waiting, in order
    int n_decodes;
    int in_hand;                 // of them the VAE has in hand, the first ones
    double slice_flops;          // decode.c
    struct served *next;         // device.served, then engine.dropped
    /* under the engine's lock */
    bool retired;                // replaced by a newer version, or its directory is gone: dropped when its last job has ended
    struct sched_stats published; // of sched, after the worker's last turn
    struct sched_stats pending;   // of jobs that are accepted but not in `published` yet
};

enum entry_state { ENTRY_LOADING, ENTRY_ADDED, ENTRY_READY, ENTRY_FAILED }; // found at the start; found later; a version serves; none does
struct entry { // a model directory that was found
    struct entry *next; // by name
    char name[MODEL_NAME_SIZE];
    char *dir;
    /* under the lock */
    enum entry_state state;
    struct facts *current;  // the version that new jobs get, a reference; NULL until the first load
    bool asked;             // engine_reload: no pause
    char reason[sizeof ((struct err *)0)->text]; // why the last attempt failed, or ""
    /* the loader's own */
    char tried[DIGEST_HEX]; // of the model.json that could not be loaded; failures counts how often in a row
    int failures;
    int64_t retry_us, gone_us; // when to try again; when to take it out if it is still gone; 0: not at all
};

struct load { // what the loader hands to a worker; lives on the loader's stack until device.load is back to NULL
    struct served *served;
    int status; // set by the worker: OK, served is installed; E_DEVICE; E_CANCELLED, the engine stops
};

enum stop { STOP_NOT, STOP_FINISH, STOP_CANCEL, STOP_CLOSE };

struct device {
    /* constant after engine_open */
    struct engine *engine;
    struct kern_config config; // of every back end handle
    char name[96];             // for people
    pthread_t worker;

    /* the worker's own */
    struct served *last; // whose turn was last
    int jobs;            // taken and not ended, over all models
    bool dead;           // the device failed: nothing runs any more
    struct engine_stats counters; // copied to `published` each turn

    pthread_cond_t bell;  // to the worker
    /* under the engine's lock */
    struct job *inbox, **inbox_end;
    bool cancels;          // some job has cancel set
    bool retires;          // some version was retired
    struct load *load;     // waits for the worker
    struct served *served; // changed by the worker only
    struct engine_stats published;
};

struct engine {
    /* constant after engine_open */
    struct engine_options options; // its strings are not kept
    char backend[16];              // what the devices' config.backend points to
    char cache[512];               // what the devices' config.cache points to
    bool on_host;                  // the devices' buffers are host memory
    struct sched_limits limits;
    struct device *devices; // [n_devices]
    int n_devices;
    char names[512]; // of the devices
    char *folder;    // of model directories; NULL: the one entry is it
    pthread_t loader;

    /* the loader's own */
    char scan_error[sizeof ((struct err *)0)->text]; // of the last look at the folder

    pthread_mutex_t lock;
    pthread_cond_t built; // to the loader
    /* under the lock */
    struct job *alive;      // every accepted job whose last event is not sent yet
    bool scan;              // the loader shall look at the model directories
    enum stop stop;
    uint64_t last_id;
    struct entry *entries;  // by name; changed by the loader only
    struct served *dropped; // to be freed by the loader
};

int64_t engine_now_us(void); // CLOCK_MONOTONIC
void engine_emit(struct engine *, struct engine_event *); // calls the daemon; never with the lock held
int engine_thread(pthread_t *, void *(*)(void *), void *, const char *what, struct err *);
// Where a job of this version is best made: on the device that has least to do, failed ones left out. NULL: nowhere. Lock held.
struct served *engine_place(struct engine *, const struct facts *);
void engine_enqueue(struct served *, struct job *); // into its device's inbox; lock held
void job_free(struct job *); // NULL is fine
void engine_retire(struct engine *, struct facts *); // drops the reference; nobody gets this version any more. NULL is fine; lock held

/* repository.c */
int repository_open(struct engine *, const char *models_dir, struct err *); // fills entries; E_NOTFOUND, E_IO, E_RANGE, E_NOMEM
void repository_close(struct engine *);
void repository_scan(struct engine *); // on the loader: entries that have come and gone
struct entry *repository_find(struct engine *, const char *name); // lock held, or on the loader

/* loader.c */
void *loader_main(void *engine);

/* served.c */
// Can this engine serve it at all? vae: of the one that its latent.vae names, NULL: it names none
int served_check(const struct model_desc *, const struct vae_arch *vae, struct sampler_model *, struct err *);
struct source { // an open model directory
    const char *name;
    const struct engine_model *before; // that serves this name; NULL: none
    size_t bytes;                      // memory that must be free on each device; 0: just try
    struct model_dir dir;
    struct vae_file vae;
    bool has_vae;
};
// Of device memory, without its VAE: four bytes a weight and the slots. What a version really takes, activations included, is in its facts.
size_t served_estimate(const struct model_desc *, const struct sched_limits *);
// E_NOMEM with a text that says how much is missing, unless so many bytes are free on the device (k; NULL: on the host).
int served_room(struct kern *, size_t bytes, struct err *);
// What a version says of itself, one reference; before served_new, which adds what the device tells. Its description is complete after facts_take.
int facts_new(struct facts **, const struct source *, struct err *);
void facts_take(struct facts *, struct source *); // takes from->dir.desc
// Opens the back end, builds the networks and slots and evaluates the first once. Holds a reference to the facts.
int served_new(struct served **, struct device *, struct facts *, const struct source *from, struct err *);
void served_free(struct served *);
// dst [h, w, channels] from planes x [channels, h, w] in -1..1, as the family's authors write the pictures that they evaluate, clamped and cut to
// whole numbers: 127.5x + 128 (DiT, SiT), (x + 1)127.5 with edm (MaskDiT), which is darker by half a level on average. E_NONFINITE.
int served_pixels(uint8_t *dst, const float *x, int channels, int side, bool edm, struct err *);

/* decode.c: pictures out of latents */
int decode_add(struct served *, struct job *, int index, const float *latent, struct err *); // E_NOMEM
void decode_drop(struct served *, const struct job *); // all that belongs to the job; NULL: everything
// Works on the first ones until the clock says until_us, and a little. 1: the first's picture is there; 0: not yet, or nothing waits; negative: it
// failed. After 1 and after a failure decode_pop, or decode_drop, must follow.
int decode_work(struct served *, int64_t until_us, struct err *);
const float *decode_picture(const struct served *); // of the first, after decode_work has returned 1; valid until the next decode_work
void decode_pop(struct served *); // forgets the first

/* worker.c */
void *worker_main(void *device);

#endif
