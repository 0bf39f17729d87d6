// SPDX-License-Identifier: MIT
/*
 * request_parse: JSON bytes to struct request, driven by one table.
 *
 * Each field of the contract is a line of `fields`: where it sits, how it is read, where it goes, its range. A field that the
 * contract names but this version does not do yet is a line too, so that the answer says "not supported", not "unknown". Three
 * decisions about numbers:
 *  - a boolean is not a number, and null is no way to say "default": null means unconditional in `classes` and nothing anywhere
 * else;
 *  - an integer field takes JSON integers only; 50.0 is refused, since a client that computes its step counts in floating point
 * will one day send 49.999999;
 *  - a real field takes integers too.
 */
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "proto/body.h"
#include "proto/near.h"
#include "proto/request_fields.h"

#define MAX_TEXT 256 // bytes of a model name or label

struct field;
struct reader {
    struct request *r;
    struct http_error *e;
    char path[96]; // dotted name of the field being read
};
struct field {
    const char *group, *name; // group NULL: top level
    int (*read)(struct reader *, const struct field *, json_t *);
    enum request_field id;
    size_t offset;            // in struct request
    double min, max;          // inclusive; read_positive excludes min
    const char *const *names; // read_name: NULL-terminated, index = enum value
    const char *const *later; // read_name: names of the contract that this version does not do
    const char *why;          // read_later
};

static int fail(struct reader *d, const char *code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static int fail(struct reader *d, const char *code, const char *fmt, ...) {
    char message[400];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(message, sizeof message, fmt, ap);
    va_end(ap);
    return http_error_set(d->e, 422, code, d->path, "%s %s", d->path, message);
}

static int no_memory(struct reader *d) { return http_error_set(d->e, 503, "out_of_memory", NULL, "out of memory"); }

static const char *kind_of(const json_t *v) {
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "a list";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a number with a fraction or exponent";
    case JSON_NULL:
        return "null";
    default:
        return "a boolean";
    }
}

static int wrong_type(struct reader *d, const char *wanted, const json_t *v) {
    return fail(d, "invalid_type", "must be %s, not %s", wanted, kind_of(v));
}

static void *target(struct reader *d, const struct field *f) { return (char *)d->r + f->offset; }

static int read_int(struct reader *d, const struct field *f, json_t *v) {
    if (!json_is_integer(v)) return wrong_type(d, "an integer", v);
    json_int_t n = json_integer_value(v);
    if (n < (json_int_t)f->min || n > (json_int_t)f->max)
        return fail(d, "out_of_range", "must be from %.0f to %.0f, not %" JSON_INTEGER_FORMAT, f->min, f->max, n);
    *(int64_t *)target(d, f) = n;
    return 0;
}

static int read_real(struct reader *d, const struct field *f, json_t *v) {
    if (!json_is_number(v)) return wrong_type(d, "a number", v);
    double x = json_number_value(v);
    if (!(x >= f->min && x <= f->max)) return fail(d, "out_of_range", "must be from %g to %g, not %g", f->min, f->max, x);
    *(double *)target(d, f) = x;
    return 0;
}

static int read_positive(struct reader *d, const struct field *f, json_t *v) {
    if (!json_is_number(v)) return wrong_type(d, "a number", v);
    double x = json_number_value(v);
    if (!(x > f->min && x <= f->max))
        return fail(d, "out_of_range", "must be above %g and at most %g, not %g", f->min, f->max, x);
    *(double *)target(d, f) = x;
    return 0;
}

static void list_names(const char *const *names, char *text, size_t size) {
    size_t len = 0;
    text[0] = 0;
    for (int i = 0; names[i] && len < size; i++) len += (size_t)snprintf(text + len, size - len, "%s%s", i ? ", " : "", names[i]);
}

static int read_name(struct reader *d, const struct field *f, json_t *v) {
    char all[160], near[160];
    list_names(f->names, all, sizeof all);
    if (!json_is_string(v)) return wrong_type(d, f->id == FIELD_W_T ? "a string or a list of knots [t, w]" : "a string", v);
    const char *s = json_string_value(v);
    struct near n;
    near_init(&n, s);
    for (int i = 0; f->names[i]; i++) {
        near_add(&n, f->names[i]);
        if (strcmp(s, f->names[i]) != 0) continue;
        *(int *)target(d, f) = i;
        return 0;
    }
    for (int i = 0; f->later && f->later[i]; i++)
        if (strcmp(s, f->later[i]) == 0)
            return fail(d, "not_supported", "\"%s\" is not supported by this version (supported: %s)", s, all);
    near_text(&n, near, sizeof near);
    return fail(d, "invalid_value", "must be one of %s, not \"%.60s\"%s", all, s, near);
}

