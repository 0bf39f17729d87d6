// SPDX-License-Identifier: MIT
#include "server/options.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SWITCH_WORDS "true|false|1|0|yes|no"

enum source { FROM_DEFAULT, FROM_FILE, FROM_ENV, FROM_FLAG };

struct loading {
    const struct option_set *set;
    void *values;
    unsigned char *source;
};

static const struct option_desc *find(const struct option_set *set, const char *name, size_t len) {
    for (const struct option_desc *o = set->list; o < set->list + set->n; o++)
        if (o->kind != OPTION_HEADING && strlen(o->name) == len && !memcmp(o->name, name, len)) return o;
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
static bool parse_number(enum option_kind kind, const char *value, int64_t *out) {
    static const struct {
        enum option_kind kind;
        const char *unit;
        int64_t factor;
    } units[] = {
        {OPTION_NUMBER, "", 1},      {OPTION_SIZE, "", 1},      {OPTION_SIZE, "K", 1024},
        {OPTION_SIZE, "M", 1 << 20}, {OPTION_TIME, "", 1000},   {OPTION_TIME, "ms", 1},
        {OPTION_TIME, "s", 1000},    {OPTION_TIME, "m", 60000}, {OPTION_TIME, "h", 3600000},
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

static int set_number(const struct option_desc *o, void *field, const char *value, const char *where, struct err *e) {
    int64_t n = 0;
    char *end;
    double d = o->kind == OPTION_REAL ? strtod(value, &end) : 0;
    bool good = o->kind == OPTION_REAL ? end != value && !*end && isfinite(d) : parse_number(o->kind, value, &n);
    if (!good)
        return err_param(e, E_RANGE, o->name, "%s: %s is '%s', not a %s", where, o->name, value,
                         o->kind == OPTION_TIME   ? "length of time such as 500ms, 30s or 5m"
                         : o->kind == OPTION_REAL ? "number"
                                                  : "whole number");
    if (o->kind != OPTION_REAL) d = (double)n;
    if (d < o->least || d > o->most)
        return err_param(e, E_RANGE, o->name, "%s: %s is %.15g, outside %.15g..%.15g%s", where, o->name, d, o->least, o->most,
                         o->kind == OPTION_TIME ? " ms" : "");
    if (o->kind == OPTION_REAL) *(double *)field = d;
    else *(int64_t *)field = n;
    return OK;
}

static int set(struct loading *l, const struct option_desc *o, const char *value, enum source source, const char *where,
               struct err *e) {
    void *field = (char *)l->values + o->offset;
    switch (o->kind) {
    case OPTION_TEXT:
    case OPTION_CHOICE:
        if (strlen(value) >= OPTION_TEXT_SIZE)
            return err_param(e, E_RANGE, o->name, "%s: %s is longer than %d bytes", where, o->name, OPTION_TEXT_SIZE - 1);
        if (o->kind == OPTION_CHOICE && !is_choice(o->choices, value))
            return err_param(e, E_RANGE, o->name, "%s: %s is '%s', not one of %s", where, o->name, value, o->choices);
        strcpy(field, value);
        break;
    case OPTION_SWITCH:
        if (!is_choice(SWITCH_WORDS, value))
            return err_param(e, E_RANGE, o->name, "%s: %s is '%s', not true or false", where, o->name, value);
        *(bool *)field = *value == 't' || *value == '1' || *value == 'y';
        break;
    default:
        if (set_number(o, field, value, where, e)) return e->status;
    }
    l->source[o - l->set->list] = source;
    return 0;
}

static int load_environment(struct loading *l, struct err *e) {
    for (const struct option_desc *o = l->set->list; o < l->set->list + l->set->n; o++) {
        char name[64];
        size_t n = strlen(strcpy(name, l->set->prefix));
        if (o->kind == OPTION_HEADING) continue;
        for (const char *p = o->name; *p; p++) name[n++] = (char)(*p == '-' ? '_' : toupper((unsigned char)*p));
        name[n] = 0;
        const char *value = getenv(name);
        if (value && set(l, o, value, FROM_ENV, name, e)) return e->status;
    }
    return 0;
}

static int load_line(struct loading *l, char *line, const char *where, struct err *e) {
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
    const struct option_desc *o = find(l->set, key, len);
    if (!o || o == l->set->list) return err_set(e, E_RANGE, "%s: no option '%.*s'", where, (int)len, key);
    return set(l, o, value, FROM_FILE, where, e);
}

#define MOST_LINES 10000 // of a file; there are devices without an end

static int load_file(struct loading *l, const char *path, struct err *e) {
    FILE *f = fopen(path, "re");
    if (!f) return err_param(e, errno == EACCES ? E_PERM : E_NOTFOUND, "config", "%s: %s", path, strerror(errno));
    char line[OPTION_TEXT_SIZE + 256], where[OPTION_TEXT_SIZE + 32];
    int rc = 0;
    for (int n = 1; !rc && fgets(line, sizeof line, f); n++) {
        snprintf(where, sizeof where, "%s:%d", path, n);
        if (n > MOST_LINES) rc = err_set(e, E_RANGE, "%s: %d lines are no file of options", path, n);
        else if (strlen(line) == sizeof line - 1) rc = err_set(e, E_RANGE, "%s: line too long", where);
        else rc = load_line(l, line, where, e);
    }
    if (!rc && ferror(f)) rc = err_set(e, E_IO, "%s: cannot be read", path);
    fclose(f);
    return rc;
}

// One flag at argv[*i]; moves *i over its value.
static int load_flag(struct loading *l, struct option_words *words, int argc, char **argv, int *i, struct err *e) {
    struct {
        const char *name;
        bool *field;
    } switches[] = {{"--check-config", &words->check_config},
                    {"--print-config", &words->print_config},
                    {"--help", &words->help},
                    {"--version", &words->version}};
    const char *arg = argv[*i];
    for (size_t k = 0; k < sizeof switches / sizeof *switches; k++)
        if (!strcmp(arg, switches[k].name)) {
            *switches[k].field = true;
            return 0;
        }
    if (strncmp(arg, "--", 2) != 0) return err_set(e, E_RANGE, "'%s' is not an option", arg);
    size_t len = strcspn(arg + 2, "=");
    const struct option_desc *o = find(l->set, arg + 2, len);
    if (!o) return err_set(e, E_RANGE, "no option '%.*s'", (int)len + 2, arg);
    char where[64];
    snprintf(where, sizeof where, "--%s", o->name);
    if (arg[2 + len]) return set(l, o, arg + 3 + len, FROM_FLAG, where, e);
    bool said = *i + 1 < argc && is_choice(SWITCH_WORDS, argv[*i + 1]);
    if (o->kind == OPTION_SWITCH) return set(l, o, said ? argv[++*i] : "true", FROM_FLAG, where, e);
    if (*i + 1 >= argc) return err_set(e, E_RANGE, "--%s needs a value", o->name);
    return set(l, o, argv[++*i], FROM_FLAG, where, e);
}

static int load_flags(struct loading *l, struct option_words *words, int argc, char **argv, bool *usage, struct err *e) {
    *usage = true;
    for (int i = 1; i < argc; i++)
        if (load_flag(l, words, argc, argv, &i, e)) return e->status;
    *usage = false;
    return OK;
}

int options_load(const struct option_set *s, void *values, unsigned char *source, int argc, char **argv,
                 struct option_words *words, bool *usage, struct err *e) {
    struct loading l = {s, values, source};
    const char *config = (const char *)values + s->list[0].offset;
    char variable[64];
    *words = (struct option_words){0};
    *usage = false;
    for (int i = 0; i < s->n; i++)
        if (s->list[i].kind != OPTION_HEADING && set(&l, &s->list[i], s->list[i].value, FROM_DEFAULT, "default", e))
            return e->status;
    int rc = load_flags(&l, words, argc, argv, usage,
                        e); // first for --config and --help, which must work whatever else says; again below
    if (rc != OK || words->help || words->version) return rc;
    snprintf(variable, sizeof variable, "%sCONFIG", s->prefix);
    char path[OPTION_TEXT_SIZE];
    const char *named = source[0] == FROM_FLAG ? config : getenv(variable);
    snprintf(path, sizeof path, "%s", named ? named : "");
    if (*path && load_file(&l, path, e)) return e->status;
    if (load_environment(&l, e)) return e->status;
    return load_flags(&l, words, argc, argv, usage, e);
}

void options_value(const struct option_set *s, const void *values, int i, char text[OPTION_TEXT_SIZE]) {
    const struct option_desc *o = &s->list[i];
    const void *field = (const char *)values + o->offset;
    size_t size = OPTION_TEXT_SIZE;
    if (o->kind == OPTION_TEXT || o->kind == OPTION_CHOICE) snprintf(text, size, "%s", (const char *)field);
    else if (o->kind == OPTION_SWITCH) snprintf(text, size, "%s", *(const bool *)field ? "true" : "false");
    else if (o->kind == OPTION_REAL) snprintf(text, size, "%.15g", *(const double *)field);
    else snprintf(text, size, "%lld%s", (long long)*(const int64_t *)field, o->kind == OPTION_TIME ? "ms" : "");
}

void options_print(const struct option_set *s, const void *values, const unsigned char *source, FILE *to) {
    static const char *const sources[] = {"default", "file", "environment", "flag"};
    char value[OPTION_TEXT_SIZE];
    for (int i = 1; i < s->n; i++) {
        if (s->list[i].kind == OPTION_HEADING) continue;
        options_value(s, values, i, value);
        fprintf(to, "# %s\n%s = %s\n", sources[source[i]], s->list[i].name, value);
    }
}

void options_help(const struct option_set *s, FILE *to) {
    for (const struct option_desc *o = s->list; o < s->list + s->n; o++) {
        if (o->kind == OPTION_HEADING) {
            fprintf(to, "\n%s\n", o->help);
            continue;
        }
        fprintf(to, "  --%-16s %s", o->name, o->help);
        if (o->choices) fprintf(to, ": %s", o->choices);
        if (*o->value) fprintf(to, " (%s)", o->value);
        fprintf(to, "\n");
    }
}
