// SPDX-License-Identifier: MIT
#include "server/metrics.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "server/cmd.h"
#include "server/routes.h"
#include "server/server.h"
#include "server/text.h"

static const double bounds[METRICS_BOUNDS] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60};
static const int codes[METRICS_CODES - 1] = {200, 202, 204, 304, 400, 404, 405, 406, 408, 409,
                                             410, 413, 415, 422, 429, 431, 499, 500, 503, 504};
static const char *const phase_names[] = {"queue", "denoise", "decode", "encode"};
static const char *const outcome_names[] = {"done", "failed", "cancelled"};
static const char *const stage_names[] = {"queued", "running", "encoding"};
static const char *const reason_names[] = {"queue_full", "loading", "draining", "device", "invalid", "too_large", "slow"};

static void observe(struct histogram *h, double seconds) {
    int i = 0;
    while (i < METRICS_BOUNDS && seconds > bounds[i]) i++;
    h->buckets[i]++;
    h->count++;
    h->sum += seconds;
}

void metrics_request(struct metrics *m, int route, int code, double seconds) {
    int i = 0;
    while (i < METRICS_CODES - 1 && codes[i] != code) i++;
    m->requests[route][i]++;
    observe(&m->duration[route], seconds);
}

void metrics_phase(struct metrics *m, enum phase phase, double seconds) { observe(&m->phases[phase], seconds); }

void metrics_images(struct metrics *m, const char *model, enum outcome outcome, uint64_t n) {
    for (int i = 0; i < METRICS_MODELS; i++) {
        if (!m->models[i].name[0]) snprintf(m->models[i].name, sizeof m->models[i].name, "%s", model);
        if (strcmp(m->models[i].name, model) != 0) continue;
        m->models[i].images[outcome] += n;
        return;
    }
}