static int read_bool(struct reader *d, const struct field *f, json_t *v) {
    if (!json_is_boolean(v)) return wrong_type(d, "true or false", v);
    *(bool *)target(d, f) = json_is_true(v);
    return 0;
}

// Two numbers of a knot; t from 0 to 1 and above the knot before, w from 0 up.
static int read_knot(struct reader *d, size_t i, const json_t *pair, struct sampler_curve *c) {
    const json_t *t = json_array_get(pair, 0), *w = json_array_get(pair, 1);
    if (json_array_size(pair) != 2 || !json_is_number(t) || !json_is_number(w))
        return fail(d, "invalid_type", "must be a list of knots, each two numbers [t, w]; knot %zu is not", i);
    c->t[i] = json_number_value(t);
    c->v[i] = json_number_value(w);
    if (!(c->t[i] >= 0 && c->t[i] <= 1) || (i > 0 && !(c->t[i] > c->t[i - 1])))
        return fail(d, "out_of_range", "must have knots with t from 0 to 1, rising; the t of knot %zu is %g", i, c->t[i]);
    if (!(c->v[i] >= 0 && c->v[i] <= 1e6))
        return fail(d, "out_of_range", "must have knots with w from 0 to 1e+06; the w of knot %zu is %g", i, c->v[i]);
    return 0;
}

static int read_w_t(struct reader *d, const struct field *f, json_t *v) {
    struct sampler_curve *c = &d->r->knots;
    if (!json_is_array(v)) {
        if (read_name(d, f, v) < 0) return -1;
        if (d->r->w_t == W_KNOTS) d->r->w_t = W_SBDM; // "kl": the paper's w is twice the command line's coefficient
        return 0;
    }
    size_t n = json_array_size(v);
    if (n < 1 || n > SAMPLER_KNOTS) return fail(d, "out_of_range", "must have from 1 to %d knots, not %zu", SAMPLER_KNOTS, n);
    for (size_t i = 0; i < n; i++)
        if (read_knot(d, i, json_array_get(v, i), c) < 0) return -1;
    c->n = (int)n;
    d->r->w_t = W_KNOTS;
    return 0;
}

// A field of the contract that belongs to something this version does not do.
static int read_later(struct reader *d, const struct field *f, json_t *v) {
    (void)v;
    return fail(d, "not_supported", "is not supported by this version: %s", f->why);
}

// The same, but the value that means "no" is what this version does anyway.
static int read_later_flag(struct reader *d, const struct field *f, json_t *v) {
    if (json_is_false(v) || (json_is_integer(v) && json_integer_value(v) == 0 && strcmp(f->name, "previews") == 0)) return 0;
    return read_later(d, f, v);
}

static int read_model(struct reader *d, const struct field *f, json_t *v) {
    (void)f;
    if (!json_is_string(v)) return wrong_type(d, "a string", v);
    const char *s = json_string_value(v), *at = strrchr(s, '@');
    size_t name = at ? (size_t)(at - s) : strlen(s);
    if (strlen(s) > MAX_TEXT) return fail(d, "out_of_range", "must have at most %d bytes", MAX_TEXT);
    if (name == 0) return fail(d, "invalid_value", "must be a name, name@version or name@digest");
    if (at && !at[1])
        return fail(d, "invalid_value",
                    "has nothing after the '@'; it takes a version (step) or a digest of 6 hex digits or more");
    d->r->model = mem_strdup(s);
    d->r->model_name = mem_strndup(s, name);
    return d->r->model && d->r->model_name ? 0 : no_memory(d);
}

static int read_class_ref(struct reader *d, json_t *v, struct class_ref *c) {
    *c = (struct class_ref){.id = -1};
    if (json_is_null(v)) return 0;
    if (json_is_string(v)) {
        if (json_string_length(v) == 0)
            return fail(d, "invalid_value", "is an empty string; a label is wanted (null is unconditional)");
        if (json_string_length(v) > MAX_TEXT) return fail(d, "out_of_range", "must have at most %d bytes", MAX_TEXT);
        c->label = mem_strdup(json_string_value(v));
        return c->label ? 0 : no_memory(d);
    }
    if (!json_is_integer(v)) return wrong_type(d, "a class id, a label or null", v);
    c->id = json_integer_value(v);
    if (c->id < 0) return fail(d, "out_of_range", "must be a class id from 0 up, not %" PRId64 " (null is unconditional)", c->id);
    return 0;
}

