// SPDX-License-Identifier: MIT
/*
 * request: POST /v1/samples, from JSON bytes to a struct and back.
 *
 * request_parse checks syntax, types, unknown fields and what can be checked without a model; request_resolve fills defaults from
 * the model, turns labels into ids and checks ranges and combinations. Nothing is silently ignored or clamped. Errors carry the
 * HTTP status and the field. The contract is proto/openapi.yaml. Thread: any.
 */
#ifndef SITD_REQUEST_H
#define SITD_REQUEST_H
#include <stdbool.h>
#include <stdint.h>

#include "core/engine/engine.h"

#define REQUEST_MAX_IMAGES 1024
#define REQUEST_MAX_BODY (1u << 20)
#define REQUEST_MAX_TIMEOUT_MS 86400000 // a day

struct http_error { // becomes {"error":{"message","type","param","code"}}
    int status;     // HTTP
    char type[32], code[48], param[96], message[512];
};
int http_error_set(struct http_error *, int status, const char *code, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 5, 6))); // returns -1
int http_error_from(struct http_error *,
                    const struct err *);          // maps statuses to HTTP (E_BUSY 503, E_TIMEOUT 504, E_RANGE 422, ...)
char *http_error_json(const struct http_error *); // caller mem_free's; NULL on no memory

struct request; // parsed, not yet resolved

// 0, or -1 with the error filled: 400 (syntax, overflow, duplicate key, depth; line and column), 422 (type, unknown field,
// range).
int request_parse(struct request **, const char *body, size_t len, struct http_error *);
void request_free(struct request *);
const char *
request_model(const struct request *); // "model" as given ("name", "name@9034", "name@0a1b2c"), or NULL (the default model)
// The part before '@', for engine_model_ref; NULL (the default model) when none was given. Borrowed.
const char *request_model_name(const struct request *);
// The 404 for a model that is not served, with near names. names: the ready ones. Returns -1.
int request_model_unknown(const struct request *, const char (*names)[64], int n, struct http_error *);

struct resolved {          // ready to submit
    struct engine_job job; // classes owned by the resolved
    bool seed_given;
    int compression; // PNG 0..9
    const char *notes[8];
    int n_notes;
};
// model: name@step and name@digest are checked here (404; 409 for one that was replaced). Seeds not given are drawn below 2^53 from random53.
// job.digest is always the model's: labels, defaults and the answer belong to these weights. When engine_submit says E_CONFLICT
// "digest", the model was swapped meanwhile: take it again, resolve again.
int request_resolve(struct resolved *, const struct request *, const struct engine_model *, uint64_t random53,
                    struct http_error *);
void resolved_deinit(struct resolved *);

// The normalised request of image i alone (no n, timeout, id or time; every default written out): what each PNG carries. Caller
// mem_free's.
char *request_normalised(const struct resolved *, const struct engine_model *, int i);

struct answer_image {
    int label;
    uint32_t seed_index;
    const char *sha256;
    const char *b64;
};
struct answer {
    const char *id;
    int64_t created; // unix seconds
    int evaluations;
    double queue_ms, denoise_ms, decode_ms, encode_ms;
    const struct answer_image *images;
    int n;
};
char *answer_json(const struct answer *, const struct resolved *, const struct engine_model *); // caller mem_free's

#endif