static void head(struct text *t, const char *name, const char *type, const char *help) {
    text_printf(t, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void single(struct text *t, const char *name, const char *type, const char *help, double value) {
    head(t, name, type, help);
    text_printf(t, "%s %.15g\n", name, value);
}

// A label's value with the three characters escaped that the format knows.
static void label(struct text *t, const char *value) {
    for (; *value; value++) {
        if (*value == '\n') text_add(t, "\\n", 2);
        else {
            if (*value == '"' || *value == '\\') text_add(t, "\\", 1);
            text_add(t, value, 1);
        }
    }
}

// labels: `route="/healthz"` or "".
static void histogram(struct text *t, const char *name, const char *labels, const struct histogram *h) {
    const char *comma = *labels ? "," : "";
    uint64_t sum = 0;
    for (int i = 0; i < METRICS_BOUNDS; i++)
        text_printf(t, "%s_bucket{%s%sle=\"%g\"} %llu\n", name, labels, comma, bounds[i],
                    (unsigned long long)(sum += h->buckets[i]));
    text_printf(t, "%s_bucket{%s%sle=\"+Inf\"} %llu\n", name, labels, comma, (unsigned long long)h->count);
    text_printf(t, "%s_sum%s%s%s %.9g\n", name, *labels ? "{" : "", labels, *labels ? "}" : "", h->sum);
    text_printf(t, "%s_count%s%s%s %llu\n", name, *labels ? "{" : "", labels, *labels ? "}" : "", (unsigned long long)h->count);
}

static void counters(struct text *t, const char *name, const char *help, const char *key, const char *const *values,
                     const uint64_t *n, int count) {
    head(t, name, "counter", help);
    for (int i = 0; i < count; i++) text_printf(t, "%s{%s=\"%s\"} %llu\n", name, key, values[i], (unsigned long long)n[i]);
}

static void put_requests(struct text *t, const struct metrics *m) {
    const char *name;
    head(t, "sitd_requests_total", "counter", "Requests answered, by route and status code; 499: the client left.");
    for (int r = 0; r < METRICS_ROUTES && (name = routes_name(r)); r++)
        for (int c = 0; c < METRICS_CODES; c++) {
            if (!m->requests[r][c]) continue;
            text_printf(t, "sitd_requests_total{route=\"%s\",code=\"", name);
            if (c < METRICS_CODES - 1) text_printf(t, "%d", codes[c]);
            else text_printf(t, "other");
            text_printf(t, "\"} %llu\n", (unsigned long long)m->requests[r][c]);
        }
    head(t, "sitd_request_duration_seconds", "histogram", "From a request's head to the last byte of its answer.");
    for (int r = 0; r < METRICS_ROUTES && (name = routes_name(r)); r++) {
        char labels[96];
        snprintf(labels, sizeof labels, "route=\"%s\"", name);
        if (m->duration[r].count) histogram(t, "sitd_request_duration_seconds", labels, &m->duration[r]);
    }
}

static void put_images(struct text *t, const struct metrics *m) {
    head(t, "sitd_images_total", "counter", "Images asked for, by what became of them.");
    for (int i = 0; i < METRICS_MODELS && m->models[i].name[0]; i++)
        for (int o = 0; o < OUTCOME_COUNT; o++) {
            text_printf(t, "sitd_images_total{model=\"");
            label(t, m->models[i].name);
            text_printf(t, "\",outcome=\"%s\"} %llu\n", outcome_names[o], (unsigned long long)m->models[i].images[o]);
        }
    head(t, "sitd_phase_duration_seconds", "histogram", "Parts of a sampling request.");
    for (int p = 0; p < PHASE_COUNT; p++) {
        char labels[32];
        snprintf(labels, sizeof labels, "phase=\"%s\"", phase_names[p]);
        histogram(t, "sitd_phase_duration_seconds", labels, &m->phases[p]);
    }
    head(t, "sitd_queue_wait_seconds", "histogram", "From a job's arrival to its first image's start.");
    histogram(t, "sitd_queue_wait_seconds", "", &m->phases[PHASE_QUEUE]);
}

// What the scheduler counted. Batches have exact sizes up to 31 rows and one class above; their rows add up to the evaluations.
static void put_engine(struct text *t, const struct engine_stats *st) {
    static const int rows[] = {1, 2, 4, 6, 8, 12, 16, 24, 31};
    single(t, "sitd_queue_depth", "gauge", "Images that wait for a slot.", st->queued_images);
    single(t, "sitd_jobs", "gauge", "Jobs that wait or run.", st->jobs);
    single(t, "sitd_images_running", "gauge", "Images in the making.", st->running_images);
    single(t, "sitd_rows_running", "gauge", "Rows reserved by images in the making.", st->running_rows);
    single(t, "sitd_rows_max", "gauge", "Rows of the largest batch.", st->max_rows);
    head(t, "sitd_batch_rows", "histogram", "Rows of each batch.");
    uint64_t sum = 0;
    for (size_t b = 0, i = 0; b < sizeof rows / sizeof *rows; b++) {
        for (; i <= (size_t)rows[b]; i++) sum += st->batch_rows[i];
        text_printf(t, "sitd_batch_rows_bucket{le=\"%d\"} %llu\n", rows[b], (unsigned long long)sum);
    }
    sum += st->batch_rows[32];
    text_printf(t, "sitd_batch_rows_bucket{le=\"+Inf\"} %llu\nsitd_batch_rows_sum %llu\nsitd_batch_rows_count %llu\n",
                (unsigned long long)sum, (unsigned long long)st->evaluations, (unsigned long long)sum);
    head(t, "sitd_steps_total", "counter", "Solver evaluations of images, by sampler type.");
    for (int i = 0; i < SAMPLER_TYPE_COUNT; i++)
        text_printf(t, "sitd_steps_total{sampler=\"%s\"} %llu\n", sampler_type_name(i), (unsigned long long)st->steps[i]);
    single(t, "sitd_model_evaluations_total", "counter", "Network rows evaluated.", (double)st->evaluations);
    single(t, "sitd_device_busy_seconds_total", "counter", "Time that the devices spent in steps.", st->busy_seconds);
    single(t, "sitd_residual_overflows_total", "counter", "Numbers of residual streams that float16 did not hold.", (double)st->overflows);
    single(t, "sitd_device_ok", "gauge", "0 after the failure of the last device.", st->device_ok);
    head(t, "sitd_devices", "gauge", "Devices, by what they do.");
    text_printf(t, "sitd_devices{state=\"works\"} %d\nsitd_devices{state=\"failed\"} %d\n", st->devices - st->devices_failed,
                st->devices_failed);
    single(t, "sitd_jobs_moved_total", "counter", "Jobs that went on on another device after theirs had failed.", (double)st->jobs_moved);
    head(t, "sitd_device_memory_bytes", "gauge", "Memory that models and their buffers hold.");
    text_printf(t, "sitd_device_memory_bytes{kind=\"models\"} %zu\n", st->device_bytes);
    single(t, "sitd_models_ready", "gauge", "Models that can be asked for.", st->models_ready);
    single(t, "sitd_models_loading", "gauge", "Models being loaded.", st->models_loading);
}

static void put_models(struct text *t, struct engine *engine) {
    char names[METRICS_MODELS][64];
    int n = engine_model_names(engine, names, METRICS_MODELS);
    head(t, "sitd_model_info", "gauge", "Models that are served.");
    for (int i = 0; i < n; i++) {
        const struct engine_model *m = engine_model_ref(engine, names[i]);
        if (!m) continue;
        text_printf(t, "sitd_model_info{model=\"");
        label(t, m->name);
        text_printf(t, "\",version=\"%lld\",digest=\"%s\"} 1\n", (long long)m->desc.step, m->digest);
        engine_model_unref(m);
    }
}

static int open_files(void) {
    DIR *d = opendir("/proc/self/fd");
    int n = 0;
    if (!d) return -1;
    while (readdir(d)) n++;
    closedir(d);
    return n - 3; // ".", ".." and the folder itself
}

// procfs answers from memory: these reads do not wait for a disk.
static void put_process(struct text *t, int64_t started) {
    struct rusage u;
    struct rlimit files = {0};
    long pages[2] = {0};
    getrusage(RUSAGE_SELF, &u);
    getrlimit(RLIMIT_NOFILE, &files);
    FILE *f = fopen("/proc/self/statm", "re");
    if (f) {
        if (fscanf(f, "%ld %ld", &pages[0], &pages[1]) != 2) pages[0] = pages[1] = 0;
        fclose(f);
    }
    double cpu = (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
    long page = sysconf(_SC_PAGESIZE);
    single(t, "process_cpu_seconds_total", "counter", "Processor time, user and system.", cpu);
    single(t, "process_resident_memory_bytes", "gauge", "Resident memory.", (double)(pages[1] * page));
    single(t, "process_virtual_memory_bytes", "gauge", "Virtual memory.", (double)(pages[0] * page));
    single(t, "process_open_fds", "gauge", "Open file descriptors.", open_files());
    single(t, "process_max_fds", "gauge", "Limit of open file descriptors.", (double)files.rlim_cur);
    single(t, "process_start_time_seconds", "gauge", "Start, unix time.", (double)started);
}

char *metrics_text(struct server *s, size_t *n) {
    static const char *const results[] = {"failed", "succeeded"};
    struct text t = {0};
    struct metrics *m = &s->metrics;
    struct engine_stats st = {0};
    engine_stats(s->engine, &st);
    put_requests(&t, m);
    put_images(&t, m);
    put_engine(&t, &st);
    put_models(&t, s->engine);
    counters(&t, "sitd_rejected_total", "Requests refused, by reason.", "reason", reason_names, m->rejected, REJECT_COUNT);
    counters(&t, "sitd_cancelled_total", "Jobs ended early because the client left, by how far they were.", "stage", stage_names,
             m->cancelled, CANCEL_STAGES);
    counters(&t, "sitd_model_reloads_total", "Model loads, the first ones too.", "result", results, m->loads, 2);
    single(&t, "sitd_connections", "gauge", "Open connections.", s->n_conns);
    single(&t, "sitd_requests_active", "gauge", "Requests without a complete answer.", s->n_exchanges);
    single(&t, "sitd_ready", "gauge", "1 when /readyz says 200.", !server_unready(s));
    single(&t, "sitd_draining", "gauge", "1 after SIGTERM.", s->stage != SERVING);
    head(&t, "sitd_build_info", "gauge", "This build.");
    text_printf(&t, "sitd_build_info{version=\"%s\",commit=\"%s\"} 1\n", sitd_version, sitd_commit);
    put_process(&t, s->started_unix);
    return text_take(&t, n);
}