static int add_classes(struct reader *d, int n) {
    if (d->r->classes) return http_error_set(d->e, 422, "conflicting_fields", "class", "class and classes exclude each other");
    d->r->classes = mem_array((size_t)n, sizeof *d->r->classes);
    if (!d->r->classes) return no_memory(d);
    d->r->n_classes = n;
    return 0;
}

static int read_classes(struct reader *d, const struct field *f, json_t *v) {
    (void)f;
    if (!json_is_array(v)) return wrong_type(d, "a list (class, with n, is the short form)", v);
    size_t n = json_array_size(v);
    if (n < 1 || n > REQUEST_MAX_IMAGES)
        return fail(d, "out_of_range", "must have from 1 to %d entries, not %zu", REQUEST_MAX_IMAGES, n);
    if (add_classes(d, (int)n) < 0) return -1;
    for (size_t i = 0; i < n; i++) {
        snprintf(d->path, sizeof d->path, "classes[%zu]", i);
        if (read_class_ref(d, json_array_get(v, i), &d->r->classes[i]) < 0) return -1;
    }
    return 0;
}

static int read_class(struct reader *d, const struct field *f, json_t *v) {
    (void)f;
    return add_classes(d, 1) < 0 ? -1 : read_class_ref(d, v, d->r->classes);
}

static int read_seed(struct reader *d, const struct field *f, json_t *v) {
    (void)f;
    if (json_is_integer(v)) {
        if (json_integer_value(v) < 0)
            return fail(d, "out_of_range", "must be from 0 to 2^63-1 as a number, or a 64-bit value as a string of digits");
        d->r->seed = (uint64_t)json_integer_value(v);
        return 0;
    }
    if (!json_is_string(v)) return wrong_type(d, "an integer or a string of digits", v);
    const char *s = json_string_value(v);
    uint64_t seed = 0;
    bool good = *s && (s[0] != '0' || !s[1]);
    for (; *s && good; s++)
        good = *s >= '0' && *s <= '9' && !__builtin_mul_overflow(seed, (uint64_t)10, &seed) &&
               !__builtin_add_overflow(seed, (uint64_t)(*s - '0'), &seed);
    if (!good)
        return fail(d, "invalid_value",
                    "as a string must be the decimal digits of 0 to 18446744073709551615, without sign or leading zeros");
    d->r->seed = seed;
    return 0;
}

static int read_interval(struct reader *d, const struct field *f, json_t *v) {
    (void)f;
    if (!json_is_array(v) || json_array_size(v) != 2) return fail(d, "invalid_type", "must be a list of two numbers, [from, to]");
    for (size_t i = 0; i < 2; i++) {
        if (!json_is_number(json_array_get(v, i))) return wrong_type(d, "a list of two numbers", json_array_get(v, i));
        d->r->interval[i] = json_number_value(json_array_get(v, i));
    }
    double from = d->r->interval[0], to = d->r->interval[1];
    if (!(from >= 0 && from <= to && to <= 1))
        return fail(d, "out_of_range", "must have 0 <= from <= to <= 1, not [%g, %g]", from, to);
    return 0;
}

static int read_channels(struct reader *d, const struct field *f, json_t *v) {
    if (json_is_string(v) && strcmp(json_string_value(v), "all") == 0) {
        d->r->channels = -1;
        return 0;
    }
    return json_is_integer(v) ? read_int(d, f, v) : wrong_type(d, "a count of leading channels or \"all\"", v);
}

// Index = enum value of core/diffusion; a test compares them with its names. "kl" is an alias: read_w_t.
static const char *const paths[] = {"linear", "gvp", "vp", NULL}, *const types[] = {"ode", "sde", "ddpm", "ddim", "edm", NULL};
static const char *const methods[] = {"euler", "heun", "midpoint", "rk4", "dopri5", "exponential", "dpmpp2m", NULL};
static const char *const w_forms[] = {"constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing", "kl-eta", "kl", NULL};
static const char *const last_steps[] = {"none", "mean", "tweedie", "euler", NULL}, *const formats[] = {"png", NULL};
static const char *const rngs[] = {"native", "torch-cpu", NULL};
static const char *const spacings[] = {"openai", "ddim", "leading", "trailing", NULL}, *const later_formats[] = {"npy", NULL};

