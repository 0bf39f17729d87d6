// SPDX-License-Identifier: MIT
/*
 * request_fields: what request_parse leaves for request_resolve. Private to proto/.
 *
 * A value counts only where its bit in `given` is set: whether a field was sent matters, because a field that the chosen sampler
 * does not use is refused.
 */
#ifndef SITD_REQUEST_FIELDS_H
#define SITD_REQUEST_FIELDS_H
#include <stdbool.h>
#include <stdint.h>

#include "proto/request.h"

enum request_field {
    FIELD_MODEL,
    FIELD_CLASSES,
    FIELD_CLASS,
    FIELD_N,
    FIELD_SEED,
    FIELD_SEED_INDEX,
    FIELD_RNG,
    FIELD_INTERPOLANT,
    FIELD_TYPE,
    FIELD_METHOD,
    FIELD_STEPS,
    FIELD_MAX_EVALUATIONS,
    FIELD_W_T,
    FIELD_W_T_SCALE,
    FIELD_W_T_ETA,
    FIELD_LAST_STEP,
    FIELD_LAST_STEP_SIZE,
    FIELD_ATOL,
    FIELD_RTOL,
    FIELD_SPACING,
    FIELD_ETA,
    FIELD_CLIP,
    FIELD_DENOISE,
    FIELD_CHURN,
    FIELD_S_MIN,
    FIELD_S_MAX,
    FIELD_S_NOISE,
    FIELD_RHO,
    FIELD_SIGMA_MIN,
    FIELD_SIGMA_MAX,
    FIELD_SCALE,
    FIELD_INTERVAL,
    FIELD_CHANNELS,
    FIELD_FORMAT,
    FIELD_COMPRESSION,
    FIELD_TIMEOUT,
    FIELD_PRIORITY,
    FIELD_COUNT
};

struct class_ref {     // one entry of classes
    const char *label; // owned text, or NULL: id, or unconditional
    int64_t id;        // -1 unconditional
};

struct request {
    uint64_t given;            // 1 << enum request_field
    char *model, *model_name;  // as sent; the part before '@'
    struct class_ref *classes; // of `classes`, or the one of `class`
    int n_classes;
    int64_t n, seed_index, steps, max_evaluations, compression, timeout_ms, priority;
    uint64_t seed;
    int interpolant, rng, type, method, w_t, last_step, format, spacing; // enum values
    bool clip, denoise;
    double w_t_scale, w_t_eta, last_step_size, atol, rtol, eta, churn, s_min, s_max, s_noise, rho, sigma_min, sigma_max;
    struct sampler_curve knots; // of w_t, where that is W_KNOTS
    double scale, interval[2];
    int64_t channels; // -1: all
};

static inline bool request_has(const struct request *r, enum request_field f) { return r->given >> f & 1; }

// resolve's part for classes: the id of a label (exact, then synonym), or -1 with 422. param: "classes[3]".
int label_find(const struct model_desc *, const char *label, const char *param, int *id, struct http_error *);

#endif
