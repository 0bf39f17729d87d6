// SPDX-License-Identifier: MIT
/*
 * New versions of a model while the engine runs: who gets which weights, what a bad version changes (nothing), when it is tried
 * again, which directories come and go.
 */
#include "core/base/fault.h"
#include "core/engine/engine_int.h"
#include "tests/test.h"
#include "tests/unit/engine_fixture.h"

#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const int32_t two[] = {3, 0};

static void sleep_ms(int ms) { nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000L}, NULL); }

static size_t device_bytes(struct engine *g) {
    struct engine_stats s;
    engine_stats(g, &s);
    return s.device_bytes;
}

static void digest_of(struct engine *g, const char *name, char digest[DIGEST_HEX]) {
    const struct engine_model *m = engine_model_ref(g, name);
    strcpy(digest, m ? m->digest : "");
    if (m) engine_model_unref(m);
}

static bool serves(struct engine *g, const char *name, const char *digest) {
    char now[DIGEST_HEX];
    digest_of(g, name, now);
    return strcmp(now, digest) == 0;
}

static struct err hear_nth(struct heard *h, int n) { // waits for the n-th EV_MODEL, from 1
    pthread_mutex_lock(&h->lock);
    while (h->n_models < n) pthread_cond_wait(&h->more, &h->lock);
    struct err e = h->models[(n - 1) % 8];
    pthread_mutex_unlock(&h->lock);
    return e;
}

static void publish(int seed) { fixture_model(&(struct tiny){.name = "a", .seed = seed}); }

static struct engine *open_a(struct heard *h, int retry_ms) {
    hear_start(h);
    struct engine_options o = fixture_options(h);
    o.retry_ms = retry_ms;
    return fixture_open(h, &o);
}

static void reload(struct engine *g) {
    struct err e = {0};
    CHECK_OK(engine_reload(g, "a", &e), &e);
}

static struct engine_job heun(int steps) { return fixture_job("a", 2, two, SAMPLER_ODE, METHOD_HEUN, steps); }

// What a daemon that has only this version makes of the job.
static struct heard_job alone(int seed, const struct engine_job *job) {
    struct heard h;
    publish(seed);
    struct engine *g = open_a(&h, 0);
    struct heard_job done = *hear_end(&h, fixture_submit(g, job));
    engine_close(g);
    hear_stop(&h);
    return done;
}

TEST(reload_jobs_keep_the_weights_they_were_accepted_for) {
    struct engine_job longer = heun(100), job = heun(5);
    longer.priority = 1; // both its images have slots before the other job
    struct heard_job old_long = alone(1, &longer), old = alone(1, &job), new = alone(2, &job);
    CHECK(memcmp(old.pixels[0], new.pixels[0], 64) != 0);
    publish(1);
    struct heard h;
    hear_start(&h);
    struct engine_options o = fixture_options(&h);
    o.max_rows = 2; // the long one's
    struct engine *g = fixture_open(&h, &o);
    char first[DIGEST_HEX], second[DIGEST_HEX];
    digest_of(g, "a", first);
    size_t one = device_bytes(g);
    uint64_t running = fixture_submit(g, &longer), queued = fixture_submit(g, &job);
    hear_started(&h, running);
    publish(2);
    reload(g);
    CHECK(hear_nth(&h, 2).status == 0);
    digest_of(g, "a", second);
    CHECK(strcmp(first, second) != 0 && h.jobs[running].ended == 0 && h.jobs[queued].started == 0);
    CHECK(device_bytes(g) == 2 * one); // both are there
    uint64_t late = fixture_submit(g, &job), id;
    struct engine_job named = job;
    strcpy(named.digest, first);
    struct err e = {0};
    CHECK(engine_submit(g, &named, &id, NULL, &e) == E_CONFLICT);
    CHECK_STR(e.param, "digest");
    strcpy(named.digest, second);
    uint64_t right = fixture_submit(g, &named);
    fixture_same(hear_end(&h, late), &new, 2); // the old one, busy, does not hold up the new one
    fixture_same(hear_end(&h, right), &new, 2);
    fixture_same(hear_end(&h, running), &old_long, 2);
    fixture_same(hear_end(&h, queued), &old, 2);
    while (device_bytes(g) != one) sleep_ms(1); // the first version went with its last job
    engine_close(g);
    hear_stop(&h);
}

