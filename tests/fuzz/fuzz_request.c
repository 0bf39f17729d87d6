// SPDX-License-Identifier: MIT
/*
 * Bodies of POST /v1/samples: parse, resolve against two fixed models, write the normalised request of the first and the last
 * image, take that again, and demand the same job. An error must have a 4xx status, a code, a type and a JSON form.
 */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "proto/request.h"
#include "tests/unit/test_request_model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define DEMAND(cond)                                                                                                             \
    do {                                                                                                                         \
        if (!(cond)) __builtin_trap();                                                                                           \
    } while (0)

static void check_error(const struct http_error *e) {
    DEMAND(e->status == 400 || e->status == 404 || e->status == 413 || e->status == 422);
    DEMAND(e->code[0] && e->type[0] && e->message[0]);
    char *text = http_error_json(e);
    json_t *root = text ? json_loads(text, JSON_REJECT_DUPLICATES, NULL) : NULL;
    DEMAND(root);
    json_decref(root);
    mem_free(text);
}

static void check_again(const struct resolved *first, const struct engine_model *m, int i) {
    struct request *r;
    struct resolved second;
    struct http_error e;
    char *text = request_normalised(first, m, i);
    DEMAND(text && request_parse(&r, text, strlen(text), &e) == 0 && request_resolve(&second, r, m, 7, &e) == 0);
    char *again = request_normalised(&second, m, 0);
    const struct engine_job *a = &first->job, *b = &second.job;
    DEMAND(again && strcmp(text, again) == 0);
    DEMAND(b->n == 1 && b->classes[0] == a->classes[i] && b->seed == a->seed && b->seed_index == a->seed_index + (uint32_t)i);
    DEMAND(a->sampler.type == b->sampler.type && a->sampler.method == b->sampler.method &&
           a->sampler.guidance == b->sampler.guidance);
    DEMAND(sampler_evaluations(&a->sampler, &m->sampler) == sampler_evaluations(&b->sampler, &m->sampler));
    mem_free(again);
    mem_free(text);
    resolved_deinit(&second);
    request_free(r);
}

static void try_model(const struct request *r, const struct engine_model *m) {
    struct resolved out;
    struct http_error e;
    if (request_resolve(&out, r, m, 1234567, &e) < 0) {
        check_error(&e);
        return;
    }
    DEMAND(out.job.n >= 1 && out.job.n <= REQUEST_MAX_IMAGES && out.n_notes <= 8);
    for (int i = 0; i < out.job.n; i++) DEMAND(out.job.classes[i] >= -1 && out.job.classes[i] < m->desc.arch.num_classes);
    check_again(&out, m, 0);
    check_again(&out, m, out.job.n - 1);
    resolved_deinit(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct request *r;
    struct http_error e;
    struct engine_model m;
    if (request_parse(&r, (const char *)data, size, &e) < 0) {
        check_error(&e);
        return 0;
    }
    fake_model(&m, true, true);
    try_model(r, &m);
    fake_model(&m, false, false);
    m.sampler = (struct sampler_model){.path = PATH_VP, .prediction = PRED_SCORE};
    m.sampler.loss = (struct sampler_curve){2, {0, 1}, {1.5, 0.5}};
    try_model(r, &m);
    fake_family(&m, MODEL_DISCRETE);
    try_model(r, &m);
    fake_family(&m, MODEL_EDM);
    try_model(r, &m);
    request_free(r);
    return 0;
}
