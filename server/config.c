// SPDX-License-Identifier: MIT
#include "server/config.h"

#include <ctype.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "server/cache.h"

#define AT(field) offsetof(struct config, field)
#define DAY_MS (24 * 3600 * 1000)
static const struct option_desc options[] = {
    {"config", OPTION_TEXT, AT(config), "", 0, 0, NULL, "file of `key = value` lines, # comments; keys are these names"},
    {"models", OPTION_TEXT, AT(models), "deploy/models", 0, 0, NULL, "folder of model directories, or one model directory"},
    {"listen", OPTION_TEXT, AT(listen), "127.0.0.1:8080", 0, 0, NULL, "HOST:PORT, [V6]:PORT or unix:PATH; port 0 picks a free one"},
    {"backend", OPTION_CHOICE, AT(backend), "auto", 0, 0, "auto|cpu|cuda|ref", "what computes; auto: a GPU where there is one"},
    {"devices", OPTION_TEXT, AT(devices), "0", 0, 0, NULL, "which of them: numbers from 0 such as 0,1, or all; of cpu each is a pool of threads"},
    {"precision", OPTION_CHOICE, AT(precision), "f32", 0, 0, "f32|tf32|bf16|f16|fp8|fp8-static", "number format of the matrix products; tf32, f16 and fp8 on GPUs"},
    {"any-bits", OPTION_SWITCH, AT(any_bits), "false", 0, 0, NULL, "GPUs: let an image's last bits depend on its batch; may be faster"},
    {"exact-residual", OPTION_SWITCH, AT(exact_residual), "false", 0, 0, NULL, "GPUs: keep the residual stream in float32, not float16"},
    {"cache", OPTION_TEXT, AT(cache), "", 0, 0, NULL, CACHE_HELP},
    {"max-rows", OPTION_NUMBER, AT(max_rows), "16", 2, 4096, NULL, "rows of the largest batch; a guided image takes two"},
    {"threads", OPTION_NUMBER, AT(threads), "0", 0, 1024, NULL, "compute threads; 0: what affinity and cgroup allow"},
    {"nice", OPTION_NUMBER, AT(nice), "19", 0, 19, NULL, "niceness of the compute threads"},
    {"max-jobs", OPTION_NUMBER, AT(max_jobs), "64", 1, 100000, NULL, "jobs that may wait or run, per model"},
    {"max-images", OPTION_NUMBER, AT(max_images), "1024", 1, 1000000, NULL, "images that may wait, per model"},
    {"max-connections", OPTION_NUMBER, AT(max_connections), "512", 4, 100000, NULL, "open connections; further ones wait in the kernel"},
    {"max-body", OPTION_SIZE, AT(max_body), "256K", 1024, 1 << 20, NULL, "largest request body"},
    {"default-timeout", OPTION_TIME, AT(default_timeout), "5m", 1, DAY_MS, NULL,
     "of a request without timeout_ms: queue, run and encoding together"},
    {"max-timeout", OPTION_TIME, AT(max_timeout), "1h", 1, DAY_MS, NULL, "largest timeout_ms that a request may ask for"},
    {"request-timeout", OPTION_TIME, AT(request_timeout), "30s", 100, DAY_MS, NULL, "a request's head and body must arrive within this"},
    {"idle-timeout", OPTION_TIME, AT(idle_timeout), "75s", 1000, DAY_MS, NULL, "silent connections are closed after this"},
    {"drain-delay", OPTION_TIME, AT(drain_delay), "0", 0, DAY_MS, NULL, "after SIGTERM: not ready, but still accepting, for this long"},
    {"exit-timeout", OPTION_TIME, AT(exit_timeout), "30s", 0, DAY_MS, NULL, "after that: how long accepted work may take to finish"},
    {"insecure-public", OPTION_SWITCH, AT(insecure_public), "false", 0, 0, NULL,
     "allow an address that other machines reach, without any key"},
    {"cors-origin", OPTION_TEXT, AT(cors_origin), "", 0, 0, NULL, "the one web origin that may call from a browser"},
    {"log-format", OPTION_CHOICE, AT(log_format), "json", 0, 0, "json|text", "one line an event"},
    {"log-level", OPTION_CHOICE, AT(log_level), "info", 0, 0, "debug|info|warn|error", "least level that is written"},
    {"log-file", OPTION_TEXT, AT(log_file), "", 0, 0, NULL, "instead of stderr; reopened on SIGHUP"},
};
#define N_OPTIONS ((int)(sizeof options / sizeof *options))
_Static_assert(N_OPTIONS <= CONFIG_OPTIONS, "struct config has room for every option's source");
static const struct option_set set = {options, N_OPTIONS, "SITD_"};

static int parse_devices(struct config *c, struct err *e) {
    const char *value = c->devices;
    char *end = NULL;
    c->n_devices = ENGINE_ALL;
    if (!strcmp(value, "all")) return OK;
    for (c->n_devices = 0; isdigit((unsigned char)*value) && c->n_devices < ENGINE_DEVICES; value = end + 1) {
        long n = strtol(value, &end, 10);
        if (n > 1023 || (*end && *end != ',')) break;
        c->device[c->n_devices++] = (int)n;
        if (!*end) return OK;
    }
    return err_param(e, E_RANGE, "devices", "devices is '%s', neither all nor up to %d numbers such as 0,1", c->devices, ENGINE_DEVICES);
}

int config_load(struct config *c, int argc, char **argv, bool *usage, struct err *e) {
    struct option_words words;
    *c = (struct config){0};
    int rc = options_load(&set, c, c->source, argc, argv, &words, usage, e);
    c->check_config = words.check_config, c->print_config = words.print_config, c->help = words.help, c->version = words.version;
    if (rc != OK || c->help || c->version) return rc;
    if (c->default_timeout > c->max_timeout)
        return err_param(e, E_RANGE, "default-timeout", "default-timeout is %lld ms, more than max-timeout, %lld ms",
                         (long long)c->default_timeout, (long long)c->max_timeout);
    return parse_devices(c, e);
}

void config_print(const struct config *c, FILE *to) { options_print(&set, c, c->source, to); }

void config_help(FILE *to) {
    fprintf(to, "usage: sitd serve [options]\n\nServes samples over HTTP. Each option is also a variable (--max-rows: "
                "SITD_MAX_ROWS) and a line of the config "
                "file.\n\n");
    options_help(&set, to);
    fprintf(to, "  --check-config     check the options and leave\n  --print-config     print the options in force as a config "
                "file and leave\n"
                "  --version, --help\n\nSignals: TERM, INT drain and leave (a second one: at once), HUP reopens the log file and looks "
                "for new models, USR1 logs the state.\n"
                "Exit codes: 0, 1 failure or work cut off, 2 usage, 65 corrupt checkpoint, 66 missing file, 69 no device, 77 "
                "permission, 78 configuration.\n");
}
