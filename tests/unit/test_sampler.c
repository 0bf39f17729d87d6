// SPDX-License-Identifier: MIT
// The sampler's contract: names, ranges, finite coefficients, counts, guidance, copies. The mathematics is in the
// test_sampler_*.c beside this.
#include "core/diffusion/sampler.h"

#include <math.h>

#include "tests/test.h"
#include "tests/unit/gauss.h"

static void mild_net(void *ctx, const struct sampler_step *st, const double *x, double *f, int n) {
    (void)ctx;
    for (int e = 0; e < n; e++) f[e] = 0.3 * sin(x[e] + st->t) - 0.2;
}

TEST(sampler_names) {
    CHECK_STR(w_form_name(W_INC_DEC), "increasing-decreasing");
    CHECK(w_form_parse("kl") == W_SBDM && w_form_parse("SBDM") == -1 && w_form_parse(NULL) == -1);
    for (int i = 0; i < W_COUNT; i++) CHECK(w_form_parse(w_form_name(i)) == i);
    for (int i = 0; i < METHOD_COUNT; i++) CHECK(sampler_method_parse(sampler_method_name(i)) == i);
    for (int i = 0; i < SAMPLER_TYPE_COUNT; i++) CHECK(sampler_type_parse(sampler_type_name(i)) == i);
    for (int i = 0; i < LAST_COUNT; i++) CHECK(last_step_parse(last_step_name(i)) == i);
    CHECK(sampler_method_parse("heun2") == -1 && last_step_parse("") == -1);
    CHECK_STR(sampler_method_name(-1), "?");
    CHECK_STR(last_step_name(LAST_COUNT), "?");
}

static const struct sampler_model linear = {.path = PATH_LINEAR, .prediction = PRED_VELOCITY};

static void refused(const struct sampler_spec *spec, const char *param) {
    struct err e = { 0 };
    CHECK(sampler_check(spec, &linear, &e) == E_RANGE);
    CHECK_STR(e.param, param);
    CHECK(strstr(e.text, param) != NULL);
    struct sampler s;
    CHECK(sampler_start(&s, spec, &linear, false, NULL) == E_RANGE);
}

#define REFUSED(type, field, value, param)                                                                                       \
    do {                                                                                                                         \
        struct sampler_spec q_;                                                                                                  \
        sampler_defaults(&q_, &linear, type);                                                                                    \
        q_.field = value;                                                                                                        \
        refused(&q_, param);                                                                                                     \
    } while (0)
#define REFUSED_DOPRI5(field, value, param)                                                                                      \
    do {                                                                                                                         \
        struct sampler_spec q_;                                                                                                  \
        sampler_defaults(&q_, &linear, SAMPLER_ODE);                                                                             \
        q_.method = METHOD_DOPRI5;                                                                                               \
        q_.field = value;                                                                                                        \
        refused(&q_, param);                                                                                                     \
    } while (0)

