// SPDX-License-Identifier: MIT
// What tests/cuda/test_cuda_server.c does to a GPU, done to the processor.
#include "core/base/fault.h"
#include "tests/test.h"
#include "tests/unit/serve_failure.h"

static void fail_next(void) { fault_arm(FAULT_KERNEL, 1, false); } // once: it must not be tried again

TEST(server_device_failure_is_told_to_clients) { serve_failure("cpu", "f32", fail_next); }
