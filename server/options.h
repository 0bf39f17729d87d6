// SPDX-License-Identifier: MIT
/*
 * options: what a command was told, from a table. A flag beats the environment, which beats the config file, which beats the
 * default.
 *
 * Each option has one name, "max-rows": the flag is --max-rows N (or --max-rows=N), the variable PREFIXMAX_ROWS, the line in the
 * file `max-rows = N`. Lengths of time take ms, s, m or h (a bare number is seconds); sizes take K or M. An unknown flag or key
 * and a value out of range are errors that name the source; unknown variables are not, since Kubernetes injects such names
 * for a service called sitd. Thread: start-up; afterwards read-only.
 */
#ifndef SITD_OPTIONS_H
#define SITD_OPTIONS_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "core/base/err.h"

#define OPTION_TEXT_SIZE 512

// Type of the field: char[OPTION_TEXT_SIZE] (TEXT, CHOICE), int64_t (NUMBER; SIZE, bytes; TIME, ms), double (REAL), bool (SWITCH)
enum option_kind {
    OPTION_HEADING,
    OPTION_TEXT,
    OPTION_CHOICE,
    OPTION_NUMBER,
    OPTION_REAL,
    OPTION_SIZE,
    OPTION_TIME,
    OPTION_SWITCH
};

struct option_desc { // HEADING: help alone, a line between options in the list
    const char *name;
    enum option_kind kind;
    size_t offset;
    const char *value;   // the default, as it would be typed
    double least, most;  // of numbers
    const char *choices; // CHOICE: words separated by |
    const char *help;
};

struct option_set {
    const struct option_desc *list; // the first is "config", a TEXT
    int n;
    const char *prefix; // of variables: "SITD_"
};

struct option_words { // flags that are no options
    bool check_config, print_config, help, version;
};

// Fills the fields of `values`, and source [n] (where each came from), from argv, the environment and the file. With help or
// version among the flags only flags are read. E_RANGE for wrong values; *usage is set when the flags themselves are wrong.
// E_NOTFOUND, E_PERM, E_IO: the file.
int options_load(const struct option_set *, void *values, unsigned char *source, int argc, char **argv, struct option_words *,
                 bool *usage, struct err *);
// A value as it would be typed.
void options_value(const struct option_set *, const void *values, int i, char text[OPTION_TEXT_SIZE]);
void options_print(const struct option_set *, const void *values, const unsigned char *source,
                   FILE *);                           // as a config file, with where each came from
void options_help(const struct option_set *, FILE *); // the list

#endif
