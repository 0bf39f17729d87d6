// SPDX-License-Identifier: MIT
// A GPU that fails while the daemon serves from it. Needs a GPU that nobody else uses.
#include "tests/cuda/break_context.h"
#include "tests/test.h"
#include "tests/unit/serve_failure.h"

TEST(cuda_server_tells_clients_that_its_gpu_failed) { serve_failure("cuda", "bf16", break_context); }
