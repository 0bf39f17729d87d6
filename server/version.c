// SPDX-License-Identifier: MIT
#include "server/cmd.h"

const char sitd_version[] = SITD_VERSION;
const char sitd_commit[] = SITD_COMMIT;