TEST(sampler_check_ranges) {
    struct sampler_spec spec;
    struct err e = { 0 };
    for (int i = 0; i < GAUSS_MODELS; i++) // every model's defaults are allowed, but ddpm is for discrete times
        for (int type = 0; type < SAMPLER_TYPE_COUNT; type++) {
            struct gauss g = gauss_model(i, 0, 1);
            sampler_defaults(&spec, &g.model, (enum sampler_type)type);
            if (type != SAMPLER_DDPM || g.model.kind == MODEL_DISCRETE) CHECK_OK(sampler_check(&spec, &g.model, &e), &e);
        }
    REFUSED(SAMPLER_ODE, steps, 0, "sampler.steps");
    REFUSED(SAMPLER_ODE, steps, SAMPLER_MAX_STEPS + 1, "sampler.steps");
    REFUSED(SAMPLER_SDE, steps, 1, "sampler.steps");
    REFUSED(SAMPLER_SDE, method, METHOD_RK4, "sampler.method");
    REFUSED(SAMPLER_SDE, method, METHOD_DOPRI5, "sampler.method");
    REFUSED(SAMPLER_ODE, method, (enum sampler_method)METHOD_COUNT, "sampler.method");
    REFUSED(SAMPLER_ODE, path, (enum path_kind)7, "interpolant");
    REFUSED(SAMPLER_SDE, w_t, (enum w_form)W_COUNT, "sampler.w_t");
    REFUSED(SAMPLER_SDE, w_t_scale, 0, "sampler.w_t_scale");
    REFUSED(SAMPLER_SDE, w_t_scale, -1, "sampler.w_t_scale");
    REFUSED(SAMPLER_SDE, w_t_scale, NAN, "sampler.w_t_scale");
    REFUSED(SAMPLER_SDE, w_t_scale, INFINITY, "sampler.w_t_scale");
    REFUSED(SAMPLER_SDE, last, (enum last_step)9, "sampler.last_step");
    REFUSED(SAMPLER_SDE, last_size, -0.01, "sampler.last_step_size");
    REFUSED(SAMPLER_SDE, last_size, 1, "sampler.last_step_size");
    REFUSED(SAMPLER_SDE, last_size, NAN, "sampler.last_step_size");
    REFUSED_DOPRI5(atol, 0, "sampler.atol");
    REFUSED_DOPRI5(atol, 1e-13, "sampler.atol"); // an error norm that is divided by less can overflow
    REFUSED_DOPRI5(atol, NAN, "sampler.atol");
    REFUSED_DOPRI5(rtol, -1e-3, "sampler.rtol");
    REFUSED_DOPRI5(rtol, INFINITY, "sampler.rtol");
    REFUSED_DOPRI5(max_evaluations, 7, "sampler.max_evaluations");
    REFUSED_DOPRI5(max_evaluations, SAMPLER_MAX_EVALUATIONS + 1, "sampler.max_evaluations");
    REFUSED(SAMPLER_ODE, guidance, -1, "guidance.scale");
    REFUSED(SAMPLER_ODE, guidance, NAN, "guidance.scale");
    REFUSED(SAMPLER_ODE, guide_from, -0.1, "guidance.interval");
    REFUSED(SAMPLER_ODE, guide_to, 1.1, "guidance.interval");
    REFUSED(SAMPLER_ODE, guide_to, NAN, "guidance.interval");
    sampler_defaults(&spec, &linear, SAMPLER_ODE);
    spec.guide_from = 0.6;
    spec.guide_to = 0.5;
    refused(&spec, "guidance.interval");
    sampler_defaults(&spec, &linear, SAMPLER_SDE); // sbdm starts at 0.001: a last step from there leaves no room
    spec.w_t = W_SBDM;
    spec.last_size = 0.9995;
    refused(&spec, "sampler.last_step_size");
}

// Runs a spec to its end on a mild network; the executor fails the test on any broken rule.
static void run_spec(const struct sampler_spec *spec, const struct sampler_model *m) {
    struct err e = { 0 };
    struct sampler s;
    struct f64_exec x;
    f64_exec_init(&x, 2);
    x.net = mild_net;
    CHECK_OK(sampler_start(&s, spec, m, false, &e), &e);
    bool fixed = spec->type != SAMPLER_ODE || spec->method != METHOD_DOPRI5;
    int total = sampler_evaluations(spec, m);
    CHECK(sampler_left(&s) == total);
    int rc;
    struct sampler_step st;
    double progress = 0;
    while ((rc = f64_exec_step(&x, &s, &st, &e)) > 0) {
        if (fixed) CHECK(sampler_left(&s) == total - x.evaluations);
        CHECK(st.time >= 0 && st.time <= 1 && (m->kind != MODEL_PATH || (st.t >= 0 && st.t <= 1)));
        if (m->kind == MODEL_DISCRETE) CHECK(st.t >= 0 && st.t <= 999);
        CHECK(sampler_progress(&s) >= progress && sampler_progress(&s) <= 1);
        progress = sampler_progress(&s);
    }
    // dopri5 may give up on stiff combinations, but only by saying so
    if (rc < 0 && (fixed || rc != E_RANGE || strcmp(e.param, "sampler.max_evaluations") != 0))
        test_fail(__FILE__, __LINE__, "%s %s %s last %s size %g, path %s, model %s %s: %s", sampler_type_name((int)spec->type),
                  sampler_method_name((int)spec->method), w_form_name((int)spec->w_t), last_step_name((int)spec->last),
                  spec->last_size, path_name(spec->path), path_name(m->path), prediction_name(m->prediction), e.text);
    if (rc == 0) {
        CHECK(sampler_left(&s) == 0 && sampler_progress(&s) == 1);
        if (fixed) CHECK(x.evaluations == total);
        CHECK(sampler_next(&s, NULL, &st, &e) == 0); // and stays finished
    }
    f64_exec_deinit(&x);
}