/* ---- under load ---- */

#define VERSIONS 3
struct client {
    pthread_t thread;
    struct engine *g;
    struct heard *h;
    char (*digests)[DIGEST_HEX];
    const struct heard_job *versions;
    atomic_bool *over;
    atomic_int *made; // [VERSIONS], of all clients
};

static void *client_main(void *arg) {
    struct client *c = arg;
    while (!atomic_load(c->over)) {
        struct engine_job job = heun(5);
        struct err e = {0};
        uint64_t id;
        digest_of(c->g, "a", job.digest);
        int rc = engine_submit(c->g, &job, &id, NULL, &e), v = 0;
        if (rc == E_CONFLICT) continue; // swapped since: take the model again, as the daemon does
        CHECK_OK(rc, &e);
        while (strcmp(c->digests[v], job.digest) != 0) CHECK(++v < VERSIONS);
        fixture_same(hear_end(c->h, id), &c->versions[v], 2);
        atomic_fetch_add(&c->made[v], 1);
    }
    return NULL;
}

TEST_LIMIT(reload_under_load_each_answer_belongs_to_its_digest, 120) {
    static struct heard_job versions[VERSIONS];
    static char digests[VERSIONS][DIGEST_HEX];
    struct engine_job job = heun(5);
    static atomic_int made[VERSIONS];
    struct client clients[3];
    atomic_bool over = false;
    struct heard h;
    for (int v = 0; v < VERSIONS; v++) {
        versions[v] = alone(v + 1, &job);
        struct model_desc d;
        char path[512];
        snprintf(path, sizeof path, "%s/a", fixture_dir());
        CHECK(model_dir_desc(&d, digests[v], path, NULL) == 0);
        model_desc_deinit(&d);
    }
    publish(1);
    struct engine *g = open_a(&h, 0);
    for (int i = 0; i < 3; i++) {
        clients[i] = (struct client){.g = g, .h = &h, .digests = digests, .versions = versions, .over = &over, .made = made};
        CHECK(pthread_create(&clients[i].thread, NULL, client_main, &clients[i]) == 0);
    }
    for (int n = 0; n < 2 * VERSIONS; n++) { // twice round, a few answers each
        int v = n % VERSIONS, before = atomic_load(&made[v]);
        if (n) {
            publish(v + 1);
            engine_scan(g);
            CHECK(hear_nth(&h, n + 1).status == 0 && serves(g, "a", digests[v]));
        }
        while (atomic_load(&made[v]) < before + 5) sleep_ms(1);
    }
    atomic_store(&over, true);
    for (int i = 0; i < 3; i++) CHECK(pthread_join(clients[i].thread, NULL) == 0);
    engine_close(g);
    hear_stop(&h);
}

/* ---- what cannot be loaded ---- */

