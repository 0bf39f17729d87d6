// SPDX-License-Identifier: MIT
/*
 * metrics: counters of the loop thread, and the text that Prometheus reads. What the scheduler knows (queue, rows, batches) comes
 * from engine_stats at the time of asking. Loop thread only.
 */
#ifndef SITD_METRICS_H
#define SITD_METRICS_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define METRICS_ROUTES 24
#define METRICS_CODES 32
#define METRICS_BOUNDS 14
#define METRICS_MODELS 32

enum phase { PHASE_QUEUE, PHASE_DENOISE, PHASE_DECODE, PHASE_ENCODE, PHASE_COUNT };
enum outcome { IMAGES_DONE, IMAGES_FAILED, IMAGES_CANCELLED, OUTCOME_COUNT };
enum cancel_stage { CANCEL_QUEUED, CANCEL_RUNNING, CANCEL_ENCODING, CANCEL_STAGES };
enum reject_reason {
    REJECT_QUEUE_FULL,
    REJECT_LOADING,
    REJECT_DRAINING,
    REJECT_DEVICE,
    REJECT_INVALID,
    REJECT_TOO_LARGE,
    REJECT_SLOW,
    REJECT_COUNT
};

struct histogram {
    uint64_t buckets[METRICS_BOUNDS + 1], count;
    double sum;
};
struct metrics {
    uint64_t requests[METRICS_ROUTES][METRICS_CODES]; // the last code stands for others
    struct histogram duration[METRICS_ROUTES], phases[PHASE_COUNT];
    uint64_t rejected[REJECT_COUNT], cancelled[CANCEL_STAGES], loads[2]; // loads: failed, succeeded
    struct {
        char name[64];
        uint64_t images[OUTCOME_COUNT];
    } models[METRICS_MODELS];
};

void metrics_request(struct metrics *, int route, int code, double seconds);
void metrics_phase(struct metrics *, enum phase, double seconds);
void metrics_images(struct metrics *, const char *model, enum outcome, uint64_t n);
struct server;
char *metrics_text(struct server *, size_t *n); // caller mem_free's; NULL on no memory

#endif