static void each_sde(struct sampler_spec spec, struct sampler_model *m) {
    static const double sizes[] = { 0.04, 0, 1e-9, 1e-17, 0.5, 0.9 }, scales[] = { 1, 0.37 };
    for (int method = METHOD_EULER; method <= METHOD_HEUN; method++)
        for (int form = 0; form < W_COUNT; form++)
            for (int last = 0; last < LAST_COUNT; last++)
                for (int z = 0; z < 6; z++)
                    for (int k = 0; k < 2; k++) {
                        spec.method = (enum sampler_method)method;
                        if (!gauss_w_t(&spec, m, (enum w_form)form)) continue;
                        spec.last = (enum last_step)last;
                        spec.last_size = sizes[z];
                        spec.w_t_scale = scales[k];
                        for (spec.steps = last != LAST_NONE ? 2 : 1; spec.steps <= 4; spec.steps += 2) run_spec(&spec, m);
                    }
}

static void each_ode(struct sampler_spec spec, const struct sampler_model *m) {
    spec.max_evaluations = 2000;
    for (int method = 0; method < METHOD_COUNT; method++)
        for (spec.steps = 1; spec.steps < 6; spec.steps += 2)
            for (int denoise = 0; denoise < 2; denoise++) {
                spec.method = (enum sampler_method)method;
                spec.denoise = denoise;
                run_spec(&spec, m);
            }
}

// ddpm, ddim and edm
static void each_other(struct sampler_spec spec, const struct sampler_model *m) {
    static const int steps[] = {1, 2, 5, 100, 1000};
    for (int i = 0; i < 5; i++)
        for (int k = 0; k < 16; k++) {
            spec.steps = steps[i];
            spec.clip = k & 1;
            spec.eta = spec.type != SAMPLER_DDIM ? 0 : k & 2 ? 1 : k & 4 ? 0.3 : 0;
            spec.spacing = m->kind == MODEL_DISCRETE ? (enum spacing)(k / 4) : SPACING_OPENAI;
            spec.method = k & 4 ? METHOD_EULER : METHOD_HEUN;
            spec.churn = spec.type == SAMPLER_EDM && k & 8 ? 30 : 0;
            if (schedule_has(spec.spacing, spec.steps)) run_spec(&spec, m);
        }
}

TEST(sampler_every_spec_is_finite) {
    for (int i = 0; i < GAUSS_MODELS; i++)
        for (int path = 0; path < PATH_COUNT; path++)
            for (int type = 0; type < SAMPLER_TYPE_COUNT; type++) {
                struct gauss g = gauss_model(i, 0, 1);
                struct sampler_spec spec;
                sampler_defaults(&spec, &g.model, (enum sampler_type)type);
                spec.path = (enum path_kind)path;
                if (sampler_check(&spec, &g.model, NULL)) continue; // an interpolant that it does not use, or ddpm: tested beside
                if (type == SAMPLER_ODE) each_ode(spec, &g.model);
                else if (type == SAMPLER_SDE) each_sde(spec, &g.model);
                else each_other(spec, &g.model);
            }
}

TEST(sampler_counts) {
    struct sampler_spec spec;
    static const int stages[] = { 1, 2, 2, 4 };
    sampler_defaults(&spec, &linear, SAMPLER_ODE);
    CHECK(spec.method == METHOD_HEUN && spec.steps == 50 && sampler_evaluations(&spec, &linear) == 100);
    for (int m = 0; m < 4; m++) {
        spec.method = (enum sampler_method)m;
        CHECK(sampler_evaluations(&spec, &linear) == 50 * stages[m]);
    }
    sampler_defaults(&spec, &linear, SAMPLER_SDE);
    CHECK(spec.method == METHOD_EULER && sampler_evaluations(&spec, &linear) == 250);
    spec.method = METHOD_HEUN;
    CHECK(sampler_evaluations(&spec, &linear) == 2 * 249 + 1);
    spec.last = LAST_NONE;
    CHECK(sampler_evaluations(&spec, &linear) == 500);
    static const struct sampler_model discrete = {.kind = MODEL_DISCRETE}, edm = {.kind = MODEL_EDM, .sigma_data = 0.5};
    CHECK(sampler_home_type(&linear) == SAMPLER_ODE && sampler_home_type(&discrete) == SAMPLER_DDPM);
    CHECK(sampler_home_type(&edm) == SAMPLER_EDM);
    static const struct { const struct sampler_model *m; enum sampler_type type; int want; } defaults[] = {
        {&discrete, SAMPLER_ODE, 101}, {&discrete, SAMPLER_SDE, 250}, {&discrete, SAMPLER_DDPM, 250}, {&discrete, SAMPLER_DDIM, 50},
        {&discrete, SAMPLER_EDM, 79},  {&edm, SAMPLER_ODE, 101},      {&edm, SAMPLER_EDM, 79},        {&linear, SAMPLER_DDIM, 50},
        {&linear, SAMPLER_EDM, 79}};
    for (int i = 0; i < 9; i++) {
        struct sampler_spec of;
        sampler_defaults(&of, defaults[i].m, defaults[i].type);
        CHECK(sampler_evaluations(&of, defaults[i].m) == defaults[i].want);
    }
    CHECK(sampler_peak_rows(&spec) == 1);
    spec.guidance = 0;
    CHECK(sampler_peak_rows(&spec) == 2);
}

