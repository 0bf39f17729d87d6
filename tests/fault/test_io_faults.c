// SPDX-License-Identifier: MIT
/*
 * Each call of core/io is repeated with its 1st, 2nd, ... allocation, read or write failing until it passes: a status and a text
 * every time, no crash, and (under the address sanitizer) no leak. jansson's and libpng's allocations are among them.
 */
#include <dirent.h>
#include <sys/stat.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/io/file.h"
#include "core/io/import.h"
#include "core/io/model_publish.h"
#include "core/io/png.h"
#include "tests/test.h"

static char dir[64];

typedef int action(struct err *);

// Returns how many failures were tried. `allowed`: the status that such a failure must give (E_IO and E_NOMEM never stand for
// each other).
static long fail_each(action *act, enum fault_kind kind, int allowed, bool for_ever) {
    for (long n = 1; n < 100000; n += n < 400 ? 1 : 11) { // a publication makes 1700 allocations, most of them alike
        struct err e = {0};
        fault_arm(kind, n, for_ever);
        int rc = act(&e);
        long hits = fault_count(kind);
        fault_disarm();
        if (hits < n) { // it never came to the n-th
            CHECK_OK(rc, &e);
            return hits;
        }
        if (rc == OK) continue; // a failure that may be survived (a digest of an old file)
        if (rc != allowed || e.status != rc || !e.text[0])
            test_fail(__FILE__, __LINE__, "failure %ld of kind %d gave %d '%s'", n, kind, rc, e.text);
    }
    test_fail(__FILE__, __LINE__, "did not end");
}

static void each(action *act, enum fault_kind kind, int allowed, long least) {
    CHECK(act(&(struct err){0}) == OK);
    CHECK(fail_each(act, kind, allowed, false) >= least);
    CHECK(fail_each(act, kind, allowed, true) >= least);
}

static int open_pt(struct err *e) {
    struct checkpoint c;
    int rc = checkpoint_open(&c, "tests/fuzz/corpus/pt/good-protocol-4", e);
    if (rc == OK) checkpoint_close(&c);
    return rc;
}

static int open_safetensors(struct err *e) {
    struct checkpoint c;
    int rc = checkpoint_open(&c, "tests/fuzz/corpus/safetensors/good", e);
    if (rc == OK) checkpoint_close(&c);
    return rc;
}

static int parse_json(struct err *e) {
    void *text;
    size_t n;
    struct model_desc d;
    int rc = file_read(&text, &n, "tests/fuzz/corpus/model_json/good", 1 << 20, e);
    if (rc != OK) return rc;
    rc = model_desc_parse(&d, text, n, e);
    if (rc == OK) {
        char *again = model_desc_dump(&d, e);
        rc = again ? OK : E_NOMEM;
        mem_free(again);
        model_desc_deinit(&d);
    }
    mem_free(text);
    return rc;
}

static int publish(struct err *e) { // import, convert, write, open
    struct checkpoint c;
    struct model_desc d;
    struct model_dir m;
    struct import_table it;
    struct import_fact facts[IMPORT_FACTS];
    struct import_flags flags = {.family = "sit", .path = "linear", .prediction = "velocity", .heads = 2, .step = 5};
    int n, rc = checkpoint_open(&c, "tests/golden/sit-tiny-bf16-bare.pt", e);
    if (rc != OK) return rc;
    rc = import_describe(&d, facts, &n, &c, &flags, e);
    if (rc == OK) rc = model_desc_labels(&d, "a,b\nc\nd\ne\nf\ng\nh\ni\nj\nk", 21, e);
    if (rc == OK && (rc = import_convert(&it, &c.table, DT_F16, e)) == OK) {
        rc = model_publish(dir, &d, &it.table, e);
        import_free(&it);
    }
    model_desc_deinit(&d);
    checkpoint_close(&c);
    if (rc == OK && (rc = model_dir_open(&m, dir, e)) == OK) model_dir_close(&m);
    return rc;
}

static int png(struct err *e) {
    uint8_t pixels[64 * 64 * 3], *file, *back;
    struct png_text text = {"sitd", "value"};
    char *found;
    size_t n;
    int w, h, c;
    for (size_t i = 0; i < sizeof pixels; i++) pixels[i] = (uint8_t)(i * i >> 4);
    int rc = png_encode(&file, &n, pixels, 64, 64, 3, 1, &text, 1, e);
    if (rc != OK) return rc;
    rc = png_decode(&back, &w, &h, &c, file, n, "sitd", &found, e);
    mem_free(file);
    mem_free(back);
    mem_free(found);
    return rc;
}

static void make_dir(void) {
    snprintf(dir, sizeof dir, "/tmp/sitd-fault-XXXXXX");
    CHECK(mkdtemp(dir));
}

static int leftovers(void) { // temporary files that a failure forgot
    struct dirent *d;
    int n = 0;
    DIR *at = opendir(dir);
    while ((d = readdir(at))) n += strstr(d->d_name, ".tmp-") != NULL;
    closedir(at);
    return n;
}

static void remove_dir(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", dir);
    CHECK(system(command) == 0);
}

TEST(fault_pt_alloc) { each(open_pt, FAULT_ALLOC, E_NOMEM, 20); }
TEST(fault_pt_read) { each(open_pt, FAULT_READ, E_IO, 2); }
TEST(fault_safetensors_alloc) { each(open_safetensors, FAULT_ALLOC, E_NOMEM, 20); }
TEST(fault_model_json_alloc) { each(parse_json, FAULT_ALLOC, E_NOMEM, 50); }
TEST(fault_png_alloc) { each(png, FAULT_ALLOC, E_NOMEM, 8); }

TEST_LIMIT(fault_publish_alloc, 180) {
    make_dir();
    each(publish, FAULT_ALLOC, E_NOMEM, 300);
    CHECK(leftovers() == 0);
    remove_dir();
}

TEST(fault_publish_write) { // a full disk at every write, sync and rename: the old model stays, nothing is left behind
    make_dir();
    each(publish, FAULT_WRITE, E_IO, 6);
    CHECK(leftovers() == 0);
    remove_dir();
}

TEST(fault_publish_read) {
    make_dir();
    each(publish, FAULT_READ, E_IO, 4);
    remove_dir();
}

// The third file system error is real: a directory that does not let us write.
TEST(fault_full_device) {
    struct err e = {0};
    CHECK(file_write("/dev/full/x", "a", 1, &e) != OK && strstr(e.text, "/dev/full/x"));
}