static void write_json(const char *name, const char *text) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s/model.json", fixture_dir(), name);
    FILE *f = fopen(path, "w");
    CHECK(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

static void huge(void) { fixture_model(&(struct tiny){.name = "a", .seed = 5, .huge = true}); }
static void latents(void) { fixture_model(&(struct tiny){.name = "a", .seed = 6, .channels = 4}); }
static void broken(void) { write_json("a", "{\"format\":1,"); }
static void flipped(void) { // weights that could be served, but are not those that were published
    char digest[DIGEST_HEX], path[900], dir[512];
    struct model_desc d;
    struct stat st;
    publish(7);
    snprintf(dir, sizeof dir, "%s/a", fixture_dir());
    CHECK(model_dir_desc(&d, digest, dir, NULL) == 0);
    snprintf(path, sizeof path, "%s/%s", dir, d.weights_file);
    model_desc_deinit(&d);
    FILE *f = fopen(path, "r+");
    CHECK(f && fstat(fileno(f), &st) == 0 && fseek(f, st.st_size - 4, SEEK_SET) == 0 && fputc(0x55, f) == 0x55 && fclose(f) == 0);
}

TEST(reload_that_fails_changes_nothing_and_says_why) {
    static const struct {
        void (*spoil)(void);
        int status;
        const char *text;
    } cases[] = {{huge, E_NONFINITE, "finite"}, {latents, E_UNSUPPORTED, "VAE"}, {flipped, E_CONFLICT, "SHA-256"}, {broken, E_FORMAT, "model.json"}};
    struct heard h;
    struct engine_entry entry[2];
    char digest[DIGEST_HEX];
    struct engine_job job = heun(5);
    publish(1);
    struct engine *g = open_a(&h, 60000);
    struct heard_job before = *hear_end(&h, fixture_submit(g, &job));
    size_t bytes = device_bytes(g);
    digest_of(g, "a", digest);
    for (int i = 0; i < 4; i++) {
        cases[i].spoil();
        engine_scan(g);
        struct err e = hear_nth(&h, i + 2);
        CHECK(e.status == cases[i].status && strstr(e.text, "'a'") && strstr(e.text, cases[i].text));
        CHECK(serves(g, "a", digest) && engine_ready(g) && device_bytes(g) == bytes);
        CHECK(engine_repository(g, entry, 2) == 1 && entry[0].state == MODEL_SERVES && entry[0].version == 7);
        CHECK_STR(entry[0].digest, digest);
        CHECK_STR(entry[0].reason, e.text);
        fixture_same(hear_end(&h, fixture_submit(g, &job)), &before, 2);
    }
    engine_scan(g); // the same bytes again: not before its pause is over
    sleep_ms(50);
    CHECK(h.n_models == 5);
    reload(g); // unless somebody asks
    CHECK(hear_nth(&h, 6).status == E_FORMAT);
    publish(1); // what is served: nothing to load
    engine_scan(g);
    do CHECK(engine_repository(g, entry, 2) == 1);
    while (entry[0].reason[0]);
    CHECK(h.n_models == 6 && serves(g, "a", digest));
    publish(2);
    engine_scan(g);
    CHECK(hear_nth(&h, 7).status == 0 && !serves(g, "a", digest));
    struct err e = {0};
    CHECK(engine_reload(g, "b", &e) == E_NOTFOUND);
    engine_close(g);
    hear_stop(&h);
}

// Weights that are still on their way, or that were lost, are asked for again and again, ever less often; model.json is not
// touched.
TEST(reload_is_tried_again_with_growing_pauses) {
    struct heard h;
    struct model_desc d;
    char digest[DIGEST_HEX], path[512], here[900], away[900];
    publish(1);
    struct engine *g = open_a(&h, 20);
    publish(2);
    snprintf(path, sizeof path, "%s/a", fixture_dir());
    CHECK(model_dir_desc(&d, digest, path, NULL) == 0);
    snprintf(here, sizeof here, "%s/%s", path, d.weights_file);
    snprintf(away, sizeof away, "%s/away", path);
    model_desc_deinit(&d);
    CHECK(rename(here, away) == 0);
    int64_t start = engine_now_us();
    engine_scan(g);
    for (int n = 2, pauses = 0; n < 7; n++, pauses = 2 * pauses + 20) {
        struct err e = hear_nth(&h, n);
        CHECK(e.status == E_NOTFOUND && strstr(e.text, "weights-"));
        CHECK(engine_now_us() - start >= pauses * 1000);
    }
    CHECK(rename(away, here) == 0);
    while (!serves(g, "a", digest)) sleep_ms(5);
    engine_close(g);
    hear_stop(&h);
}

TEST_LIMIT(reload_survives_any_failing_allocation_or_read, 120) {
    static const struct {
        enum fault_kind kind;
        int status;
    } kinds[] = {{FAULT_ALLOC, E_NOMEM}, {FAULT_READ, E_IO}};
    struct heard h;
    struct engine_job job = heun(2);
    publish(1);
    struct engine *g = open_a(&h, 1000000);
    for (int k = 0, seed = 2, heard = 1; k < 2; k++)
        for (long n = 1, step = 1;; n += step, step += n > 8) {
            char before[DIGEST_HEX];
            digest_of(g, "a", before);
            publish(seed++);
            fault_arm(kinds[k].kind, n, true);
            reload(g);
            struct err e = hear_nth(&h, ++heard);
            bool hit = fault_count(kinds[k].kind) >= n;
            fault_disarm();
            CHECK(e.status == (hit ? kinds[k].status : OK) && serves(g, "a", before) == hit);
            CHECK(hear_end(&h, fixture_submit(g, &job))->end.kind == EV_DONE);
            if (!hit) break;
        }
    engine_close(g);
    hear_stop(&h);
}

// No room for two: the old version serves on, and what is found to be free later is used.
TEST(reload_without_room_for_a_second_copy_waits) {
    struct heard h;
    char digest[DIGEST_HEX];
    publish(1);
    struct engine *g = open_a(&h, 20);
    digest_of(g, "a", digest);
    publish(2);
    fault_arm(FAULT_ROOM, 1, true);
    engine_scan(g);
    struct err e = hear_nth(&h, 3);
    CHECK(e.status == E_NOMEM && strstr(e.text, "memory beside what is served") && serves(g, "a", digest));
    fault_disarm();
    while (serves(g, "a", digest)) sleep_ms(5);
    engine_close(g);
    hear_stop(&h);
}

// A device that has failed is given no new version.
TEST(reload_on_a_failed_device_is_refused) {
    struct heard h;
    struct engine_job job = heun(5);
    publish(1);
    struct engine *g = open_a(&h, 60000);
    fault_arm(FAULT_KERNEL, 1, false);
    CHECK(hear_end(&h, fixture_submit(g, &job))->end.err.status == E_DEVICE);
    fault_disarm();
    publish(2);
    engine_scan(g);
    CHECK(hear_nth(&h, 2).status == E_DEVICE);
    engine_close(g);
    hear_stop(&h);
}

TEST(reload_races_with_closing) {
    for (int i = 0; i < 15; i++) {
        struct heard h;
        publish(i % 2);
        struct engine *g = open_a(&h, 0);
        struct engine_job job = heun(50);
        fixture_submit(g, &job);
        publish(1 - i % 2);
        engine_scan(g);
        nanosleep(&(struct timespec){0, i * 400000L}, NULL);
        if (i % 3 == 0) engine_stop(g, i % 2);
        engine_close(g);
        hear_stop(&h);
    }
}

/* ---- directories ---- */

static void move(const char *from, const char *to) {
    char a[512], b[512];
    snprintf(a, sizeof a, "%s/%s", fixture_dir(), from);
    snprintf(b, sizeof b, "%s/%s", fixture_dir(), to);
    CHECK(rename(a, b) == 0);
}

TEST(reload_directories_come_and_go) {
    struct heard h;
    struct engine_entry entries[4];
    char digest[DIGEST_HEX];
    publish(1);
    struct engine *g = open_a(&h, 60000);
    digest_of(g, "a", digest);
    size_t one = device_bytes(g);
    fixture_model(&(struct tiny){.name = ".b", .seed = 3}); // being copied: a name that is not looked at
    engine_scan(g);
    sleep_ms(20);
    CHECK(engine_repository(g, entries, 4) == 1);
    move(".b", "b");
    engine_scan(g);
    CHECK(hear_nth(&h, 2).status == 0);
    CHECK_STR(h.names[1], "b");
    CHECK(engine_ready(g) && !engine_model_ref(g, NULL)); // two, and none is marked: a request must name one
    struct engine_job job = fixture_job("b", 2, two, SAMPLER_ODE, METHOD_HEUN, 5),
                      endless = fixture_job("b", 1, two, SAMPLER_ODE, METHOD_RK4, 10000);
    uint64_t running = fixture_submit(g, &endless), id;
    hear_started(&h, running);
    move("b", ".b");
    engine_scan(g);
    sleep_ms(50);
    CHECK(engine_repository(g, entries, 4) == 2); // gone, but perhaps only being replaced
    move(".b", "b");
    engine_scan(g);
    sleep_ms(50);
    move("b", ".b");
    engine_scan(g);
    while (engine_repository(g, entries, 4) == 2) sleep_ms(10); // looks again by itself
    struct err e = {0};
    CHECK(engine_submit(g, &job, &id, NULL, &e) == E_NOTFOUND && h.jobs[running].ended == 0);
    const struct engine_model *only = engine_model_ref(g, NULL);
    CHECK_STR(only->name, "a");
    engine_model_unref(only);
    engine_cancel(g, running);
    CHECK(hear_end(&h, running)->end.kind == EV_CANCELLED);
    while (device_bytes(g) != one) sleep_ms(1);
    move("a", ".a"); // an empty folder is no wish to serve nothing
    engine_scan(g);
    sleep_ms(2200);
    engine_scan(g);
    sleep_ms(50);
    CHECK(serves(g, "a", digest));
    engine_close(g);
    hear_stop(&h);
}
