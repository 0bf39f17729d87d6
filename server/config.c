// SPDX-License-Identifier: MIT
#include "server/config.h"

#include <ctype.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum kind { TEXT, CHOICE, NUMBER, SIZE, TIME, SWITCH };
enum source { FROM_DEFAULT, FROM_FILE, FROM_ENV, FROM_FLAG };

struct option {
    const char *name;
    enum kind kind;
    size_t offset;
    const char *value;   // the default, as it would be typed
    int64_t least, most; // NUMBER, SIZE (bytes), TIME (ms)
    const char *choices; // CHOICE: words separated by |
    const char *help;
};

#define AT(field) offsetof(struct config, field)
#define DAY_MS ((int64_t)24 * 3600 * 1000)
static const struct option options[] = {
    {"config", TEXT, AT(config), "", 0, 0, NULL, "file of `key = value` lines, # comments; keys are these names"},
    {"models", TEXT, AT(models), "deploy/models", 0, 0, NULL, "folder of model directories, or one model directory"},
    {"listen", TEXT, AT(listen), "127.0.0.1:8080", 0, 0, NULL, "HOST:PORT, [V6]:PORT or unix:PATH; port 0 picks a free one"},
    {"backend", CHOICE, AT(backend), "auto", 0, 0, "auto|cpu|ref", "what computes"},
    {"precision", CHOICE, AT(precision), "f32", 0, 0, "f32|bf16", "number format of the matrix products"},
    {"max-rows", NUMBER, AT(max_rows), "16", 2, 4096, NULL, "rows of the largest batch; a guided image takes two"},
    {"threads", NUMBER, AT(threads), "0", 0, 1024, NULL, "compute threads; 0: what affinity and cgroup allow"},
    {"nice", NUMBER, AT(nice), "19", 0, 19, NULL, "niceness of the compute threads"},
    {"max-jobs", NUMBER, AT(max_jobs), "64", 1, 100000, NULL, "jobs that may wait or run, per model"},
    {"max-images", NUMBER, AT(max_images), "1024", 1, 1000000, NULL, "images that may wait, per model"},
    {"max-connections", NUMBER, AT(max_connections), "512", 4, 100000, NULL, "open connections; further ones wait in the kernel"},
    {"max-body", SIZE, AT(max_body), "256K", 1024, 1 << 20, NULL, "largest request body"},
    {"default-timeout", TIME, AT(default_timeout), "5m", 1, DAY_MS, NULL,
     "of a request without timeout_ms: queue, run and encoding together"},
    {"max-timeout", TIME, AT(max_timeout), "1h", 1, DAY_MS, NULL, "largest timeout_ms that a request may ask for"},
    {"request-timeout", TIME, AT(request_timeout), "30s", 100, DAY_MS, NULL, "a request's head and body must arrive within this"},
    {"idle-timeout", TIME, AT(idle_timeout), "75s", 1000, DAY_MS, NULL, "silent connections are closed after this"},
    {"drain-delay", TIME, AT(drain_delay), "0", 0, DAY_MS, NULL, "after SIGTERM: not ready, but still accepting, for this long"},
    {"exit-timeout", TIME, AT(exit_timeout), "30s", 0, DAY_MS, NULL, "after that: how long accepted work may take to finish"},
    {"insecure-public", SWITCH, AT(insecure_public), "false", 0, 0, NULL,
     "allow an address that other machines reach, without any key"},
    {"cors-origin", TEXT, AT(cors_origin), "", 0, 0, NULL, "the one web origin that may call from a browser"},
    {"log-format", CHOICE, AT(log_format), "json", 0, 0, "json|text", "one line an event"},
    {"log-level", CHOICE, AT(log_level), "info", 0, 0, "debug|info|warn|error", "least level that is written"},
    {"log-file", TEXT, AT(log_file), "", 0, 0, NULL, "instead of stderr; reopened on SIGHUP"},
};
#define N_OPTIONS (sizeof options / sizeof *options)
_Static_assert(N_OPTIONS <= CONFIG_OPTIONS, "struct config has room for every option's source");

static const struct option *find(const char *name, size_t len) {
    for (size_t i = 0; i < N_OPTIONS; i++)
        if (strlen(options[i].name) == len && !memcmp(options[i].name, name, len)) return &options[i];
    return NULL;
}

static bool is_choice(const char *choices, const char *value) {
    size_t len = strlen(value);
    for (const char *word = choices, *end; *word; word = end + (*end == '|')) {
        end = word + strcspn(word, "|");
        if ((size_t)(end - word) == len && !memcmp(word, value, len)) return true;
    }
    return false;
}

