// SPDX-License-Identifier: MIT
// Each allocation and each read of opening data and beginning a run fails once: a status each time, nothing lost, no crash.
#include <unistd.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/png.h"
#include "core/io/safetensors.h"
#include "core/train/trainer.h"
#include "tests/test.h"
#include "tests/unit/tiny_train.h"

static char dir[64];

static void put(const char *name, const void *bytes, size_t n) {
    char path[160];
    struct err e = {0};
    snprintf(path, sizeof path, "%s/%s", dir, name);
    CHECK_OK(file_write(path, bytes, n, &e), &e);
}

static int to_file(void *f, const void *bytes, size_t n, struct err *e) { return file_out_write(f, bytes, n, e); }

static void put_latents(const char *name) {
    char path[160];
    float mean[128] = {0};
    int64_t label[2] = {0, 1};
    struct file_out out;
    struct err e = {0};
    struct tensor t[] = {{.name = "mean", .ndim = 4, .shape = {2, 1, 8, 8}, .data = mean, .count = 128, .bytes = sizeof mean},
                         {.name = "logvar", .ndim = 4, .shape = {2, 1, 8, 8}, .data = mean, .count = 128, .bytes = sizeof mean},
                         {.name = "label", .dtype = DT_I64, .ndim = 1, .shape = {2}, .data = label, .count = 2, .bytes = sizeof label}};
    snprintf(path, sizeof path, "%s/%s", dir, name);
    CHECK_OK(file_out_open(&out, path, &e), &e);
    CHECK_OK(safetensors_write(&(struct tensor_table){t, 3}, NULL, 0, to_file, &out, &e), &e);
    CHECK_OK(file_out_commit(&out, NULL, &e), &e);
}

static void begin(void) {
    char path[128];
    uint8_t *png, pixels[64] = {0};
    size_t n;
    struct err e = {0};
    unsigned char images[16 + 8 * 64] = {0, 0, 8, 3, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0, 8},
                                  labels[8 + 8] = {0, 0, 8, 1, 0, 0, 0, 8};
    snprintf(dir, sizeof dir, "/tmp/sitd-faults-XXXXXX");
    CHECK(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/pictures/a", dir);
    CHECK_OK(file_make_dir(path, &e), &e);
    snprintf(path, sizeof path, "%s/idx", dir);
    CHECK_OK(file_make_dir(path, &e), &e);
    put("idx/train-images-idx3-ubyte", images, sizeof images);
    put("idx/train-labels-idx1-ubyte", labels, sizeof labels);
    CHECK_OK(png_encode(&png, &n, pixels, 8, 8, 1, 1, NULL, 0, &e), &e);
    put("pictures/a/x.png", png, n);
    put_latents("latents.safetensors");
    mem_free(png);
}

static void end(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", dir);
    CHECK(system(command) == 0);
}

static int open_and_read(const char *kind, struct err *e) {
    char path[128];
    float x[64];
    int32_t label;
    struct data *d;
    snprintf(path, sizeof path, "%s/%s", dir, kind);
    int rc = data_open(&d, &(struct data_spec){.path = path, .size = 8, .channels = 1}, e);
    if (rc == OK) rc = data_example(d, 0, x, &label, e);
    data_close(d);
    return rc;
}

TEST(train_faults_in_data) {
    static const char *const kinds[] = {"idx", "pictures", "latents.safetensors"};
    begin();
    for (int kind = 0; kind < 3; kind++)
        for (int fault = 0; fault < 2; fault++) {
            int rc = -1;
            long n = 1;
            for (; rc != OK; n++) {
                struct err e = {0};
                fault_arm(fault ? FAULT_READ : FAULT_ALLOC, n, false);
                rc = open_and_read(kinds[kind], &e);
                fault_disarm();
                CHECK(rc == OK || (rc == (fault ? E_IO : E_NOMEM) && e.text[0]));
                CHECK(n < 1000);
            }
            CHECK(n > 2); // it had something to fail at
        }
    end();
}

static int begin_and_step(const char *out, long n, struct err *e) {
    char path[128];
    struct data *d = NULL;
    struct trainer *t;
    volatile sig_atomic_t stop = 0;
    struct train_config c = tiny_train(out);
    snprintf(path, sizeof path, "%s/idx", dir);
    CHECK(data_open(&d, &(struct data_spec){.path = path}, NULL) == OK);
    struct train_events on = {0};
    fault_arm(FAULT_ALLOC, n, false);
    int rc = trainer_new(&t, &c, d, NULL, &on, e);
    if (rc == OK) {
        fault_disarm(); // a step allocates nothing; what saving does then is the writer's test
        rc = trainer_run(t, &stop, e);
        trainer_free(t);
    }
    data_close(d);
    return rc;
}

TEST_LIMIT(train_faults_at_the_beginning_of_a_run, 120) {
    char out[96];
    begin();
    snprintf(out, sizeof out, "%s/out", dir);
    int rc = -1;
    for (long n = 1; rc != OK; n++) {
        struct err e = {0};
        rc = begin_and_step(out, n, &e);
        fault_disarm();
        CHECK(rc == OK || ((rc == E_NOMEM || rc == E_DEVICE) && e.text[0]));
        CHECK(n < 1000);
    }
    end();
}