#define AT(member) offsetof(struct request, member)
static const struct field fields[] = {
    {NULL, "model", read_model, .id = FIELD_MODEL},
    {NULL, "classes", read_classes, .id = FIELD_CLASSES},
    {NULL, "class", read_class, .id = FIELD_CLASS},
    {NULL, "n", read_int, FIELD_N, AT(n), .min = 1, .max = REQUEST_MAX_IMAGES},
    {NULL, "seed", read_seed, .id = FIELD_SEED},
    {NULL, "seed_index", read_int, FIELD_SEED_INDEX, AT(seed_index), .min = 0, .max = 4294967295.0},
    {NULL, "rng", read_name, FIELD_RNG, AT(rng), .names = rngs},
    {NULL, "interpolant", read_name, FIELD_INTERPOLANT, AT(interpolant), .names = paths},
    {NULL, "timeout_ms", read_int, FIELD_TIMEOUT, AT(timeout_ms), .min = 1, .max = REQUEST_MAX_TIMEOUT_MS},
    {NULL, "priority", read_int, FIELD_PRIORITY, AT(priority), .min = -100, .max = 100},
    {"sampler", "type", read_name, FIELD_TYPE, AT(type), .names = types},
    {"sampler", "method", read_name, FIELD_METHOD, AT(method), .names = methods},
    {"sampler", "steps", read_int, FIELD_STEPS, AT(steps), .min = 1, .max = SAMPLER_MAX_STEPS},
    {"sampler", "max_evaluations", read_int, FIELD_MAX_EVALUATIONS, AT(max_evaluations), .min = 8,
     .max = SAMPLER_MAX_EVALUATIONS},
    {"sampler", "w_t", read_w_t, FIELD_W_T, AT(w_t), .names = w_forms},
    {"sampler", "w_t_scale", read_positive, FIELD_W_T_SCALE, AT(w_t_scale), .min = 0, .max = 1000},
    {"sampler", "last_step", read_name, FIELD_LAST_STEP, AT(last_step), .names = last_steps},
    {"sampler", "last_step_size", read_real, FIELD_LAST_STEP_SIZE, AT(last_step_size), .min = 0, .max = 1},
    {"sampler", "atol", read_real, FIELD_ATOL, AT(atol), .min = SAMPLER_MIN_ATOL, .max = 1},
    {"sampler", "rtol", read_positive, FIELD_RTOL, AT(rtol), .min = 0, .max = 1},
    {"sampler", "w_t_eta", read_real, FIELD_W_T_ETA, AT(w_t_eta), .min = 0, .max = 1e6},
    {"sampler", "spacing", read_name, FIELD_SPACING, AT(spacing), .names = spacings},
    {"sampler", "eta", read_real, FIELD_ETA, AT(eta), .min = 0, .max = 1},
    {"sampler", "clip", read_bool, .id = FIELD_CLIP, .offset = AT(clip)},
    {"sampler", "denoise", read_bool, .id = FIELD_DENOISE, .offset = AT(denoise)},
    {"sampler", "churn", read_real, FIELD_CHURN, AT(churn), .min = 0, .max = 1e6},
    {"sampler", "s_min", read_real, FIELD_S_MIN, AT(s_min), .min = 0, .max = 1e6},
    {"sampler", "s_max", read_real, FIELD_S_MAX, AT(s_max), .min = 0, .max = 1e6},
    {"sampler", "s_noise", read_real, FIELD_S_NOISE, AT(s_noise), .min = 0, .max = 100},
    {"sampler", "rho", read_real, FIELD_RHO, AT(rho), .min = 0.1, .max = 100},
    {"sampler", "sigma_min", read_positive, FIELD_SIGMA_MIN, AT(sigma_min), .min = 0, .max = 1e5},
    {"sampler", "sigma_max", read_positive, FIELD_SIGMA_MAX, AT(sigma_max), .min = 0, .max = 1e5},
    {"guidance", "scale", read_real, FIELD_SCALE, AT(scale), .min = 0, .max = 1000},
    {"guidance", "interval", read_interval, .id = FIELD_INTERVAL},
    {"guidance", "channels", read_channels, FIELD_CHANNELS, AT(channels), .min = 1, .max = 1 << 20},
    {"output", "format", read_name, FIELD_FORMAT, AT(format), .names = formats, .later = later_formats},
    {"output", "compression", read_int, FIELD_COMPRESSION, AT(compression), .min = 0, .max = 9},
    {NULL, "stream", read_later_flag, .why = "the answer comes whole"},
    {NULL, "previews", read_later_flag, .why = "the answer comes whole"},
    {NULL, "async", read_later_flag, .why = "every request is answered when it is done"},
};
#define N_FIELDS (sizeof fields / sizeof *fields)
static const char *const groups[] = {"sampler", "guidance", "output", NULL};

