// SPDX-License-Identifier: MIT
#include "tests/unit/serve_failure.h"

#include <arpa/inet.h>
#include <jansson.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "server/assets.h"
#include "server/server.h"
#include "tests/test.h"
#include "tests/unit/engine_fixture.h"

/* ---- the daemon ---- */

static struct config config;
static struct server server;
static struct listener listener;
static pthread_t loop;

static void *serve(void *code) {
    struct err e = {0};
    *(int *)code = server_run(&server, &config, &listener, &e);
    if (e.status) printf("    %s\n", e.text);
    return NULL;
}

static void start(const char *backend, const char *precision, int *code) { // as cmd_serve
    char models[256];
    struct err e = {0};
    bool usage;
    snprintf(models, sizeof models, "%s", fixture_dir());
    char *argv[] = {"serve", "--models", models, "--listen", "127.0.0.1:0", "--backend", (char *)backend, "--precision", (char *)precision,
                    "--max-rows", "8", "--threads", "1", "--cache", "none"};
    CHECK_OK(config_load(&config, (int)(sizeof argv / sizeof *argv), argv, &usage, &e), &e);
    CHECK_OK(listen_open(&listener, config.listen, &e), &e);
    signal(SIGPIPE, SIG_IGN);
    assets_init();
    CHECK(pthread_create(&loop, NULL, serve, code) == 0);
}

/* ---- its clients ---- */

struct reply {
    int status;
    char text[1 << 18], *body; // head and body
};

static int ask(const char *method, const char *path, const char *body) { // the socket on which the answer will come
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    char text[1024];
    to.sin_port = htons((uint16_t)atoi(strrchr(listener.url, ':') + 1));
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0),
        n = snprintf(text, sizeof text, "%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n", method, path);
    n += body ? snprintf(text + n, sizeof text - (size_t)n, "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", strlen(body), body)
              : snprintf(text + n, sizeof text - (size_t)n, "\r\n");
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof to) == 0 && send(fd, text, (size_t)n, 0) == n);
    return fd;
}

static const struct reply *answer(int fd) {
    static struct reply r;
    size_t n = 0;
    for (ssize_t got; (got = recv(fd, r.text + n, sizeof r.text - 1 - n, 0)) != 0; n += (size_t)got) CHECK(got > 0);
    close(fd);
    r.text[n] = 0;
    CHECK(n < sizeof r.text - 1 && sscanf(r.text, "HTTP/1.1 %d ", &r.status) == 1 && (r.body = strstr(r.text, "\r\n\r\n")));
    r.body += 4;
    return &r;
}

static const struct reply *get(const char *path) { return answer(ask("GET", path, NULL)); }

static double metric(const char *name) { // with its labels; all that are asked for are always there
    const char *at = get("/metrics")->body;
    size_t n = strlen(name);
    while (at && !(strncmp(at, name, n) == 0 && at[n] == ' ')) at = (at = strchr(at, '\n')) ? at + 1 : NULL;
    if (!at) test_fail(__FILE__, __LINE__, "/metrics has no %s", name);
    return atof(at + n);
}

static void wait_for(const char *name, double value) {
    while (metric(name) != value) nanosleep(&(struct timespec){0, 2000000}, NULL);
}

// The API's error body, whole: {"error": {message, type, param, code}}
static void check_error(const struct reply *r, int status, const char *code, const char *type) {
    json_t *root = json_loads(r->body, 0, NULL), *error = json_object_get(root, "error");
    const char *said = json_string_value(json_object_get(error, "code")), *kind = json_string_value(json_object_get(error, "type")),
               *message = json_string_value(json_object_get(error, "message"));
    if (r->status != status || !said || strcmp(said, code) != 0 || !kind || strcmp(kind, type) != 0 || !message || !message[0] ||
        !json_is_null(json_object_get(error, "param")) || json_object_size(error) != 4 || json_object_size(root) != 1)
        test_fail(__FILE__, __LINE__, "not %d %s: %s", status, code, r->text);
    CHECK(status != 503 || strstr(r->text, "\r\nRetry-After: "));
    json_decref(root);
}

void serve_failure(const char *backend, const char *precision, void (*break_device)(void)) {
    static const char *const sample = "{\"model\": \"a\", \"class\": 3, \"n\": 8, \"seed\": 1, \"sampler\": {\"type\": \"ode\", \"method\": \"rk4\", \"steps\": 10000}}";
    int code = -1;
    fixture_model(&(struct tiny){.name = "a"});
    start(backend, precision, &code);
    wait_for("sitd_ready", 1);
    CHECK(get("/readyz")->status == 200 && get("/v2/models/a/ready")->status == 200);
    CHECK(metric("sitd_devices{state=\"works\"}") == 1 && metric("sitd_devices{state=\"failed\"}") == 0);
    int runs = ask("POST", "/v1/samples", sample);
    wait_for("sitd_images_running", 8);
    int waits = ask("POST", "/v1/samples", sample);
    wait_for("sitd_queue_depth", 8);
    break_device();
    check_error(answer(runs), 503, "device_failed", "unavailable_error");
    check_error(answer(waits), 503, "device_failed", "unavailable_error");
    check_error(get("/readyz"), 503, "device_failed", "unavailable_error");
    check_error(get("/v2/health/ready"), 503, "device_failed", "unavailable_error");
    check_error(get("/v2/models/a/ready"), 503, "device_failed", "unavailable_error");
    CHECK(get("/healthz")->status == 200 && strcmp(get("/healthz")->body, "{\"status\":\"live\"}") == 0); // the loop turns
    CHECK(metric("sitd_devices{state=\"works\"}") == 0 && metric("sitd_devices{state=\"failed\"}") == 1);
    CHECK(metric("sitd_device_ok") == 0 && metric("sitd_ready") == 0 && metric("sitd_jobs") == 0);
    CHECK(metric("sitd_images_total{model=\"a\",outcome=\"failed\"}") == 16);
    check_error(answer(ask("POST", "/v1/samples", sample)), 503, "device_failed", "unavailable_error");
    CHECK(metric("sitd_rejected_total{reason=\"device\"}") == 1);
    CHECK(kill(getpid(), SIGTERM) == 0 && pthread_join(loop, NULL) == 0);
    CHECK(code == 0);
}
