// SPDX-License-Identifier: MIT
// Of tests/main.c itself.
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/test.h"

TEST(harness_sleeper) { // of the test below; on its own it does nothing
    const char *fd = getenv("HARNESS_PIPE");
    if (!fd) return;
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL); // a test may have a will of its own about SIGTERM
    CHECK(write(atoi(fd), "x", 1) == 1);
    pause();
}

// The pipe ends when nobody is left who could write to it.
TEST(harness_tests_die_with_their_runner) {
    int ends[2], status;
    char fd[16], byte;
    CHECK(pipe(ends) == 0);
    snprintf(fd, sizeof fd, "%d", ends[1]);
    pid_t runner = fork();
    CHECK(runner >= 0);
    if (runner == 0) {
        setenv("HARNESS_PIPE", fd, 1);
        execl("/proc/self/exe", "run", "harness_sleeper", NULL);
        _exit(127);
    }
    close(ends[1]);
    CHECK(read(ends[0], &byte, 1) == 1);
    CHECK(kill(runner, SIGTERM) == 0 && waitpid(runner, &status, 0) == runner);
    struct pollfd end = {.fd = ends[0], .events = POLLIN};
    CHECK(poll(&end, 1, 10000) == 1 && read(ends[0], &byte, 1) == 0);
}