// Names that other tools use for our fields: for the error's suggestion only.
static const char *const aliases[][2] = {
    {"cfg_scale", "guidance.scale"},
    {"guidance_scale", "guidance.scale"},
    {"num_steps", "sampler.steps"},
    {"num_inference_steps", "sampler.steps"},
    {"num_sampling_steps", "sampler.steps"},
    {"diffusion_form", "sampler.w_t"},
    {"diffusion_norm", "sampler.w_t_scale"},
    {"path_type", "interpolant"},
    {"class_label", "class"},
    {"class_labels", "classes"},
    {"labels", "classes"},
    {"prompt", "class"},
    {"mode", "sampler.type"},
    {"sampling_method", "sampler.method"},
    {"cfg", "guidance.scale"},
    {"num_images", "n"},
    {"S_churn", "sampler.churn"},
    {"clip_denoised", "sampler.clip"},
    {"timestep_respacing", "sampler.spacing"},
};

static bool same_group(const char *a, const char *b) { return a == b || (a && b && strcmp(a, b) == 0); }

static void dotted(const struct field *f, char *text, size_t size) {
    snprintf(text, size, "%s%s%s", f->group ? f->group : "", f->group ? "." : "", f->name);
}

static int unknown_field(struct reader *d, const char *group, const char *key) {
    char names[N_FIELDS][40], text[200];
    struct near near;
    near_init(&near, key);
    for (size_t i = 0; i < sizeof aliases / sizeof *aliases; i++)
        if (strcmp(aliases[i][0], key) == 0)
            return fail(d, "unknown_field", "is not a field of this request; did you mean %s?", aliases[i][1]);
    for (size_t i = 0; i < N_FIELDS; i++) {
        dotted(&fields[i], names[i], sizeof names[i]);
        if (!same_group(fields[i].group, group) && strcmp(fields[i].name, key) == 0)
            return fail(d, "unknown_field", "is not a field of this request; did you mean %s?", names[i]);
        if (same_group(fields[i].group, group)) near_add(&near, fields[i].name);
    }
    for (int i = 0; !group && groups[i]; i++) near_add(&near, groups[i]);
    near_text(&near, text, sizeof text);
    return fail(d, "unknown_field", "is not a field of this request%s", text);
}

static int read_object(struct reader *d, const char *group, json_t *object) {
    const char *key;
    json_t *v;
    json_object_foreach(object, key, v) {
        snprintf(d->path, sizeof d->path, "%s%s%s", group ? group : "", group ? "." : "", key);
        const struct field *f = NULL;
        for (size_t i = 0; i < N_FIELDS; i++)
            if (same_group(fields[i].group, group) && strcmp(fields[i].name, key) == 0) f = &fields[i];
        bool is_group = false;
        for (int i = 0; !group && groups[i]; i++) is_group |= strcmp(groups[i], key) == 0;
        if (is_group) {
            if (!json_is_object(v)) return wrong_type(d, "an object", v);
            if (read_object(d, key, v) < 0) return -1;
        } else if (!f) return unknown_field(d, group, key);
        else if (f->read(d, f, v) < 0) return -1;
        else if (f->read != read_later_flag) d->r->given |= UINT64_C(1) << f->id;
    }
    return 0;
}

static int check_whole(const struct request *r, struct http_error *e) {
    if (!r->classes)
        return http_error_set(e, 422, "missing_field", "classes",
                              "classes is required: a list of class ids, labels or null (or class, with n, for one class)");
    if (request_has(r, FIELD_N) && !request_has(r, FIELD_CLASS))
        return http_error_set(e, 422, "conflicting_fields", "n",
                              "n goes with class; the length of classes is the number of images");
    return 0;
}

int request_parse(struct request **out, const char *body, size_t len, struct http_error *e) {
    json_t *root;
    *out = NULL;
    if (body_read(&root, body, len, e) < 0) return -1;
    struct request *r = mem_alloc(sizeof *r);
    struct reader d = {.r = r, .e = e};
    int rc = 0;
    if (!r) rc = no_memory(&d);
    else if (!json_is_object(root))
        rc = http_error_set(e, 422, "invalid_type", NULL, "the body must be an object, not %s", kind_of(root));
    else rc = read_object(&d, NULL, root) < 0 || check_whole(r, e) < 0 ? -1 : 0;
    json_decref(root);
    if (rc == 0) *out = r;
    else request_free(r);
    return rc;
}

void request_free(struct request *r) {
    if (!r) return;
    for (int i = 0; i < r->n_classes; i++) mem_free((char *)r->classes[i].label);
    mem_free(r->classes);
    mem_free(r->model);
    mem_free(r->model_name);
    mem_free(r);
}

const char *request_model(const struct request *r) { return r->model; }
const char *request_model_name(const struct request *r) { return r->model_name; }
