// SPDX-License-Identifier: MIT
#include "server/routes.h"

#include <string.h>

#include "core/base/mem.h"
#include "proto/capabilities.h"
#include "proto/emit.h"
#include "server/admin.h"
#include "server/assets.h"
#include "server/cmd.h"
#include "server/jobs.h"
#include "server/negotiate.h"

static void answer_json_text(struct exchange *ex, int code, char *take) {
    http_answer_take(ex, code, "application/json", take, take ? strlen(take) : 0);
}

// {"status":"live"}: the loop turns.
static void run_live(struct exchange *ex) {
    struct emit e = {0};
    emit_open(&e, NULL, '{');
    emit_string(&e, "status", "live");
    emit_close(&e, '}');
    answer_json_text(ex, 200, emit_take(&e));
}

static void answer_ready(struct exchange *ex, const char *unready) {
    struct http_error err;
    struct emit e = {0};
    if (unready) {
        http_error_set(&err, 503, unready, NULL, "not ready: %s", unready);
        http_answer_error(ex, &err, 1000);
        return;
    }
    emit_open(&e, NULL, '{');
    emit_string(&e, "status", "ready");
    emit_close(&e, '}');
    answer_json_text(ex, 200, emit_take(&e));
}

static void run_ready(struct exchange *ex) { answer_ready(ex, server_unready(ex->server)); }

static void unknown_model(struct exchange *ex) {
    struct http_error e;
    http_error_set(&e, 404, "model_not_found", "model", "model \"%.100s\" is not served", ex->part);
    http_answer_error(ex, &e, 0);
}

static void run_model_ready(struct exchange *ex) {
    const struct engine_model *m = engine_model_ref(ex->server->engine, ex->part);
    if (!m && ex->server->was_ready) {
        unknown_model(ex);
        return;
    }
    if (m) engine_model_unref(m);
    const char *unready = server_unready(ex->server);
    bool others = m && unready && strcmp(unready, "loading") == 0; // this one is there already
    answer_ready(ex, others ? NULL : unready);
}

#define MODELS_MAX 256 // of a listing

// The ready models, sorted by name; returns how many. The caller unrefs each.
static int all_models(struct engine *engine, const struct engine_model **models) {
    char(*names)[64] = mem_array(MODELS_MAX, sizeof *names);
    int n = names ? engine_model_names(engine, names, MODELS_MAX) : 0, found = 0;
    for (int i = 0; i < n; i++)
        if ((models[found] = engine_model_ref(engine, names[i]))) found++;
    mem_free(names);
    return found;
}

static void unref_all(const struct engine_model **models, int n) {
    for (int i = 0; i < n; i++) engine_model_unref(models[i]);
}

static void run_models(struct exchange *ex) {
    const struct engine_model *models[MODELS_MAX];
    int n = all_models(ex->server->engine, models);
    answer_json_text(ex, 200, models_json(models, n, ex->server->started_unix));
    unref_all(models, n);
}

static void run_capabilities(struct exchange *ex) {
    const struct config *c = ex->server->config;
    const struct engine_model *models[MODELS_MAX];
    int n = all_models(ex->server->engine, models);
    int64_t images = c->max_images < REQUEST_MAX_IMAGES ? c->max_images : REQUEST_MAX_IMAGES;
    struct capabilities caps = {.version = sitd_version,
                                .device = engine_device(ex->server->engine),
                                .models = models,
                                .n_models = n,
                                .max_images = (int)images,
                                .max_rows = (int)c->max_rows,
                                .max_timeout_ms = c->max_timeout,
                                .max_body_bytes = (size_t)c->max_body};
    answer_json_text(ex, 200, capabilities_json(&caps));
    unref_all(models, n);
}

static void run_metrics(struct exchange *ex) {
    size_t n = 0;
    char *text = metrics_text(ex->server, &n);
    http_answer_take(ex, 200, "text/plain; version=0.0.4; charset=utf-8", text, n);
}

// The page's own files only; it speaks to this origin and shows PNGs from memory.
static void run_asset(struct exchange *ex) {
    const struct asset *a = asset_find(ex->path);
    if (!a) {
        struct http_error e;
        http_error_set(&e, 404, "not_found", NULL, "no such path: %.200s", ex->path);
        http_answer_error(ex, &e, 0);
        return;
    }
    bool same = etag_matches(MHD_lookup_connection_value(ex->mhd, MHD_HEADER_KIND, "If-None-Match"), a->etag);
    ex->bytes = same ? 0 : a->size;
    struct MHD_Response *r = MHD_create_response_from_buffer(ex->bytes, (void *)a->bytes, MHD_RESPMEM_PERSISTENT);
    if (r) {
        if (!same) http_header(r, "Content-Type", "%s", a->type);
        http_header(r, "ETag", "%s", a->etag);
        http_header(r, "Cache-Control", "no-cache");
        http_header(
            r, "Content-Security-Policy",
            "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'");
    }
    http_answer(ex, same ? 304 : 200, r);
}

static const struct route routes[] = {
    {"other", "", NULL}, // index 0 stands for unknown paths; it matches none, as paths begin with a slash
    {"/v1/samples", "POST", jobs_samples},
    {"/v1/models", "GET", run_models},
    {"/v1/capabilities", "GET", run_capabilities},
    {"/healthz", "GET", run_live},
    {"/readyz", "GET", run_ready},
    {"/v2/health/live", "GET", run_live},
    {"/v2/health/ready", "GET", run_ready},
    {"/v2/models/{}/ready", "GET", run_model_ready},
    {"/v2/repository/index", "GET", admin_index},
    {"/v2/repository/models/{}/load", "POST", admin_load},
    {"/metrics", "GET", run_metrics},
    {"/openapi.json", "GET", run_asset},
    {"/", "GET", run_asset},
    {"/{}", "GET", run_asset}, // the page's other files
};
#define N_ROUTES (sizeof routes / sizeof *routes)
_Static_assert(N_ROUTES <= METRICS_ROUTES, "metrics have a row per route");

static bool matches(const char *pattern, const char *path, const char **part, size_t *part_len) {
    const char *hole = strstr(pattern, "{}");
    if (!hole) return !strcmp(pattern, path);
    size_t before = (size_t)(hole - pattern);
    if (strncmp(pattern, path, before) != 0) return false;
    *part = path + before;
    *part_len = strcspn(*part, "/");
    return *part_len && !strcmp(*part + *part_len, hole + 2);
}

const struct route *routes_find(const char *path, const char **part, size_t *part_len) {
    for (size_t i = 1; i < N_ROUTES; i++) {
        *part = NULL;
        if (!matches(routes[i].path, path, part, part_len)) continue;
        return routes[i].run == run_asset && !asset_find(path) ? NULL : &routes[i];
    }
    *part = NULL;
    return NULL;
}

int routes_index(const struct route *r) { return r ? (int)(r - routes) : 0; }

const char *routes_name(int index) { return index < (int)N_ROUTES ? routes[index].path : NULL; }
