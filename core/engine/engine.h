// SPDX-License-Identifier: MIT
/*
 * engine: the narrow door between the daemon and the device.
 *
 * The only core header that server/ needs for sampling. It names no tensor. The engine loads model directories on its loader thread, again
 * when their model.json changes, runs jobs on one worker thread per device and reports by events. Ids and plain values cross the wall, never pointers to shared mutable things: what
 * an event points to is either the receiver's from then on (`take`) or valid for the callback only.
 *
 * Life of a job: engine_submit (any thread) -> queued -> EV_STARTED when its first image gets a slot -> EV_IMAGE per image, in order of
 * completion -> exactly one of EV_DONE, EV_FAILED, EV_CANCELLED. After that the id is forgotten; events never come for a job whose submit failed.
 */
#ifndef SITD_ENGINE_H
#define SITD_ENGINE_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/err.h"
#include "core/diffusion/stream.h"
#include "core/io/model_dir.h"

struct engine;
struct engine_event;

#define ENGINE_DEVICES 16       // at most
#define ENGINE_ALL (-1)

struct engine_options {
    const char *models_dir;     // a folder of model directories, or itself one (holds model.json)
    const char *backend;        // "cpu", "cuda", "ref"; "auto": a GPU where there is one, else the CPU
    const int *devices;         // [n_devices] numbers that the back end knows; on the processor each is a pool of `threads`
    int n_devices;              // 0: the first; ENGINE_ALL: all there are
    const char *cache;          // folder for what a back end finds out by trying (kern_config.cache); NULL: none
    const char *precision;      // "f32" (also NULL), or another that kern_precision knows
    bool any_bits, exact_residual; // on GPUs: as struct kern_config has any_bits and exact_stream
    int max_rows, threads;      // rows of the largest batch (least 2); 0 threads: kern_threads_allowed()
    int nice;                   // of compute threads
    int max_jobs, max_images;   // queue bounds, per model
    int retry_ms;               // pause after a model's first failed load, doubled after each further one up to 256 times; 0: 1000
    void (*event)(void *ctx, const struct engine_event *); // called on the worker or loader thread, no lock held; must not block nor close
    void *ctx;
};

enum engine_event_kind { EV_MODEL, EV_STARTED, EV_PROGRESS, EV_IMAGE, EV_DONE, EV_FAILED, EV_CANCELLED };
struct engine_image { // take: free pixels with mem_free
    int index;                     // image index within the job
    int width, height, channels;   // channels 1 or 3
    uint8_t *pixels;               // [height, width, channels]
};
struct engine_event {
    enum engine_event_kind kind;
    uint64_t job;
    struct engine_image image;     // EV_IMAGE
    int evaluations;               // EV_DONE: network evaluations made, all images together
    double queue_ms, denoise_ms, decode_ms; // EV_DONE: first slot - submit; last image - first slot, less decode; conversion to pixels
    double progress;               // EV_PROGRESS: 0..1 of the whole job; sent when it has grown by 0.01 or more
    struct err err;                // EV_FAILED (E_TIMEOUT, E_NONFINITE, E_DEVICE, ...); EV_MODEL: status 0 = loaded
    char model[64];                // EV_MODEL
};

#define ENGINE_BEFORE 8
struct engine_version { char digest[DIGEST_HEX]; int64_t step; };
struct engine_model { // a loaded model's facts; immutable, reference counted
    char name[MODEL_NAME_SIZE], digest[DIGEST_HEX];
    struct engine_version before[ENGINE_BEFORE]; // that this one and its predecessors replaced, the last first; digest "": no more
    struct model_desc desc;        // labels, shapes, step (= version)
    struct sampler_model sampler;
    int guide_channels;            // the model's own rule, as a count
    int max_guide_channels;        // of the network's output: DiT's rule reaches into its variance's channels
    int image_size, image_channels; // of the pictures
    int decode_rows;               // work of making a picture of a latent, in network rows; 0: samples are pictures
    size_t device_bytes;
};

