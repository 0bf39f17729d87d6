// SPDX-License-Identifier: MIT
/*
 * Malformed files by folder: tests/bad/<format>/<case>/input must be refused, and each line of `error` must be found in "STATUS
 * [param] text". tests/bad/make.py writes most of them; a case can be added by hand. The seeds of the fuzz targets are run
 * through the same parsers: good ones too, so only a crash can fail there.
 */
#include <dirent.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/io/file.h"
#include "tests/test.h"

typedef int parser(const void *bytes, size_t n, struct err *);

static int parse_checkpoint(const void *bytes, size_t n, struct err *e) {
    struct checkpoint c;
    int rc = checkpoint_parse(&c, bytes, n, "input", e);
    if (rc == OK) checkpoint_close(&c);
    return rc;
}

static int parse_model_json(const void *bytes, size_t n, struct err *e) {
    struct model_desc d;
    int rc = model_desc_parse(&d, bytes, n, e);
    if (rc == OK) model_desc_deinit(&d);
    return rc;
}

// The parser gets a block of exactly n bytes, so that the address sanitizer sees a read behind its end.
static int run(parser *parse, const char *path, struct err *e) {
    void *file;
    size_t n;
    struct err io = {0};
    CHECK_OK(file_read(&file, &n, path, 1 << 26, &io), &io);
    char *exact = malloc(n ? n : 1);
    memcpy(exact, file, n);
    mem_free(file);
    int rc = parse(exact, n, e);
    free(exact);
    return rc;
}

static bool as_expected(const char *folder, const struct err *e) {
    char path[600], got[800], line[200];
    bool ok = true;
    snprintf(path, sizeof path, "%s/error", folder);
    snprintf(got, sizeof got, "%s [%s] %s", status_name(e->status), e->param, e->text);
    FILE *f = fopen(path, "r");
    if (!f) test_fail(__FILE__, __LINE__, "%s is missing", path);
    for (int lines = 0; fgets(line, sizeof line, f) || !lines; lines++) {
        line[strcspn(line, "\n")] = 0;
        if (line[0] && strstr(got, line)) continue;
        printf("    %s: expected '%s' in: %s\n", folder, line, got);
        ok = false;
    }
    fclose(f);
    return ok;
}

static int run_folder(const char *root, parser *parse, bool seeds) {
    struct dirent *d;
    DIR *dir = opendir(root);
    int cases = 0, failed = 0;
    if (!dir) test_fail(__FILE__, __LINE__, "%s is missing", root);
    while ((d = readdir(dir))) {
        char folder[512], input[600];
        struct err e = {0};
        if (d->d_name[0] == '.') continue;
        snprintf(folder, sizeof folder, "%s/%s", root, d->d_name);
        snprintf(input, sizeof input, seeds ? "%s" : "%s/input", folder);
        int rc = run(parse, input, &e);
        cases++;
        CHECK(rc == e.status);
        for (const char *c = e.text; *c; c++) CHECK((unsigned char)*c >= 0x20); // one line, fit for a log
        if (seeds && strncmp(d->d_name, "good", 4) != 0) continue;
        bool ok = seeds ? rc == OK : rc != OK && as_expected(folder, &e);
        if (!ok && (rc == OK || seeds)) printf("    %s: %s %s\n", folder, status_name(rc), e.text);
        failed += !ok;
    }
    closedir(dir);
    if (failed) test_fail(__FILE__, __LINE__, "%d of %d cases of %s", failed, cases, root);
    return cases;
}

TEST(bad_safetensors) { CHECK(run_folder("tests/bad/safetensors", parse_checkpoint, false) >= 40); }
TEST(bad_pt) { CHECK(run_folder("tests/bad/pt", parse_checkpoint, false) >= 80); }
TEST(bad_model_json) { CHECK(run_folder("tests/bad/model_json", parse_model_json, false) >= 70); }
TEST(seeds_safetensors) { CHECK(run_folder("tests/fuzz/corpus/safetensors", parse_checkpoint, true) > 0); }
TEST(seeds_pt) { CHECK(run_folder("tests/fuzz/corpus/pt", parse_checkpoint, true) > 0); }
TEST(seeds_model_json) { CHECK(run_folder("tests/fuzz/corpus/model_json", parse_model_json, true) > 0); }

// The golden checkpoints cut short at every kind of place: never a crash, always an error.
static void cut_everywhere(const char *path, size_t step) {
    void *file;
    size_t n;
    struct err e = {0};
    CHECK_OK(file_read(&file, &n, path, 1 << 24, &e), &e);
    for (size_t cut = 0; cut < n; cut += cut < 256 || n - cut < 256 ? 1 : step) {
        char *exact = malloc(cut ? cut : 1);
        memcpy(exact, file, cut);
        err_clear(&e);
        CHECK(parse_checkpoint(exact, cut, &e) != OK && e.text[0]);
        free(exact);
    }
    mem_free(file);
}

TEST_LIMIT(cut_safetensors, 120) { cut_everywhere("tests/golden/sit-tiny.safetensors", 4999); }
TEST_LIMIT(cut_pt, 120) { cut_everywhere("tests/golden/sit-tiny-bf16-bare.pt", 2503); }

// Single flipped bits of header, directory and pickle: any answer, no crash.
static void flip(const char *path, size_t from, size_t to) {
    void *file;
    size_t n;
    struct err e = {0};
    CHECK_OK(file_read(&file, &n, path, 1 << 24, &e), &e);
    char *exact = malloc(n);
    memcpy(exact, file, n);
    mem_free(file);
    for (size_t at = from; at < to && at < n; at++) {
        exact[at] ^= (char)(1 << at % 8);
        err_clear(&e);
        parse_checkpoint(exact, n, &e);
        exact[at] ^= (char)(1 << at % 8);
    }
    free(exact);
}

TEST_LIMIT(flip_safetensors, 120) { flip("tests/golden/sit-tiny.safetensors", 0, 1200); }
TEST_LIMIT(flip_pt_pickle, 120) { flip("tests/golden/sit-tiny-bf16-bare.pt", 0, 1500); }
TEST_LIMIT(flip_pt_directory, 120) { flip("tests/golden/sit-tiny-bf16-bare.pt", 374000, 376933); }