struct guided {
    int on, off;
};

static void guided_net(void *ctx, const struct sampler_step *st, const double *x, double *f, int n) {
    struct guided *g = ctx;
    bool inside = st->time >= 0.3 && st->time <= 0.7;
    CHECK(st->guidance == (inside ? 2.5 : 1));
    if (inside) g->on++;
    else g->off++;
    for (int e = 0; e < n; e++) f[e] = -x[e];
}

TEST(sampler_guidance_interval_is_closed) { // and judged in the sampling path's time, at each evaluation
    struct sampler_model m = {.path = PATH_VP, .prediction = PRED_VELOCITY};
    struct sampler_spec spec;
    struct err e = { 0 };
    struct guided g = { 0 };
    sampler_defaults(&spec, &linear, SAMPLER_ODE);
    spec.method = METHOD_EULER;
    spec.steps = 10;
    spec.guidance = 2.5;
    spec.guide_from = 0.3;
    spec.guide_to = 0.7;
    struct f64_exec x;
    struct sampler s;
    f64_exec_init(&x, 1);
    x.net = guided_net;
    x.ctx = &g;
    CHECK_OK(sampler_start(&s, &spec, &linear, false, &e), &e);
    CHECK(f64_exec_run(&x, &s, &e) == 0);
    CHECK(g.on == 5 && g.off == 5);                        // 0.3, 0.4, 0.5, 0.6, 0.7
    CHECK_OK(sampler_start(&s, &spec, &m, false, &e), &e); // converted: the network's time is another, the interval is not
    CHECK(f64_exec_run(&x, &s, &e) == 0);
    f64_exec_deinit(&x);
}

// Ends that name a point of the grid hold it, however its product rounds: a fifth of the points of usual grids miss their decimal.
TEST(sampler_guidance_interval_holds_grid_points) {
    struct sampler_spec spec;
    struct err e = {0};
    for (int steps = 3; steps <= 97; steps += 2) { // an SDE's grid from 0 to 0.96, here in hundredths
        for (int i = 1; i < steps; i++) {
            struct sampler s;
            struct sampler_step st;
            int guided = 0;
            sampler_defaults(&spec, &linear, SAMPLER_SDE);
            spec.steps = steps;
            spec.last = LAST_EULER;
            spec.last_size = 1 - (steps - 1) / 100.0;
            spec.guidance = 2;
            spec.guide_from = spec.guide_to = i / 100.0;
            CHECK_OK(sampler_start(&s, &spec, &linear, true, &e), &e);
            while (sampler_next(&s, NULL, &st, &e) == 1) guided += st.guidance == 2;
            if (guided != 1) test_fail(__FILE__, __LINE__, "%d steps: %d evaluations at t = %g", steps, guided, spec.guide_from);
        }
    }
}

TEST(sampler_draws) { // 0 is x0, then 1, 2, ... whatever the coefficient
    struct sampler_spec spec;
    struct err e = { 0 };
    for (int method = METHOD_EULER; method <= METHOD_HEUN; method++)
        for (int given = 0; given < 2; given++) {
            sampler_defaults(&spec, &linear, SAMPLER_SDE);
            spec.method = (enum sampler_method)method;
            spec.w_t = W_INC_DEC; // its first kick is 0
            spec.steps = 6;
            struct sampler s;
            struct sampler_step st;
            uint32_t next = given ? 1 : 0;
            CHECK_OK(sampler_start(&s, &spec, &linear, given, &e), &e);
            while (sampler_next(&s, NULL, &st, &e) > 0) {
                bool noisy = false;
                for (int a = 0; a < st.n; a++) noisy = noisy || st.assign[a].c_noise != 0;
                if (noisy) CHECK(st.draw >= next && st.draw <= next + 1);
                if (noisy) next = st.draw + 1;
            }
            CHECK(next == 6 && s.draws == 5); // five kicks; the last step adds none
        }
}

