// SPDX-License-Identifier: MIT
// bar: the one updating line of progress that commands show on a terminal. Thread: main.
#ifndef SITD_BAR_H
#define SITD_BAR_H

// To stderr: part of the whole (0..1), a few words, and the time left (negative: not known yet).
void bar_draw(double part, const char *text, double seconds_left);

#endif
