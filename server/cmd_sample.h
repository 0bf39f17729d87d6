// SPDX-License-Identifier: MIT
/*
 * sitd sample in three files: its flags become a request (cmd_sample_flags.c), which is run for PNGs (cmd_sample.c) or, many times over, for one
 * numpy archive (cmd_sample_export.c). Thread: main.
 */
#ifndef SITD_CMD_SAMPLE_H
#define SITD_CMD_SAMPLE_H
#include <jansson.h>
#include <stdbool.h>

#include "proto/request.h"

struct sample_options {
    const char *model, *out, *classes, *request;
    const char *npz, *labels; // export
    long long num;            // export; 0: not given
    int columns, n, max_rows, threads;
    const char *backend, *precision;
    json_t *body, *sampler; // sampler borrowed from body
};

// 0, or the exit status + 1. What is wrong has been printed.
int sample_parse(struct sample_options *, int argc, char **argv);
// The flags as a resolved request; o->body is the request's JSON afterwards. 0, or the exit status.
int sample_request(struct resolved *out, struct sample_options *, const struct engine_model *);
// The engine that makes them; events as engine_options'. 0, or the exit status: what is wrong has been printed.
int sample_open(struct engine **, const struct sample_options *, int max_jobs, int max_images,
                void (*event)(void *ctx, const struct engine_event *), void *ctx);
int sample_usage(const char *what, const char *value); // prints, returns 2

// sitd sample --npz. Returns the exit status.
int sample_export(struct sample_options *);
// The line of progress on a terminal: part in 0..1, of which `before` was there when this run began `seconds` ago.
void sample_bar(double part, double before, long long done, long long n, double seconds);

#endif
