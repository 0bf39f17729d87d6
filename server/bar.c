// SPDX-License-Identifier: MIT
#include "server/bar.h"

#include <stdio.h>

void bar_draw(double part, const char *text, double seconds_left) {
    int filled = (int)(part * 40);
    fprintf(stderr, "\r[%-40.*s] %3.0f %%  %s  ", filled, "########################################", 100 * part, text);
    long left = (long)(seconds_left + 0.5);
    if (seconds_left < 0) return;
    if (left < 120) fprintf(stderr, "%ld s left   ", left);
    else fprintf(stderr, "%ld:%02ld:%02ld left ", left / 3600, left / 60 % 60, left % 60);
}