enum engine_state { MODEL_LOADS, MODEL_SERVES, MODEL_REFUSED };
struct engine_entry { // a model directory, for who looks after the server
    char name[MODEL_NAME_SIZE], digest[DIGEST_HEX]; // digest: of the version that serves; "" none
    enum engine_state state;
    int64_t version;
    char reason[sizeof ((struct err *)0)->text]; // why what model.json says now could not be loaded; "" it was, or is not tried yet
};

struct engine_job { // what to run; copied by engine_submit
    char model[64];                // a loaded model's name
    char digest[DIGEST_HEX];       // "" or the digest that must still be served
    int n;
    const int32_t *classes;        // [n]: label id, -1 unconditional (needs class_dropout)
    uint64_t seed;
    uint32_t seed_index;           // image i uses stream (seed, seed_index + i)
    enum rng_kind rng;             // whose numbers that stream has
    struct sampler_spec sampler;
    int64_t timeout_ms;            // 0: none
    int priority;
    bool progress;                 // wants EV_PROGRESS
};

struct engine_stats {
    int jobs, queued_images, running_images, running_rows, max_rows, models_ready, models_loading, models_failed;
    int devices, devices_failed;
    uint64_t jobs_moved;           // from a device that failed to another
    uint64_t evaluations, batches, steps[SAMPLER_TYPE_COUNT], images_done, images_failed, images_cancelled; // evaluations counts rows
    uint64_t batch_rows[33];       // histogram: batches of exactly i rows; last: 32 or more
    uint64_t overflows;            // numbers of residual streams that float16 did not hold
    double busy_seconds;           // the workers' time inside steps and decoding
    double row_ms;                 // smoothed milliseconds per row at present load, of the slowest device
    size_t device_bytes;
    bool device_ok;                // at least one
};

// Opens the device, starts threads; models load in the background (EV_MODEL each, perhaps before this returns). The options' strings are not kept.
// E_RANGE, E_UNSUPPORTED (param: the option), E_NOTFOUND (no folder, or no model in it), E_DEVICE, E_NOMEM; then nothing is left to close.
int engine_open(struct engine **, const struct engine_options *, struct err *);
// Looks at the models folder: directories that have come or gone, and every model.json that is not the one last loaded (by its SHA-256). A new
// version is read and built beside the old one, tried out and put in its place between two steps; accepted jobs finish on the version that
// they were accepted for, which is freed after the last. A load that fails changes nothing and is tried again by itself, after growing
// pauses, until it succeeds or model.json changes. Each attempt ends in one EV_MODEL. Returns at once; any thread.
void engine_scan(struct engine *);
// The same, and this model's pause is over. E_NOTFOUND (param "model").
int engine_reload(struct engine *, const char *name, struct err *);
int engine_repository(struct engine *, struct engine_entry *, int max); // all directories found, sorted by name; returns how many
// 0 and *id set. Or *id 0 and E_NOTFOUND (param "model"), E_CONFLICT ("digest"), E_RANGE (param: the field), E_DEVICE (it has failed), E_NOMEM, or
// E_BUSY: queue full, model loading, engine stopping; *retry_ms (may be NULL) is then the wait, computed from the work that is queued.
int engine_submit(struct engine *, const struct engine_job *, uint64_t *id, int64_t *retry_ms, struct err *);
void engine_cancel(struct engine *, uint64_t id);   // unknown ids are ignored; EV_CANCELLED follows at the next step if it was alive
void engine_stats(struct engine *, struct engine_stats *);
// Borrowed until engine_model_unref. name NULL: the default (the only one that serves, or the one marked default). NULL if none.
const struct engine_model *engine_model_ref(struct engine *, const char *name);
void engine_model_unref(const struct engine_model *);
int engine_model_names(struct engine *, char names[][64], int max); // ready models, sorted
// Every model found at open was loaded or refused, at least one serves, the device is fine and nobody has called engine_stop.
bool engine_ready(struct engine *);
const char *engine_device(struct engine *);         // for people; borrowed, constant
void engine_stop(struct engine *, bool finish);     // no more submits; finish: run what there is, else cancel it; returns at once
void engine_close(struct engine *);                 // cancels what is left, joins threads, frees; no event after it returns. NULL is fine

#endif
