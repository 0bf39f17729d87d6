// SPDX-License-Identifier: MIT
/*
 * What the engine's tests share: tiny random model directories (8x8 pixels, width 32, 2 blocks) and a listener that keeps the book
 * on every job's events and checks their order as they come.
 */
#ifndef ENGINE_FIXTURE_H
#define ENGINE_FIXTURE_H
#include <pthread.h>

#include "core/engine/engine.h"
#include "core/io/vae_file.h"

#define HEARD_JOBS 8192
#define HEARD_IMAGES 16

struct tiny { // a model to be written; zero means the default in the comment
    const char *name;
    const char *family;  // "sit"; or "dit", "maskdit" (with a decoder)
    int channels;        // 1
    int side;            // 8
    const struct vae_arch *vae; // none; beside the model as its latent.vae, random, of the given seed
    const char *vae_sha256;     // the true one
    bool latents;               // of scale 0.5; with a VAE it is so anyway
    bool no_null_class;  // has one
    bool is_default;
    int seed;
    bool huge;           // every weight of the last layer is finite, their sums are not
    int bad_class;       // > 0: this class's embedding is so large that the network overflows for it alone
};
const char *fixture_dir(void);             // a fresh folder, removed when the test's process ends
void fixture_model(const struct tiny *);   // writes fixture_dir()/name

struct heard_job {
    int started, images, ended, late;      // late: events after the last
    bool seen[HEARD_IMAGES];
    uint8_t pixels[HEARD_IMAGES][8 * 8 * 3];
    double progress;
    int tellings;
    struct engine_event end;               // EV_DONE, EV_FAILED or EV_CANCELLED
};
struct heard { // zero it, then listen
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct heard_job *jobs; // [HEARD_JOBS], by id
    struct err models[8];   // of EV_MODEL events, in the order of arrival
    char names[8][64];
    int n_models, broken;   // broken: events that break the rules
};
void hear_start(struct heard *);
void hear(void *heard, const struct engine_event *); // engine_options.event
void hear_stop(struct heard *);
const struct heard_job *hear_end(struct heard *, uint64_t id);        // waits for the job's last event
void hear_started(struct heard *, uint64_t id);                       // waits for EV_STARTED
const struct err *hear_model(struct heard *, const char *name);       // waits for its EV_MODEL

struct engine_options fixture_options(struct heard *); // ref, f32, 8 rows, roomy queues
struct engine *fixture_open(struct heard *, const struct engine_options *); // opens and waits until every model has reported
struct engine_job fixture_job(const char *model, int n, const int32_t *classes, enum sampler_type, enum sampler_method, int steps);
uint64_t fixture_submit(struct engine *, const struct engine_job *); // must be accepted
void fixture_same(const struct heard_job *, const struct heard_job *, int images); // all done, the same bytes

#endif