// A whole number and perhaps a unit, in the option's own measure; false if it is not one or does not fit.
static bool parse_number(enum kind kind, const char *value, int64_t *out) {
    static const struct {
        enum kind kind;
        const char *unit;
        int64_t factor;
    } units[] = {
        {NUMBER, "", 1}, {SIZE, "", 1},     {SIZE, "K", 1024},  {SIZE, "M", 1 << 20}, {TIME, "", 1000},
        {TIME, "ms", 1}, {TIME, "s", 1000}, {TIME, "m", 60000}, {TIME, "h", 3600000},
    };
    char *end;
    if (!isdigit((unsigned char)*value)) return false;
    errno = 0;
    long long n = strtoll(value, &end, 10);
    if (errno) return false;
    for (size_t i = 0; i < sizeof units / sizeof *units; i++)
        if (units[i].kind == kind && !strcmp(units[i].unit, end)) return !__builtin_mul_overflow(n, units[i].factor, out);
    return false;
}

static int set(struct config *c, const struct option *o, const char *value, enum source source, const char *where,
               struct err *e) {
    void *field = (char *)c + o->offset;
    int64_t n = 0;
    switch (o->kind) {
    case TEXT:
    case CHOICE:
        if (strlen(value) >= CONFIG_TEXT)
            return err_param(e, E_RANGE, o->name, "%s: %s is longer than %d bytes", where, o->name, CONFIG_TEXT - 1);
        if (o->kind == CHOICE && !is_choice(o->choices, value))
            return err_param(e, E_RANGE, o->name, "%s: %s is '%s', not one of %s", where, o->name, value, o->choices);
        strcpy(field, value);
        break;
    case SWITCH:
        if (!is_choice("true|false|1|0|yes|no", value))
            return err_param(e, E_RANGE, o->name, "%s: %s is '%s', not true or false", where, o->name, value);
        *(bool *)field = *value == 't' || *value == '1' || *value == 'y';
        break;
    default:
        if (!parse_number(o->kind, value, &n))
            return err_param(e, E_RANGE, o->name, "%s: %s is '%s', not a %s", where, o->name, value,
                             o->kind == TIME ? "length of time such as 500ms, 30s or 5m" : "whole number");
        if (n < o->least || n > o->most)
            return err_param(e, E_RANGE, o->name, "%s: %s is %lld, outside %lld..%lld%s", where, o->name, (long long)n,
                             (long long)o->least, (long long)o->most, o->kind == TIME ? " ms" : "");
        *(int64_t *)field = n;
    }
    c->source[o - options] = source;
    return 0;
}

static int load_environment(struct config *c, struct err *e) {
    for (size_t i = 0; i < N_OPTIONS; i++) {
        char name[64] = "SITD_";
        size_t n = strlen(name);
        for (const char *p = options[i].name; *p; p++) name[n++] = (char)(*p == '-' ? '_' : toupper((unsigned char)*p));
        const char *value = getenv(name);
        if (value && set(c, &options[i], value, FROM_ENV, name, e)) return e->status;
    }
    return 0;
}

static int load_line(struct config *c, char *line, const char *where, struct err *e) {
    line[strcspn(line, "\r\n")] = 0;
    char *key = line + strspn(line, " \t");
    if (!*key || *key == '#') return 0;
    size_t len = strcspn(key, " \t=");
    char *value = key + len + strspn(key + len, " \t");
    if (*value != '=') return err_set(e, E_RANGE, "%s: not a `key = value` line", where);
    value += 1 + strspn(value + 1, " \t");
    for (size_t n = strlen(value); n && isspace((unsigned char)value[n - 1]); n--) value[n - 1] = 0;
    for (size_t i = 0; i < len; i++)
        if (key[i] == '_') key[i] = '-';
    const struct option *o = find(key, len);
    if (!o || o == &options[0]) return err_set(e, E_RANGE, "%s: no option '%.*s'", where, (int)len, key);
    return set(c, o, value, FROM_FILE, where, e);
}

static int load_file(struct config *c, const char *path, struct err *e) {
    FILE *f = fopen(path, "re");
    if (!f) return err_param(e, errno == EACCES ? E_PERM : E_NOTFOUND, "config", "%s: %s", path, strerror(errno));
    char line[CONFIG_TEXT + 256], where[CONFIG_TEXT + 32];
    int rc = 0;
    for (int n = 1; !rc && fgets(line, sizeof line, f); n++) {
        snprintf(where, sizeof where, "%s:%d", path, n);
        if (strlen(line) == sizeof line - 1) rc = err_set(e, E_RANGE, "%s: line too long", where);
        else rc = load_line(c, line, where, e);
    }
    if (!rc && ferror(f)) rc = err_set(e, E_IO, "%s: cannot be read", path);
    fclose(f);
    return rc;
}

