// SPDX-License-Identifier: MIT
/*
 * Folders, layouts, networks of every design and model.json's newer fields with their 1st, 2nd, ... allocation or read failing: a status and a text
 * every time, no crash, and (under the address sanitizer) no leak.
 */
#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/import.h"
#include "core/model/dit.h"
#include "tests/test.h"

typedef int action(const char *what, struct err *);

static void fail_each(action *act, const char *what, enum fault_kind kind, int status, long least) {
    for (long n = 1; n < 100000; n++) {
        struct err e = {0};
        fault_arm(kind, n, false);
        int rc = act(what, &e);
        long hits = fault_count(kind);
        fault_disarm();
        if (hits < n) {
            CHECK_OK(rc, &e);
            CHECK(hits >= least);
            return;
        }
        if (rc != status || e.status != rc || !e.text[0]) test_fail(__FILE__, __LINE__, "%s: failure %ld gave %d '%s'", what, n, rc, e.text);
    }
    test_fail(__FILE__, __LINE__, "did not end");
}

static int describe(const char *path, struct err *e) {
    struct checkpoint c;
    struct model_desc d;
    struct import_fact facts[IMPORT_FACTS];
    int n, rc = checkpoint_open(&c, path, e);
    if (rc != OK) return rc;
    rc = import_describe(&d, facts, &n, &c, &(struct import_flags){.step = -1}, e);
    checkpoint_close(&c);
    return rc;
}

TEST(fault_diffusers_folder) {
    fail_each(describe, "tests/golden/dit-diffusers-tiny", FAULT_ALLOC, E_NOMEM, 50);
    fail_each(describe, "tests/golden/dit-diffusers-tiny", FAULT_READ, E_IO, 2);
    fail_each(describe, "tests/golden/maskdit-tiny.safetensors", FAULT_ALLOC, E_NOMEM, 5);
}

// Opens the file once; the network is what is made again and again.
static struct checkpoint file;
static struct kern *kern;

static int build(const char *path, struct err *e) {
    struct arch a;
    struct dit *m;
    float t = 0.5f;
    int32_t y = 1;
    (void)path;
    int rc = arch_infer(&a, &file.table, e);
    if (rc != OK) return rc;
    a.num_heads = a.hidden_size / 8, a.decoder.num_heads = a.decoder.hidden_size / 8;
    if (!a.input_size) a.input_size = 8;
    a.reversed = a.negated = true;
    rc = dit_new(&m, kern, &a, &file.table, dit_channels(&a), 1, e);
    if (rc == OK) rc = dit_forward(m, 1, &t, &y, e);
    if (rc == OK) dit_free(m);
    return rc;
}

TEST(fault_network_alloc) {
    static const char *const models[] = {"designs/adaln.safetensors", "designs/cross-attention.safetensors", "designs/in-context.safetensors",
                                         "maskdit-tiny.safetensors", "dit-diffusers-tiny"};
    struct err e = {0};
    char path[96], why[256];
    CHECK(kern_open(&kern, &(struct kern_config){.backend = "ref"}, why, sizeof why) == 0);
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        snprintf(path, sizeof path, "tests/golden/%s", models[i]);
        CHECK_OK(checkpoint_open(&file, path, &e), &e);
        fail_each(build, path, FAULT_ALLOC, E_NOMEM, 40);
        checkpoint_close(&file);
    }
    kern_close(kern);
}

static int parse(const char *path, struct err *e) {
    void *text;
    size_t n;
    struct model_desc d;
    int rc = file_read(&text, &n, path, 1 << 20, e);
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

TEST(fault_newer_fields_alloc) {
    static const char *const seeds[] = {"latent", "statistics", "loss-curve", "maskdit", "diffusers", "block"};
    char path[96];
    for (size_t i = 0; i < sizeof seeds / sizeof *seeds; i++) {
        snprintf(path, sizeof path, "tests/fuzz/corpus/model_json/good-%s", seeds[i]);
        fail_each(parse, path, FAULT_ALLOC, E_NOMEM, 20);
    }
}
