// SPDX-License-Identifier: MIT
// Runs of several processes: what launchers leave in the environment, ranks that meet and die (with a back end that only
// pretends), ranks started here.
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core/train/parallel.h"
#include "tests/unit/some_port.h"

/* ---- the environment ---- */

struct variable {
    const char *name, *value;
};
static struct parallel_spec from(const struct variable *v, int status, const char *param) {
    struct parallel_spec s;
    struct err e = {0};
    static const char *const all[] = {"RANK",
                                      "WORLD_SIZE",
                                      "LOCAL_RANK",
                                      "LOCAL_WORLD_SIZE",
                                      "MASTER_ADDR",
                                      "MASTER_PORT",
                                      "OMPI_COMM_WORLD_RANK",
                                      "OMPI_COMM_WORLD_SIZE",
                                      "OMPI_COMM_WORLD_LOCAL_RANK",
                                      "OMPI_COMM_WORLD_LOCAL_SIZE",
                                      "PMI_RANK",
                                      "PMI_SIZE",
                                      "MPI_LOCALRANKID",
                                      "MPI_LOCALNRANKS",
                                      "SLURM_PROCID",
                                      "SLURM_NTASKS",
                                      "SLURM_LOCALID",
                                      "SLURM_NTASKS_PER_NODE",
                                      "SLURM_STEP_NODELIST",
                                      "SLURM_JOB_NODELIST"};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) unsetenv(all[i]);
    for (; v->name; v++) setenv(v->name, v->value, 1);
    int rc = parallel_from_environment(&s, &e);
    if (rc != status) test_fail(__FILE__, __LINE__, "status %d, not %d: %s", rc, status, e.text);
    if (param) CHECK_STR(e.param, param);
    return s;
}
#define VARS(...)                                                                                                                \
    (const struct variable[]) {                                                                                                  \
        __VA_ARGS__, { NULL, NULL }                                                                                              \
    }

