// SPDX-License-Identifier: MIT
/*
 * config: what `sitd serve` was told (server/options.h: flags, SITD_* variables, a file). Thread: start-up; afterwards read-only.
 */
#ifndef SITD_CONFIG_H
#define SITD_CONFIG_H
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "core/engine/engine.h"
#include "server/options.h"

#define CONFIG_TEXT OPTION_TEXT_SIZE
#define CONFIG_OPTIONS 32

struct config {
    char config[CONFIG_TEXT], models[CONFIG_TEXT], listen[CONFIG_TEXT], backend[CONFIG_TEXT], devices[CONFIG_TEXT], precision[CONFIG_TEXT];
    char cache[CONFIG_TEXT];
    char log_format[CONFIG_TEXT], log_level[CONFIG_TEXT], log_file[CONFIG_TEXT], cors_origin[CONFIG_TEXT];
    int device[ENGINE_DEVICES], n_devices; // what `devices` says, as engine_options has it
    int64_t max_rows, threads, nice, max_jobs, max_images, max_connections, max_body;
    int64_t default_timeout, max_timeout, request_timeout, idle_timeout, drain_delay, exit_timeout; // milliseconds
    bool insecure_public, any_bits, exact_residual;
    bool check_config, print_config, help, version; // flags only
    unsigned char source[CONFIG_OPTIONS];           // private: where each value came from
};

// Fills everything from argv, the environment and the file. E_RANGE for wrong values; *usage is set when the flags themselves are
// wrong.
int config_load(struct config *, int argc, char **argv, bool *usage, struct err *);
void config_print(const struct config *, FILE *); // as a config file, with where each value came from
void config_help(FILE *);

#endif
