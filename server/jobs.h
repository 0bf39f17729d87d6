// SPDX-License-Identifier: MIT
/*
 * jobs: the requests that the engine works on. Loop thread only; the table is the only owner of a job.
 *
 * POST /v1/samples makes a job; the engine's events and the pool's finished encodings find it by id; it ends with the answer,
 * with its deadline (504), with a client that left (the engine is told, so that its rows are free at the next step) or with the
 * daemon. An event or an encoding that comes later finds no job and is dropped.
 */
#ifndef SITD_JOBS_H
#define SITD_JOBS_H
#include "server/encode.h"
#include "server/http.h"

void jobs_samples(struct exchange *); // the route POST /v1/samples
void jobs_event(struct server *, struct engine_event *take_pixels);
void jobs_encoded(struct server *, struct encoding *); // the encoding's results are moved out of it where they are wanted
void jobs_assembled(struct server *, struct assembly *);
void jobs_abandon(struct server *, uint64_t id); // the client left
void jobs_tick(struct server *, int64_t now_ms); // deadlines
void jobs_give_up(struct server *);              // the daemon stops: every job is cancelled and answered 503

#endif
