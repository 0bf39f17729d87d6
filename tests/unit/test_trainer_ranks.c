// SPDX-License-Identifier: MIT
// A run of several ranks, here threads with the cpu back end whose exchanges go through memory: what they learn is what one alone
// does, whoever steps which floats.
#include <math.h>
#include <pthread.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/train/snapshot.h"
#include "core/train/trainer.h"
#include "tests/unit/some_port.h"
#include "tests/unit/tiny_train.h"

#define MOST 3
#define ARRAYS (SNAPSHOT_EMA + 2)

/* ---- exchanges ---- */

static struct {
    pthread_barrier_t barrier;
    int size;
    void *of[MOST]; // the buffer of each rank
} meeting;
static _Thread_local int rank;

static void meet(void *p) {
    meeting.of[rank] = p;
    pthread_barrier_wait(&meeting.barrier);
}
static void leave(void) { pthread_barrier_wait(&meeting.barrier); }

static int my_id(struct kern *k, char id[KERN_COMM_ID]) {
    (void)k;
    memset(id, 1, KERN_COMM_ID);
    return 0;
}
static int my_join(struct kern *k, const char id[KERN_COMM_ID], int as, int size) {
    (void)k, (void)id;
    return as == rank && size == meeting.size ? 0 : KERN_EDEVICE;
}
static int my_wait(struct kern *k) { return (void)k, 0; }
static void my_abort(struct kern *k) { (void)k; }

static float summed(size_t i) {
    float v = 0;
    for (int r = 0; r < meeting.size; r++) v += ((const float *)meeting.of[r])[i];
    return v;
}
static int my_sum(struct kern *k, float *p, size_t n) {
    float *sum = malloc(n * sizeof *sum);
    (void)k;
    meet(p);
    for (size_t i = 0; i < n; i++) sum[i] = summed(i);
    leave();
    memcpy(p, sum, n * sizeof *sum);
    free(sum);
    return 0;
}
static int my_sum_double(struct kern *k, double *p, size_t n) {
    double sum[16] = {0};
    (void)k;
    CHECK(n <= 16);
    meet(p);
    for (size_t i = 0; i < n; i++)
        for (int r = 0; r < meeting.size; r++) sum[i] += ((const double *)meeting.of[r])[i];
    leave();
    memcpy(p, sum, n * sizeof *sum);
    return 0;
}
static int my_scatter(struct kern *k, float *p, size_t n) {
    float *sum = malloc(n * sizeof *sum);
    (void)k;
    meet(p);
    for (size_t i = 0; i < n; i++) sum[i] = summed((size_t)rank * n + i);
    leave();
    memcpy(p + (size_t)rank * n, sum, n * sizeof *sum);
    free(sum);
    return 0;
}
static int my_gather(struct kern *k, float *p, size_t n) {
    (void)k;
    meet(p);
    for (int r = 0; r < meeting.size; r++)
        if (r != rank) memcpy(p + (size_t)r * n, (const float *)meeting.of[r] + (size_t)r * n, n * sizeof *p);
    leave();
    return 0;
}
static void bring(struct kern *k) {
    k->comm_id = my_id, k->comm_join = my_join, k->comm_wait = my_wait, k->comm_abort = my_abort;
    k->comm_sum = my_sum, k->comm_sum_double = my_sum_double, k->comm_scatter = my_scatter, k->comm_gather = my_gather;
}

/* ---- runs ---- */

static struct train_config config;
static struct data *data;
static char dir[64], out[96];
static volatile sig_atomic_t stop;

static void begin(void) {
    data = tiny_data(dir, false);
    config = tiny_train(out);
    config.steps = 9, config.batch = 6, config.save_every = 4, config.keep = 9, config.clip = 0.5, config.decay = 0.01;
    config.schedule = LR_CONSTANT, config.n_ema = 2, config.ema[1] = 0.99;
}
static void end(void) {
    char command[128];
    data_close(data);
    snprintf(command, sizeof command, "rm -r %s", dir);
    CHECK(system(command) == 0);
}

struct rank_run {
    pthread_t thread;
    struct parallel_spec spec;
    int rc;
    struct err e;
    float *array[ARRAYS];
    size_t n; // parameters; gaps behind the last are left out
    double update; // norm, of the last step
};

