// SPDX-License-Identifier: MIT
/*
 * encode: pixels to PNG and base64, and the finished answer's text, on libuv's pool. A piece of work owns everything it touches
 * and names its job by id; nothing in it points into the loop's tables. Thread: started and finished on the loop, done on the
 * pool.
 */
#ifndef SITD_ENCODE_H
#define SITD_ENCODE_H
#include "proto/request.h"
#include "server/negotiate.h"
#include "server/server.h"

struct shot { // one finished image
    uint8_t *png;
    size_t png_size;
    char *b64;               // NULL unless the answer is JSON
    char sha256[DIGEST_HEX]; // of the pixels
};
void shot_deinit(struct shot *);

struct encoding {
    uv_work_t work;
    struct server *server; // for the finish on the loop only
    uint64_t job;
    struct engine_image image;
    char *normalised, weights[DIGEST_HEX];
    int compression;
    bool want_b64;
    struct shot shot;
    struct err err;
};
// Takes the pixels and the normalised request, also on failure. weights: digest of the weights. Ends in jobs_encoded.
int encode_start(struct server *, uint64_t job, struct engine_image *take, char *take_normalised, const char *weights,
                 int compression, bool want_b64);

struct assembly {
    uv_work_t work;
    struct server *server;
    uint64_t job;
    enum answer_format format; // ANSWER_JSON or ANSWER_MULTIPART
    struct answer answer;      // images is filled here
    char id[132];
    int64_t executed_us; // encode_ms counts from here
    struct resolved resolved;
    const struct engine_model *model;
    struct shot *shots;
    char *text; // the answer's body; NULL: no memory
    size_t text_size;
};
// Takes everything in the assembly, also on failure (then it is freed). Ends in jobs_assembled.
int assembly_start(struct assembly *take);
#define MULTIPART_BOUNDARY                                                                                                       \
    "sitd-part-7d1f0c5e9b4a3826e1c7" // fixed: compressed pixels hit 20 chosen hex digits once in 2^80 tries

#endif
