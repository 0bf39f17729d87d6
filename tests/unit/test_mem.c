// SPDX-License-Identifier: MIT
#include <stdint.h>

#include "core/base/fault.h"
#include <unistd.h>

#include "core/base/mem.h"
#include "kernels/kern.h"
#include "tests/test.h"

TEST(mem_products) {
    size_t v;
    CHECK(!mem_array(SIZE_MAX / 2, 3) && !mem_resize(NULL, SIZE_MAX, 2) && mul_overflows(SIZE_MAX, 2, &v) &&
          add_overflows(SIZE_MAX, 1, &v));
    CHECK(!mul_overflows(6, 7, &v) && v == 42 && !add_overflows(40, 2, &v) && v == 42);
    char *p = mem_array(16, 4), *none = mem_alloc(0);
    CHECK(p && none);
    for (int i = 0; i < 64; i++) CHECK(p[i] == 0);
    mem_free(p);
    mem_free(none);
    mem_free(NULL);
}

TEST(mem_strings) {
    char *a = mem_strdup("abc"), *b = mem_strndup("abcdef", 2), *c = mem_strndup("a", 100), *d = mem_printf("%s-%d", "x", 42),
         *e = mem_dup("\1\2", 2);
    CHECK_STR(a, "abc");
    CHECK_STR(b, "ab");
    CHECK_STR(c, "a");
    CHECK_STR(d, "x-42");
    CHECK(e[0] == 1 && e[1] == 2);
    mem_free(a), mem_free(b), mem_free(c), mem_free(d), mem_free(e);
}

TEST(fault_nth) {
    fault_arm(FAULT_ALLOC, 2, false);
    void *a = mem_alloc(1), *b = mem_alloc(1), *c = mem_alloc(1);
    CHECK(a && !b && c && fault_count(FAULT_ALLOC) == 3);
    fault_arm(FAULT_ALLOC, 1, true);
    CHECK(!mem_alloc(1) && !mem_strdup("x") && !mem_resize(a, 2, 1));
    fault_disarm();
    mem_free(a);
    mem_free(c);
}

// What this process can still have: something, and no more than the machine has.
TEST(host_memory_is_between_nothing_and_all) {
    size_t all = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE), there = kern_host_memory();
    CHECK(there > (size_t)1 << 20 && there < all);
}
