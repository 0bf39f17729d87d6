// SPDX-License-Identifier: MIT
/*
 * sched: which images run next; a pure state machine.
 *
 * No threads, no clock, no device: every call gets the time it needs, so the whole policy is tested without a model. One sched per loaded model.
 * A job is a request for n images; an image occupies one slot and at most `peak` rows from its admission until it is done. Admission takes waiting
 * jobs in order of priority (higher first), then round robin, one image a turn, so that a job of 64 images does not shut out a job of one;
 * an image enters when a slot is free and the rows of all running images' peaks still fit in max_rows. Every running image that is not
 * waiting for something takes part in every batch, so nothing starves once admitted.
 * Bounded: at most max_jobs jobs and max_images queued images; past that sched_submit says E_BUSY. All memory is had at sched_new: nothing else
 * here can fail for want of it.
 * Thread: its owner's.
 */
#ifndef SITD_SCHED_H
#define SITD_SCHED_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/err.h"

struct sched;
struct sched_limits { int max_rows, max_jobs, max_images; }; // each at least 1
struct sched_job {
    uint64_t id;           // unique among jobs that are alive
    int images, peak_rows; // peak rows of one image (1 or 2)
    int evaluations;       // estimate for one image
    int priority;
    int64_t deadline_ms;   // 0: none; queue and execution both count
};
struct sched_slot { uint64_t job; int image; bool busy; }; // image: index within the job, handed out in order 0, 1, ...
struct sched_stats { int jobs, queued_images, running_images, running_rows; int64_t rows_left; }; // rows_left: evaluations x rows still to be made

int sched_new(struct sched **, const struct sched_limits *, struct err *); // E_NOMEM, E_RANGE
void sched_free(struct sched *);                                           // NULL is fine
int sched_slots(const struct sched *);                                     // = max_rows
// 0; E_BUSY (no room now); E_RANGE (never: peak > max_rows, more images than max_images); E_CONFLICT (the id is alive)
int sched_submit(struct sched *, const struct sched_job *, struct err *);
// Moves waiting images into free slots; writes the newly filled slot indices, returns how many. slots holds sched_slots() ints.
int sched_admit(struct sched *, int *slots);
const struct sched_slot *sched_slot(const struct sched *, int slot); // borrowed; valid until the next call that changes the sched
int sched_running(const struct sched *, int *slots);                 // slots that are busy, in slot order
void sched_progress(struct sched *, int slot, int evaluations_left); // after each step; a slot that is not busy is ignored
bool sched_image_done(struct sched *, int slot); // frees the slot; true when it was the job's last image (the job is forgotten)
// Removes a job at once: its waiting images vanish, its busy slots become free and are written to slots. Returns how many, or -1 if unknown id.
int sched_cancel(struct sched *, uint64_t job, int *slots);
// Ids of jobs whose deadline is not after now; the caller cancels them. Returns how many (at most max).
int sched_expired(const struct sched *, int64_t now_ms, uint64_t *ids, int max);
int64_t sched_next_deadline(const struct sched *); // 0: none
void sched_stats(const struct sched *, struct sched_stats *);

#endif
