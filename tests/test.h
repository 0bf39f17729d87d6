// SPDX-License-Identifier: MIT
/*
 * test: the whole unit-test harness.
 *
 * TEST(name) { ... CHECK(cond); ... } registers itself; tests/run [-l] [-v] [substring ...] runs each in a process of its own with a time limit, so
 * that a crash or a hang is one failed test; so is a substring that no test has. A test dies with its runner. The last line is "N passed, N failed".
 */
#ifndef TEST_H
#define TEST_H
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct test {
    const char *name, *file;
    void (*run)(void);
    int seconds; // time limit
    struct test *next;
};
void test_register(struct test *);
void test_fail(const char *file, int line, const char *fmt, ...) __attribute__((format(printf, 3, 4), noreturn));

#define TEST_LIMIT(fn, limit) \
    static void test_##fn(void); \
    static struct test test_entry_##fn = { .name = #fn, .file = __FILE__, .run = test_##fn, .seconds = limit }; \
    __attribute__((constructor)) static void test_register_##fn(void) { test_register(&test_entry_##fn); } \
    static void test_##fn(void)
#define TEST(fn) TEST_LIMIT(fn, 60)
#define CHECK(cond) do { if (!(cond)) test_fail(__FILE__, __LINE__, "%s", #cond); } while (0)
#define CHECK_OK(call, e) do { int rc_ = (call); if (rc_ != 0) test_fail(__FILE__, __LINE__, "%s: %d %s %s", #call, rc_, (e)->param, (e)->text); } while (0)
#define CHECK_STR(a, b) do { const char *a_ = (a), *b_ = (b); if (strcmp(a_, b_) != 0) test_fail(__FILE__, __LINE__, "%s is \"%s\", not \"%s\"", #a, a_, b_); } while (0)
#define CHECK_NEAR(a, b, tol) do { double a_ = (a), b_ = (b); if (!(a_ - b_ <= (tol) && b_ - a_ <= (tol))) test_fail(__FILE__, __LINE__, "%s = %.9g, %s = %.9g", #a, a_, #b, b_); } while (0)

#endif
