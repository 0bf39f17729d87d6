// SPDX-License-Identifier: MIT
/*
 * Requests that must be refused, one folder each: tests/bad/request/<case>/input holds the body's bytes, .../error one line
 * "STATUS PARAM TEXT": the HTTP status, the field that the answer names ("-" for none) and a piece of the message. A new case
 * needs no C. The model is a SiT; of cases that begin with dit- or maskdit- one of that family.
 */
#include <dirent.h>

#include "core/base/mem.h"
#include "proto/request.h"
#include "tests/test.h"
#include "tests/unit/test_request_model.h"

#define FOLDER "tests/bad/request"

static size_t slurp(const char *name, const char *file, char *bytes, size_t size) {
    char path[600];
    snprintf(path, sizeof path, FOLDER "/%s/%s", name, file);
    FILE *f = fopen(path, "rb");
    if (!f) test_fail(__FILE__, __LINE__, "%s cannot be opened", path);
    size_t n = fread(bytes, 1, size, f);
    fclose(f);
    if (n == size) test_fail(__FILE__, __LINE__, "%s is too long", path);
    bytes[n] = 0;
    return n;
}

// What the daemon does with the body; 0 when it was taken.
static int judge(const char *body, size_t len, const struct engine_model *m, struct http_error *e) {
    struct request *r;
    struct resolved out;
    int rc = request_parse(&r, body, len, e);
    if (rc < 0) return rc;
    rc = request_resolve(&out, r, m, 1, e);
    if (rc == 0) resolved_deinit(&out);
    request_free(r);
    return rc;
}

// By the beginning of a case's name: dit-, maskdit-; else a SiT.
static void model_of_case(struct engine_model *m, const char *name) {
    fake_family(m, strncmp(name, "dit-", 4) == 0 ? MODEL_DISCRETE : strncmp(name, "maskdit-", 8) == 0 ? MODEL_EDM : MODEL_PATH);
}

static bool refused_as_said(const char *name) {
    static char body[1 << 16], want[1024];
    struct http_error e = {0};
    char param[128] = "";
    int status = 0, at = 0;
    struct engine_model m;
    model_of_case(&m, name);
    size_t len = slurp(name, "input", body, sizeof body);
    slurp(name, "error", want, sizeof want);
    want[strcspn(want, "\n")] = 0;
    if (sscanf(want, "%d %127s %n", &status, param, &at) != 2 || at == 0)
        test_fail(__FILE__, __LINE__, "%s: error is not STATUS PARAM TEXT", name);
    char *exact = mem_dup(body, len ? len : 1); // no byte behind the body: AddressSanitizer sees any step too far
    int rc = judge(exact, len, &m, &e);
    mem_free(exact);
    bool ok = rc == -1 && e.status == status && strcmp(e.param, strcmp(param, "-") == 0 ? "" : param) == 0 &&
              strstr(e.message, want + at);
    if (!ok) printf("    %s: wanted %s\n        got %d %s %s\n", name, want, rc == 0 ? 0 : e.status, e.param, e.message);
    char *json = http_error_json(&e);
    ok = ok && json && e.code[0] && e.type[0];
    mem_free(json);
    return ok;
}

// The examples of the contract: each is taken, and its normalised form too.
TEST(request_examples_are_taken) {
    static char body[1 << 16];
    struct engine_model m;
    DIR *dir = opendir("proto/examples");
    CHECK(dir != NULL);
    int taken = 0;
    for (struct dirent *d; (d = readdir(dir));) {
        char path[600];
        struct http_error e;
        if (!strstr(d->d_name, ".json")) continue;
        snprintf(path, sizeof path, "proto/examples/%s", d->d_name);
        FILE *f = fopen(path, "rb");
        CHECK(f != NULL);
        size_t len = fread(body, 1, sizeof body, f);
        fclose(f);
        model_of_case(&m, d->d_name);
        if (judge(body, len, &m, &e) < 0) test_fail(__FILE__, __LINE__, "%s: %d %s", path, e.status, e.message);
        taken++;
    }
    closedir(dir);
    CHECK(taken >= 8);
}

TEST(request_bad_folders) {
    DIR *dir = opendir(FOLDER);
    int cases = 0, wrong = 0;
    CHECK(dir != NULL);
    for (struct dirent *d; (d = readdir(dir));)
        if (d->d_name[0] != '.') cases++, wrong += !refused_as_said(d->d_name);
    closedir(dir);
    printf("    %d cases\n", cases);
    CHECK(cases > 60 && wrong == 0);
}

// The same bodies cut short at every length, and with every byte flipped: an answer each time, whatever it is.
TEST(request_cut_and_flipped) {
    const char *body = "{\"model\":\"fashion-sit\",\"classes\":[9,\"sandal\",null],\"seed\":\"7\",\"sampler\":{\"type\":\"sde\","
                       "\"w_t\":\"sigma\",\"w_t_scale\":1.5e-1},"
                       "\"guidance\":{\"scale\":3.0,\"interval\":[0.0,1]},\"output\":{\"compression\":1}}";
    struct engine_model m;
    struct http_error e;
    size_t len = strlen(body);
    fake_model(&m, true, true);
    CHECK(judge(body, len, &m, &e) == 0);
    for (size_t n = 0; n < len; n++) {
        char *cut = mem_dup(body, n ? n : 1);
        CHECK(judge(cut, n, &m, &e) == -1 && e.status == 400);
        mem_free(cut);
    }
    for (size_t i = 0; i < 8 * len; i++) {
        char *flipped = mem_dup(body, len);
        flipped[i / 8] ^= (char)(1 << i % 8);
        int rc = judge(flipped, len, &m, &e);
        CHECK(rc == 0 || e.status == 400 || e.status == 422 || e.status == 404);
        mem_free(flipped);
    }
}