// One flag at argv[*i]; moves *i over its value.
static int load_flag(struct config *c, int argc, char **argv, int *i, struct err *e) {
    struct {
        const char *name;
        bool *field;
    } switches[] = {{"--check-config", &c->check_config},
                    {"--print-config", &c->print_config},
                    {"--help", &c->help},
                    {"--version", &c->version}};
    const char *arg = argv[*i];
    for (size_t k = 0; k < sizeof switches / sizeof *switches; k++)
        if (!strcmp(arg, switches[k].name)) {
            *switches[k].field = true;
            return 0;
        }
    if (strncmp(arg, "--", 2) != 0) return err_set(e, E_RANGE, "'%s' is not an option", arg);
    size_t len = strcspn(arg + 2, "=");
    const struct option *o = find(arg + 2, len);
    if (!o) return err_set(e, E_RANGE, "no option '%.*s'", (int)len + 2, arg);
    char where[64];
    snprintf(where, sizeof where, "--%s", o->name);
    if (arg[2 + len]) return set(c, o, arg + 3 + len, FROM_FLAG, where, e);
    if (o->kind == SWITCH) return set(c, o, "true", FROM_FLAG, where, e);
    if (*i + 1 >= argc) return err_set(e, E_RANGE, "--%s needs a value", o->name);
    return set(c, o, argv[++*i], FROM_FLAG, where, e);
}

int config_load(struct config *c, int argc, char **argv, bool *usage, struct err *e) {
    *c = (struct config){0};
    *usage = false;
    for (size_t i = 0; i < N_OPTIONS; i++)
        if (set(c, &options[i], options[i].value, FROM_DEFAULT, "default", e)) return e->status;
    struct config flags = *c; // read first, for --config; applied last
    *usage = true;
    for (int i = 1; i < argc; i++)
        if (load_flag(&flags, argc, argv, &i, e)) return e->status;
    *usage = false;
    if (flags.help || flags.version) { // these must work whatever the environment says
        *c = flags;
        return 0;
    }
    const char *path = flags.source[0] == FROM_FLAG ? flags.config : getenv("SITD_CONFIG");
    if (path && *path && load_file(c, path, e)) return e->status;
    if (load_environment(c, e)) return e->status;
    for (int i = 1; i < argc; i++)
        if (load_flag(c, argc, argv, &i, e)) return e->status;
    if (c->default_timeout > c->max_timeout)
        return err_param(e, E_RANGE, "default-timeout", "default-timeout is %lld ms, more than max-timeout, %lld ms",
                         (long long)c->default_timeout, (long long)c->max_timeout);
    return 0;
}

void config_print(const struct config *c, FILE *to) {
    static const char *const sources[] = {"default", "file", "environment", "flag"};
    for (size_t i = 1; i < N_OPTIONS; i++) {
        const struct option *o = &options[i];
        const void *field = (const char *)c + o->offset;
        char value[CONFIG_TEXT];
        if (o->kind == TEXT || o->kind == CHOICE) snprintf(value, sizeof value, "%s", (const char *)field);
        else if (o->kind == SWITCH) snprintf(value, sizeof value, "%s", *(const bool *)field ? "true" : "false");
        else snprintf(value, sizeof value, "%lld%s", (long long)*(const int64_t *)field, o->kind == TIME ? "ms" : "");
        fprintf(to, "# %s\n%s = %s\n", sources[c->source[i]], o->name, value);
    }
}

void config_help(FILE *to) {
    fprintf(to, "usage: sitd serve [options]\n\nServes samples over HTTP. Each option is also a variable (--max-rows: "
                "SITD_MAX_ROWS) and a line of the config "
                "file.\n\n");
    for (size_t i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &options[i];
        fprintf(to, "  --%-16s %s", o->name, o->help);
        if (o->choices) fprintf(to, ": %s", o->choices);
        if (*o->value) fprintf(to, " (%s)", o->value);
        fprintf(to, "\n");
    }
    fprintf(to, "  --check-config     check the options and leave\n  --print-config     print the options in force as a config "
                "file and leave\n"
                "  --version, --help\n\nSignals: TERM, INT drain and leave (a second one: at once), HUP reopens the log file and looks "
                "for new models, USR1 logs the state.\n"
                "Exit codes: 0, 1 failure or work cut off, 2 usage, 65 corrupt checkpoint, 66 missing file, 69 no device, 77 "
                "permission, 78 configuration.\n");
}