static void on_stats(void *ctx, const struct train_stats *s) { ((struct rank_run *)ctx)->update = s->update_norm; }

static void *run_rank(void *ctx) {
    struct rank_run *r = ctx;
    struct trainer *t;
    rank = r->spec.rank;
    r->rc = trainer_new(&t, &config, data, &r->spec, &(struct train_events){.ctx = r, .stats = on_stats}, &r->e);
    if (r->rc != OK) return NULL;
    r->rc = trainer_run(t, &stop, &r->e);
    r->n = trainer_params(t);
    for (int i = 0; i < ARRAYS; i++) {
        const float *v = trainer_weights(t, i, &r->e);
        r->array[i] = v ? mem_dup(v, r->n * sizeof *v) : NULL;
    }
    trainer_free(t);
    return NULL;
}

// All ranks' runs in a folder of that name, to their ends
static void run(struct rank_run *r, int size, const char *name) {
    int port = some_port();
    snprintf(out, sizeof out, "%s/%s", dir, name);
    meeting.size = size;
    CHECK(pthread_barrier_init(&meeting.barrier, NULL, (unsigned)size) == 0);
    for (int i = 0; i < size; i++) {
        r[i] = (struct rank_run){.spec = {.rank = i, .size = size, .local = i, .host = "127.0.0.1", .port = port, .bring = bring}};
        CHECK(pthread_create(&r[i].thread, NULL, run_rank, &r[i]) == 0);
    }
    for (int i = 0; i < size; i++) pthread_join(r[i].thread, NULL);
    pthread_barrier_destroy(&meeting.barrier);
}
static void drop(struct rank_run *r, int size) {
    for (int i = 0; i < size * ARRAYS; i++) mem_free(r[i / ARRAYS].array[i % ARRAYS]);
}
static double apart(const float *a, const float *b, size_t n) { // relative L2
    double d = 0, s = 0;
    for (size_t i = 0; i < n; i++) d += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]), s += (double)b[i] * (double)b[i];
    return sqrt(d / s);
}

TEST_LIMIT(trainer_ranks_learn_what_one_does, 120) {
    struct rank_run one[1], many[MOST];
    begin();
    run(one, 1, "one");
    CHECK_OK(one->rc, &one->e);
    for (int size = 2; size <= MOST; size++) {
        run(many, size, size == 2 ? "two" : "three");
        for (int i = 0; i < size; i++) {
            CHECK_OK(many[i].rc, &many[i].e);
            CHECK_NEAR(many[i].update, one->update, 1e-4 * one->update);
            for (int a = 0; a < ARRAYS; a++) {
                CHECK(memcmp(many[i].array[a], many[0].array[a], one->n * sizeof(float)) == 0); // whole, and the same everywhere
                CHECK_NEAR(apart(many[i].array[a], one->array[a], one->n), 0, 1e-4);
            }
        }
        drop(many, size);
    }
    drop(one, 1);
    end();
}

TEST_LIMIT(trainer_ranks_continue_bit_for_bit, 120) {
    struct rank_run whole[2], cut[2];
    begin();
    run(whole, 2, "whole");
    config.steps = 5;
    run(cut, 2, "cut");
    CHECK_OK(cut->rc, &cut->e);
    drop(cut, 2);
    config.steps = 9, config.resume = "auto";
    run(cut, 2, "cut");
    CHECK_OK(cut->rc, &cut->e);
    for (int a = 0; a < ARRAYS; a++) CHECK(memcmp(whole->array[a], cut->array[a], whole->n * sizeof(float)) == 0);
    drop(whole, 2), drop(cut, 2);
    end();
}

TEST_LIMIT(trainer_ranks_stop_together_at_numbers_that_are_not_finite, 120) {
    struct rank_run r[MOST];
    begin();
    config.lr = 1e30, config.clip = 0;
    run(r, MOST, "wild");
    for (int i = 0; i < MOST; i++) CHECK(r[i].rc == E_NONFINITE && r[i].e.param[0]);
    drop(r, MOST);
    end();
}
