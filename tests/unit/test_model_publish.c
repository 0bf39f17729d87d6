// SPDX-License-Identifier: MIT
/* Publishing: what is left in the directory after one, after a failed one, and ten minutes later. */
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/io/file.h"
#include "core/io/model_publish.h"
#include "tests/test.h"

static char dir[64];
static struct checkpoint ck;
static struct model_desc desc;

static void begin(void) {
    struct err e = {0};
    snprintf(dir, sizeof dir, "/tmp/sitd-publish-XXXXXX");
    CHECK(mkdtemp(dir));
    CHECK_OK(checkpoint_open(&ck, "tests/golden/sit-tiny.safetensors", &e), &e);
    desc = (struct model_desc){.family = "sit", .path = "linear", .prediction = "velocity", .guide_channels = 3};
    CHECK_OK(arch_infer(&desc.arch, &ck.table, &e), &e);
    desc.arch.num_heads = 2;
}

static void end(void) {
    char command[128];
    checkpoint_close(&ck);
    snprintf(command, sizeof command, "rm -rf %s", dir);
    CHECK(system(command) == 0);
}

static int publish(int step, struct err *e) {
    desc.step = step;
    return model_publish(dir, &desc, &ck.table, e);
}

static void publish_well(int step) {
    struct err e = {0};
    CHECK_OK(publish(step, &e), &e);
}

static const char *path_of(const char *name) {
    static char path[400];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

static bool there(const char *name) { return access(path_of(name), F_OK) == 0; }
static bool step_there(int step) {
    char name[64];
    snprintf(name, sizeof name, "weights-%08d.safetensors", step);
    return there(name);
}

static void touch(const char *name) {
    struct err e = {0};
    CHECK_OK(file_write(path_of(name), "x", 1, &e), &e);
}

static void pass_minutes(int minutes) { // everything in the directory is so much older
    struct dirent *entry;
    struct stat st;
    DIR *d = opendir(dir);
    while ((entry = readdir(d))) {
        CHECK(fstatat(dirfd(d), entry->d_name, &st, 0) == 0);
        st.st_mtim.tv_sec -= minutes * 60;
        CHECK(utimensat(dirfd(d), entry->d_name, (struct timespec[]){st.st_atim, st.st_mtim}, 0) == 0);
    }
    closedir(d);
}

TEST(publish_removes_weights_ten_minutes_after_they_were_named) {
    begin();
    for (int step = 1; step <= 6;
         step++) { // every four minutes: those of 20, 16 and 12 minutes ago, less the four that they were named for
        publish_well(step);
        CHECK(step_there(step) && (step < 2 || step_there(step - 1)));
        if (step < 6) pass_minutes(4);
    }
    CHECK(!step_there(1) && !step_there(2) && step_there(3) && step_there(4) && step_there(5) && step_there(6));
    end();
}

// model.json by hand: the version that it named before has not been named since that moment, however old its file is.
TEST(publish_keeps_what_an_edited_model_json_named_until_now) {
    struct err e = {0};
    void *first;
    size_t n;
    begin();
    publish_well(1);
    CHECK_OK(file_read(&first, &n, path_of("model.json"), 1 << 20, &e), &e);
    pass_minutes(60);
    publish_well(2);
    pass_minutes(60);
    CHECK_OK(file_write(path_of("model.json"), first, n, &e), &e); // back to the first, now
    mem_free(first);
    publish_well(3);
    CHECK(step_there(1) && step_there(2) && step_there(3)); // 1 and 2 were both named a moment ago
    pass_minutes(11);
    publish_well(4);
    CHECK(!step_there(1) && !step_there(2) && step_there(3) && step_there(4));
    end();
}

TEST(publish_removes_only_files_of_its_own_naming) {
    static const char *const foreign[] = {
        "weights.safetensors", "weights-best.safetensors",   "weights-00000001.safetensors.bak", "ema.pt",
        "vae.safetensors",     "weights-0000001.safetensors"};
    static const char *const killed[] = {"weights.tmp-123-abc", "model.json.tmp-123-abc"};
    begin();
    publish_well(1);
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) touch(foreign[i]);
    for (size_t i = 0; i < 2; i++) touch(killed[i]);
    publish_well(2);
    CHECK(there(killed[0]) && there(killed[1])); // perhaps somebody writes there
    pass_minutes(60);
    publish_well(3);
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) CHECK(there(foreign[i]));
    CHECK(!there(killed[0]) && !there(killed[1]) && !step_there(1) && step_there(2) && step_there(3));
    end();
}

// A disk that is full from the n-th write on: a reader finds the old version whole, and the room is given back.
TEST(publish_to_a_full_disk_leaves_the_old_version) {
    begin();
    publish_well(1);
    for (long n = 1;; n++) {
        struct model_dir m;
        struct err e = {0};
        fault_arm(FAULT_WRITE, n, true);
        int rc = publish(2, &e);
        fault_disarm();
        struct err ignored = {0};
        CHECK_OK(model_dir_open(&m, dir, &ignored), &ignored);
        CHECK(m.desc.step == (rc ? 1 : 2));
        model_dir_close(&m);
        if (!rc) break;
        CHECK(rc == E_IO && e.text[0] && n < 100);
        CHECK(step_there(1) && !step_there(2));
    }
    end();
}