TEST(parallel_reads_what_launchers_set) {
    struct parallel_spec s = from((const struct variable[]){{NULL, NULL}}, OK, NULL);
    CHECK(s.rank == 0 && s.size == 1);
    s = from(VARS({"RANK", "3"}, {"WORLD_SIZE", "4"}, {"LOCAL_RANK", "1"}, {"MASTER_ADDR", "node7"}, {"MASTER_PORT", "2345"}), OK,
             NULL);
    CHECK(s.rank == 3 && s.size == 4 && s.local == 1 && s.port == 2345);
    CHECK_STR(s.host, "node7");
    s = from(VARS({"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "2"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                  {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}),
             OK, NULL);
    CHECK(s.rank == 1 && s.size == 2 && s.local == 1 && s.port == 29400);
    CHECK_STR(s.host, "127.0.0.1");
    s = from(
        VARS({"SLURM_PROCID", "9"}, {"SLURM_NTASKS", "16"}, {"SLURM_LOCALID", "1"}, {"SLURM_STEP_NODELIST", "gpu[03-07,9],big1"}),
        OK, NULL);
    CHECK(s.rank == 9 && s.size == 16 && s.local == 1);
    CHECK_STR(s.host, "gpu03");
    s = from(
        VARS({"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "2"}, {"SLURM_LOCALID", "0"}, {"SLURM_JOB_NODELIST", "big1,gpu[03-07]"}), OK,
        NULL);
    CHECK_STR(s.host, "big1");
    s = from(VARS({"PMI_RANK", "0"}, {"PMI_SIZE", "1"}, {"MPI_LOCALRANKID", "0"}), OK, NULL);
    CHECK(s.rank == 0 && s.size == 1);
}

TEST(parallel_refuses_an_environment_that_cannot_be) {
    from(VARS({"RANK", "4"}, {"WORLD_SIZE", "4"}, {"LOCAL_RANK", "0"}), E_RANGE, "RANK");
    from(VARS({"RANK", "x"}, {"WORLD_SIZE", "4"}, {"LOCAL_RANK", "0"}), E_RANGE, "RANK");
    from(VARS({"RANK", "0"}), E_CONFLICT, "WORLD_SIZE");
    from(VARS({"RANK", "0"}, {"WORLD_SIZE", "0"}), E_RANGE, "WORLD_SIZE");
    from(VARS({"RANK", "0"}, {"WORLD_SIZE", "2"}, {"LOCAL_RANK", "0"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "70000"}), E_RANGE,
         "MASTER_PORT");
    from(VARS({"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
              {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}),
         E_CONFLICT, "MASTER_ADDR");
}

/* ---- ranks that meet; exchanges are written down instead of made ---- */

static struct {
    char kind[32]; // scattered, +: summed, gathered, double
    void *p[32];
    size_t n[32];
    int count, waits, aborted;
} seen;

static int fake_id(struct kern *k, char id[KERN_COMM_ID]) {
    (void)k;
    for (int i = 0; i < KERN_COMM_ID; i++) id[i] = (char)(i * 7);
    return 0;
}
static int fake_join(struct kern *k, const char id[KERN_COMM_ID], int rank, int size) {
    (void)k;
    for (int i = 0; i < KERN_COMM_ID; i++)
        if (id[i] != (char)(i * 7)) return KERN_EDEVICE;
    return rank < size ? 0 : KERN_EDEVICE;
}
static int note(char kind, void *p, size_t n) {
    seen.kind[seen.count] = kind, seen.p[seen.count] = p, seen.n[seen.count++] = n;
    return 0;
}
static int fake_sum(struct kern *k, float *p, size_t n) { return (void)k, note('+', p, n); }
static int fake_sum_double(struct kern *k, double *p, size_t n) { return (void)k, note('d', p, n); }
static int fake_scatter(struct kern *k, float *p, size_t n) { return (void)k, note('s', p, n); }
static int fake_gather(struct kern *k, float *p, size_t n) { return (void)k, note('g', p, n); }
static int fake_wait(struct kern *k) {
    (void)k;
    seen.waits++;
    return 0;
}
static void fake_abort(struct kern *k) {
    (void)k;
    seen.aborted++;
}
static int fake_alloc(struct kern *k, size_t bytes, void **out) {
    (void)k;
    return (*out = calloc(1, bytes)) ? 0 : KERN_ENOMEM;
}
static void fake_free(struct kern *k, void *p) {
    (void)k;
    free(p);
}
static int fake_copy(struct kern *k, void *dst, const void *src, size_t bytes) {
    (void)k;
    memcpy(dst, src, bytes);
    return 0;
}
static struct kern fake = {.name = "fake",
                           .alloc = fake_alloc,
                           .free = fake_free,
                           .upload = fake_copy,
                           .download = fake_copy,
                           .comm_id = fake_id,
                           .comm_join = fake_join,
                           .comm_sum = fake_sum,
                           .comm_sum_double = fake_sum_double,
                           .comm_scatter = fake_scatter,
                           .comm_gather = fake_gather,
                           .comm_wait = fake_wait,
                           .comm_abort = fake_abort};

// Ranks 1 .. size-1 as processes: each joins, and dies with or without a goodbye; the last one that is to live waits for the end
// of its run
static void others(int size, int port, int dies) {
    for (int rank = 1; rank < size; rank++) {
        if (fork()) continue;
        struct parallel_spec s = {.rank = rank, .size = size, .host = "127.0.0.1", .port = port};
        struct parallel *p;
        if (parallel_join(&p, &s, &fake, NULL, NULL)) _exit(1);
        if (rank == dies) _exit(0);
        struct err e = {0};
        for (int i = 0; dies && i < 200 && parallel_check(p, &e) == OK; i++)
            nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
        parallel_free(p, true);
        _exit(!dies ? 0 : e.status == E_DEVICE && strstr(e.text, "rank 2 of 3") && seen.aborted == 1 ? 0 : 2);
    }
}

// As rank 2 of 3, a run that fails here alone: it leaves without a goodbye, though nobody killed it
static void one_fails(int port) {
    if (fork()) return;
    struct parallel_spec s = {.rank = 2, .size = 3, .host = "127.0.0.1", .port = port};
    struct parallel *p;
    if (parallel_join(&p, &s, &fake, NULL, NULL)) _exit(1);
    parallel_free(p, false);
    _exit(0);
}

static void all_end_well(int n) {
    for (int status; n; n--) CHECK(wait(&status) > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(parallel_sums_neighbouring_gradients_in_pieces) {
    enum { BIG = 40 << 20 };
    struct parallel_spec s = {.rank = 0, .size = 3, .host = "", .port = some_port()};
    struct parallel *p;
    struct err e = {0};
    const struct parallel_piece *piece;
    float *grads = (float *)(uintptr_t)4096, *weights = (float *)(uintptr_t)64; // never read
    others(3, s.port, 0);
    CHECK_OK(parallel_join(&p, &s, &fake, grads, &e), &e);
    for (int pass = 0; pass < 2; pass++) { // of the second the same pieces come
        seen.count = seen.waits = 0;
        parallel_gradients(p, 4 * BIG, 101);
        parallel_gradients(p, 3 * BIG, BIG); // its neighbour
        parallel_gradients(p, 2 * BIG, BIG); // now 256 MB are there
        parallel_gradients(p, BIG, BIG / 2);
        parallel_gradients(p, 0, 7); // no neighbour, too few for three shares of four
        CHECK_OK(parallel_finish(p, &e), &e);
        CHECK(seen.count == 5 && seen.waits == 1 && memcmp(seen.kind, "s+s++", 5) == 0);
        CHECK(seen.p[0] == grads + 2 * BIG && seen.n[0] == (2 * BIG + 101) / 3 / 4 * 4);
        CHECK(seen.p[1] == grads + 2 * BIG + 3 * seen.n[0] && 3 * seen.n[0] + seen.n[1] == 2 * BIG + 101);
        CHECK(seen.p[2] == grads + BIG && seen.p[4] == grads && seen.n[4] == 7);
        CHECK(parallel_pieces(p, &piece) == 3 && piece[0].from == 2 * BIG && piece[0].own == 2 * BIG);
        CHECK(piece[2].share == 0 && piece[2].rest == 0 && piece[2].rest_count == 7);
        CHECK_OK(parallel_gather(p, weights, &e), &e); // the last has nothing to gather
        CHECK(seen.count == 7 && seen.waits == 2 && memcmp(seen.kind + 5, "gg", 2) == 0);
        CHECK(seen.p[5] == weights + 2 * BIG && seen.n[5] == seen.n[0] && seen.n[6] == seen.n[2]);
    }
    double v[2] = {1.0 / 3, -1e9 / 7}, same[2] = {1.0 / 3, -1e9 / 7};
    CHECK_OK(parallel_numbers(p, v, 2, &e), &e); // the pretended sum is the number itself
    CHECK(seen.count == 8 && seen.kind[7] == 'd' && seen.n[7] == 2 && memcmp(v, same, sizeof v) == 0);
    parallel_gradients(p, 4 * BIG, 104); // not what the first pass brought
    CHECK(parallel_finish(p, &e) == E_DEVICE && strstr(e.text, "another order"));
    parallel_free(p, true);
    all_end_well(2);
}

// Blocks and modulation come by turns: each kind is summed in pieces of its own, every float once
TEST(parallel_sums_two_runs_of_gradients_by_turns) {
    enum { BIG = 40 << 20 };
    struct parallel_spec s = {.rank = 0, .size = 2, .host = "", .port = some_port()};
    struct parallel *p;
    struct err e = {0};
    const struct parallel_piece *piece;
    float *grads = (float *)(uintptr_t)4096; // never read
    static const size_t told[][2] = {{8 * BIG, 7}, {3 * BIG, BIG}, {7 * BIG, BIG},         {2 * BIG, BIG}, {6 * BIG, BIG},
                                     {BIG, BIG},   {5 * BIG, BIG}, {4 * BIG + 9, BIG - 9}, {4 * BIG, 9},   {0, BIG}};
    static const size_t want[][2] = {
        {2 * BIG, 2 * BIG}, {6 * BIG, 2 * BIG + 7}, {4 * BIG + 9, 2 * BIG - 9}, {0, 2 * BIG}, {4 * BIG, 9}};
    others(2, s.port, 0);
    CHECK_OK(parallel_join(&p, &s, &fake, grads, &e), &e);
    for (size_t i = 0; i < sizeof told / sizeof *told; i++) parallel_gradients(p, told[i][0], told[i][1]);
    CHECK_OK(parallel_finish(p, &e), &e);
    int n = parallel_pieces(p, &piece);
    CHECK(n == sizeof want / sizeof *want);
    for (int i = 0; i < n; i++) {
        CHECK(piece[i].from == want[i][0] && 2 * piece[i].share + piece[i].rest_count == want[i][1] && piece[i].rest_count < 8);
        CHECK(piece[i].share % 4 == 0 && piece[i].rest == want[i][0] + 2 * piece[i].share);
    }
    parallel_free(p, true);
    all_end_well(1);
}

TEST(parallel_a_rank_that_dies_is_named_to_all) {
    struct parallel_spec s = {.rank = 0, .size = 3, .host = "", .port = some_port()};
    struct parallel *p;
    struct err e = {0};
    others(3, s.port, 2);
    CHECK_OK(parallel_join(&p, &s, &fake, NULL, &e), &e);
    for (int i = 0; i < 200 && parallel_check(p, NULL) == OK; i++) nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    CHECK(parallel_finish(p, &e) == E_DEVICE && strstr(e.text, "rank 2 of 3") && seen.aborted == 1);
    all_end_well(2);
    parallel_free(p, true);
}

TEST(parallel_a_rank_that_fails_alone_is_named_to_all) {
    struct parallel_spec s = {.size = 3, .port = some_port()};
    struct parallel *p;
    struct err e = {0};
    one_fails(s.port);
    if (fork() == 0) {
        struct parallel_spec other = {.rank = 1, .size = 3, .host = "127.0.0.1", .port = s.port};
        if (parallel_join(&p, &other, &fake, NULL, NULL)) _exit(1);
        for (int i = 0; i < 200 && parallel_check(p, &e) == OK; i++) nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
        parallel_free(p, false);
        _exit(e.status == E_DEVICE && strstr(e.text, "rank 2 of 3") ? 0 : 2);
    }
    CHECK_OK(parallel_join(&p, &s, &fake, NULL, &e), &e);
    for (int i = 0; i < 200 && parallel_check(p, NULL) == OK; i++) nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    CHECK(parallel_finish(p, &e) == E_DEVICE && strstr(e.text, "rank 2 of 3"));
    all_end_well(2);
    parallel_free(p, false);
}

// Who connects and says nothing costs two seconds, not the run
TEST(parallel_a_silent_stranger_does_not_stop_the_meeting) {
    struct parallel_spec s = {.size = 2, .host = "127.0.0.1", .port = some_port()};
    struct parallel *p;
    struct err e = {0};
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)s.port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (fork() == 0) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        while (connect(fd, (struct sockaddr *)&at, sizeof at)) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        struct parallel_spec other = {.rank = 1, .size = 2, .host = "127.0.0.1", .port = s.port};
        if (parallel_join(&p, &other, &fake, NULL, NULL)) _exit(1);
        parallel_free(p, true);
        _exit(0);
    }
    CHECK_OK(parallel_join(&p, &s, &fake, NULL, &e), &e);
    parallel_free(p, true);
    all_end_well(1);
}

TEST(parallel_the_same_rank_twice_is_a_conflict) {
    struct parallel_spec s = {.rank = 0, .size = 3, .host = "", .port = some_port()};
    struct parallel *p;
    struct err e = {0};
    pid_t child[2];
    for (int i = 0; i < 2; i++)
        if ((child[i] = fork()) == 0) {
            struct parallel_spec same = {.rank = 1, .size = 3, .host = "127.0.0.1", .port = s.port};
            _exit(parallel_join(&p, &same, &fake, NULL, NULL) ? 0 : 1);
        }
    CHECK(parallel_join(&p, &s, &fake, NULL, &e) == E_CONFLICT && !p && strstr(e.text, "rank 1"));
    for (int i = 0; i < 2; i++) kill(child[i], SIGKILL);
}

/* ---- ranks started here: they run this program again, with the name of a test ---- */

TEST(parallel_child_that_dies) { // of the test below; on its own it does nothing
    const char *rank = getenv("RANK");
    if (!getenv("PARALLEL_CHILD") || !rank) return;
    if (strcmp(rank, "1") == 0) kill(getppid(), SIGKILL); // the runner: the rank itself
    nanosleep(&(struct timespec){.tv_sec = 3}, NULL);
}

TEST(parallel_launch_says_which_rank_ended_how) {
    struct err e = {0};
    unsetenv("PARALLEL_CHILD");
    CHECK_OK(parallel_launch((char *[]){"run", "parallel_child_that", NULL}, 2, &e), &e);
    CHECK(parallel_launch((char *[]){"run", "no test has this name", NULL}, 2, &e) == E_DEVICE &&
          strstr(e.text, "ended with status"));
    e = (struct err){0};
    setenv("PARALLEL_CHILD", "1", 1);
    CHECK(parallel_launch((char *[]){"run", "parallel_child_that", NULL}, 3, &e) == E_DEVICE);
    CHECK(strstr(e.text, "rank 1 ended by signal 9"));
}
