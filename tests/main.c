// SPDX-License-Identifier: MIT
#include "tests/test.h"

#include <signal.h>
#include <stdarg.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static struct test *tests; // sorted by file, then by order of registration

void test_register(struct test *t) {
    struct test **p = &tests;
    while (*p && strcmp((*p)->file, t->file) <= 0) p = &(*p)->next;
    t->next = *p;
    *p = t;
}

void test_fail(const char *file, int line, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    printf("    %s:%d: ", file, line);
    vprintf(fmt, ap);
    printf("\n");
    va_end(ap);
    fflush(stdout);
    exit(1); // not _exit: leak checkers and coverage want their turn
}

static bool wanted(const struct test *t, char **patterns, int n) {
    for (int i = 0; i < n; i++)
        if (strstr(t->name, patterns[i]) || strstr(t->file, patterns[i])) return true;
    return n == 0;
}

// A pattern that no test has is a failed test: a suite that names a renamed file must not pass by running nothing of it.
static int unmatched(char **patterns, int n) {
    int count = 0;
    for (int i = 0; i < n; i++) {
        const struct test *t = tests;
        while (t && !wanted(t, patterns + i, 1)) t = t->next;
        if (t) continue;
        printf("FAIL no test matches '%s'\n", patterns[i]);
        count++;
    }
    return count;
}

static double seconds(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

static bool run_one(const struct test *t) {
    const char *scale = getenv("TEST_TIME_SCALE"); // sanitizers are slower
    double start = seconds();
    fflush(stdout);
    pid_t runner = getpid(), pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); // a test must not outlive its runner, which `timeout` may end, and keep a GPU
        if (getppid() != runner) _exit(1);
        alarm((unsigned)(t->seconds * (scale ? atoi(scale) : 1)));
        t->run();
        exit(0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    bool ok = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    if (ok) printf("ok   %s (%.2f s)\n", t->name, seconds() - start);
    else if (WIFSIGNALED(status)) printf("FAIL %s: %s (%s)\n", t->name, strsignal(WTERMSIG(status)), t->file);
    else printf("FAIL %s: exit %d (%s)\n", t->name, WEXITSTATUS(status), t->file);
    fflush(stdout);
    return ok;
}

int main(int argc, char **argv) {
    bool list = argc > 1 && strcmp(argv[1], "-l") == 0;
    int passed = 0, failed = unmatched(argv + 1 + list, argc - 1 - list);
    for (struct test *t = tests; t; t = t->next) {
        if (!wanted(t, argv + 1 + list, argc - 1 - list)) continue;
        if (list) printf("%s\t%s\n", t->name, t->file);
        else if (run_one(t)) passed++;
        else failed++;
    }
    if (!list) printf("%d passed, %d failed\n", passed, failed);
    return failed != 0 || (!list && passed == 0);
}
