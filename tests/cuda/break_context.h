// SPDX-License-Identifier: MIT
// A GPU that fails, made from one that works. Afterwards the process has no use for the device any more.
#ifndef BREAK_CONTEXT_H
#define BREAK_CONTEXT_H
#include "kernels/kern.h"

struct kern *other_handle(void); // on the first card; kern_close
void break_context(void);

#endif