TEST(sampler_copy_continues_alike) {
    static const struct {
        enum sampler_type type;
        enum sampler_method method;
    } kinds[] = {
        { SAMPLER_ODE, METHOD_RK4 },
        { SAMPLER_ODE, METHOD_DOPRI5 },
        { SAMPLER_SDE, METHOD_EULER },
        { SAMPLER_SDE, METHOD_HEUN },
        { SAMPLER_ODE, METHOD_DPMPP2M },
        { SAMPLER_DDIM, METHOD_EULER },
        { SAMPLER_EDM, METHOD_HEUN },
    };
    for (int k = 0; k < 7; k++)
        for (int at = 1; at < 30; at += 4) {
            struct sampler_spec spec;
            struct err e = { 0 };
            struct sampler s, copy;
            struct sampler_step st;
            struct f64_exec a, b;
            sampler_defaults(&spec, &linear, kinds[k].type);
            spec.method = kinds[k].method;
            spec.steps = 8;
            spec.eta = 0.5;
            spec.churn = 2;
            f64_exec_init(&a, 3);
            f64_exec_init(&b, 3);
            a.net = mild_net;
            CHECK_OK(sampler_start(&s, &spec, &linear, false, &e), &e);
            for (int i = 0; i < at; i++)
                if (f64_exec_step(&a, &s, &st, &e) <= 0) break;
            copy = s;
            f64_exec_copy(&b, &a);
            CHECK(f64_exec_run(&a, &s, &e) == 0);
            memset(&s, 0xee, sizeof s); // nothing of the original is needed
            CHECK(f64_exec_run(&b, &copy, &e) == 0);
            CHECK(memcmp(a.col[SAMPLER_X], b.col[SAMPLER_X], 3 * sizeof(double)) == 0 && a.evaluations == b.evaluations);
            f64_exec_deinit(&a);
            f64_exec_deinit(&b);
        }
}

static int notes_of(enum path_kind mp, enum prediction pred, enum path_kind path, struct sampler_spec spec, const char *needle) {
    struct sampler_model m = {.path = mp, .prediction = pred};
    const char *notes[8];
    spec.path = path;
    int n = sampler_notes(&spec, &m, notes, 8), found = 0;
    for (int i = 0; i < n; i++) found += strstr(notes[i], needle) != NULL;
    return needle[0] ? found : n;
}

TEST(sampler_notes_say_what_moved) {
    struct sampler_spec ode, sde;
    sampler_defaults(&ode, &linear, SAMPLER_ODE);
    sampler_defaults(&sde, &linear, SAMPLER_SDE);
    CHECK(notes_of(PATH_LINEAR, PRED_VELOCITY, PATH_LINEAR, ode, "") == 0 &&
          notes_of(PATH_LINEAR, PRED_VELOCITY, PATH_GVP, ode, "") == 0);
    CHECK(notes_of(PATH_LINEAR, PRED_VELOCITY, PATH_LINEAR, sde, "") == 0);
    CHECK(notes_of(PATH_LINEAR, PRED_VELOCITY, PATH_VP, ode, "0.999") == 1);
    CHECK(notes_of(PATH_VP, PRED_NOISE, PATH_LINEAR, ode, "0.0065") == 1 &&
          notes_of(PATH_VP, PRED_SCORE, PATH_GVP, ode, "0.0042") == 1);
    CHECK(notes_of(PATH_GVP, PRED_SCORE, PATH_GVP, ode, "0.001") == 1);
    sde.w_t = W_SBDM;
    CHECK(notes_of(PATH_LINEAR, PRED_VELOCITY, PATH_LINEAR, sde, "sbdm") == 1 &&
          notes_of(PATH_VP, PRED_VELOCITY, PATH_VP, sde, "") == 0);
    sde.w_t = W_SIGMA;
    sde.last_size = 0;
    CHECK(notes_of(PATH_LINEAR, PRED_VELOCITY, PATH_LINEAR, sde, "size 0") == 1);
    sde.last_size = 1e-17;
    CHECK(notes_of(PATH_LINEAR, PRED_VELOCITY, PATH_LINEAR, sde, "size 0") == 1);
    sde.last = LAST_NONE;
    CHECK(notes_of(PATH_LINEAR, PRED_VELOCITY, PATH_LINEAR, sde, "") == 0);
    sde.method = METHOD_HEUN;
    CHECK(notes_of(PATH_LINEAR, PRED_VELOCITY, PATH_LINEAR, sde, "heun") == 1);
    sde.replay = true;
    CHECK(notes_of(PATH_LINEAR, PRED_VELOCITY, PATH_LINEAR, sde, "") == 0);
    const char *none[1];
    CHECK(sampler_notes(&sde, &linear, none, 0) == 0);
}
