// SPDX-License-Identifier: MIT
// Orders of convergence, exactness of the conversions between paths, dopri5's tolerances and its recorded number.
// SITD_TEST_PRINT=1 prints what was measured.
#include "core/diffusion/convert.h"
#include "tests/test.h"
#include "tests/unit/gauss.h"

#define COUNT(a) ((int)(sizeof(a) / sizeof *(a)))

static void print(const char *fmt, const char *name, double a, double b, double c) {
    if (getenv("SITD_TEST_PRINT")) printf(fmt, name, a, b, c);
}

// Where the flow of the probability takes x from t0 to t1, on the sampling path.
static double exact_flow(const struct gauss *g, enum path_kind path, double t0, double t1, double x) {
    struct path_at a, b;
    path_eval(path, t0, &a);
    path_eval(path, t1, &b);
    return b.alpha * g->mu + sqrt(gauss_var(g, &b) / gauss_var(g, &a)) * (x - a.alpha * g->mu);
}

static double error_of(const struct sampler_spec *spec, struct gauss *g, int *evaluations) {
    static const double x0[] = { -1.7, -0.4, 0.3, 1.9 };
    struct err e = { 0 };
    struct sampler s;
    struct f64_exec x;
    f64_exec_init(&x, 4);
    f64_exec_set_x(&x, x0);
    x.net = gauss_net;
    x.ctx = g;
    CHECK_OK(sampler_start(&s, spec, &g->model, true, &e), &e);
    double k = s.phase == 0 ? s.keep[0] : 1, worst = 0; // a moved start scales x0
    CHECK_OK(f64_exec_run(&x, &s, &e), &e);
    for (int i = 0; i < 4; i++) worst = fmax(worst, fabs(x.col[SAMPLER_X][i] - exact_flow(g, spec->path, s.t0, s.t1, k * x0[i])));
    if (evaluations) *evaluations = x.evaluations;
    f64_exec_deinit(&x);
    return worst;
}

// y' = -y^2 (1 + sin 3t): 1/y = 1/y0 + t + (1 - cos 3t)/3. (Gaussian flows on the linear path are too symmetric: midpoint has
// order 3 there.)
static void nonlinear_net(void *ctx, const struct sampler_step *st, const double *x, double *f, int n) {
    (void)ctx;
    for (int e = 0; e < n; e++) f[e] = -x[e] * x[e] * (1 + sin(3 * st->t));
}

static double nonlinear_error(enum sampler_method method, int steps) {
    struct sampler_model m = {.path = PATH_LINEAR, .prediction = PRED_VELOCITY};
    struct sampler_spec spec;
    struct err e = { 0 };
    struct sampler s;
    struct f64_exec x;
    double y0 = 2;
    sampler_defaults(&spec, &m, SAMPLER_ODE);
    spec.method = method;
    spec.steps = steps;
    f64_exec_init(&x, 1);
    f64_exec_set_x(&x, &y0);
    x.net = nonlinear_net;
    CHECK_OK(sampler_start(&s, &spec, &m, true, &e), &e);
    CHECK_OK(f64_exec_run(&x, &s, &e), &e);
    double error = fabs(x.col[SAMPLER_X][0] - 1 / (1 / y0 + 1 + (1 - cos(3)) / 3));
    f64_exec_deinit(&x);
    return error;
}

TEST(sampler_ode_orders) { // the slope of log error over three doublings
    static const double want[] = { 1, 2, 2, 4 };
    for (int m = 0; m < 4; m++) {
        double a = nonlinear_error((enum sampler_method)m, 80), b = nonlinear_error((enum sampler_method)m, 640),
               slope = log2(a / b) / 3;
        print("    %s order %.3f (errors %.2e %.2e)\n", sampler_method_name(m), slope, a, b);
        CHECK_NEAR(slope, want[m], 0.08);
    }
}

// The same on the flow of Gaussian data, path by path: errors fall about as fast as the order says, or faster.
TEST(sampler_ode_orders_on_paths) {
    static const double want[] = { 1, 2, 2, 4 };
    for (int path = 0; path < PATH_COUNT; path++)
        for (int m = 0; m < 4; m++) {
            struct gauss g = gauss_path((enum path_kind)path, PRED_VELOCITY, 0.8, 0.6);
            struct sampler_spec spec;
            sampler_defaults(&spec, &g.model, SAMPLER_ODE);
            spec.method = (enum sampler_method)m;
            spec.steps = 80;
            double a = error_of(&spec, &g, NULL);
            spec.steps = 640;
            double slope = log2(a / error_of(&spec, &g, NULL)) / 3;
            print("    %s order %.3f on path %.0f (error %.2e)\n", sampler_method_name(m), slope, path, a);
            CHECK(slope > want[m] - 0.3);
        }
}

static void each_triple(void (*fn)(struct gauss *, enum path_kind)) { // every network, discrete and edm among them
    for (int i = 0; i < GAUSS_MODELS; i++)
        for (int path = 0; path < PATH_COUNT; path++) {
            struct gauss g = gauss_model(i, 0.8, 0.6);
            fn(&g, (enum path_kind)path);
        }
}

// Every Euler step moves x by h times the exact velocity of the sampling path, whatever the network predicts and whichever path
// it was trained on.
static void check_velocity(struct gauss *g, enum path_kind path) {
    struct sampler_spec spec;
    struct err e = { 0 };
    struct sampler s;
    struct sampler_step st;
    struct f64_exec x;
    sampler_defaults(&spec, &g->model, SAMPLER_ODE);
    spec.method = METHOD_EULER;
    spec.steps = 40;
    spec.path = path;
    spec.denoise = false;
    f64_exec_init(&x, 3);
    x.net = gauss_net;
    x.ctx = g;
    CHECK_OK(sampler_start(&s, &spec, &g->model, false, &e), &e);
    CHECK(f64_exec_step(&x, &s, &st, &e) == 1 && !st.evaluate);
    for (;;) {
        double before[3];
        memcpy(before, x.col[SAMPLER_X], sizeof before);
        if (f64_exec_step(&x, &s, &st, &e) != 1) break;
        struct path_at at, pure = gauss_at(0, 1);
        path_eval(path, st.time, &at);
        if (s.h == 0) { // not yet a step: from the noise to where vp begins
            CHECK(path == PATH_VP && g->model.path != PATH_VP && g->model.prediction == PRED_VELOCITY);
            for (int i = 0; i < 3; i++)
                CHECK_NEAR(x.col[SAMPLER_X][i], at.alpha * gauss_data(g, &pure, before[i]) + at.sigma * before[i], 1e-12);
            continue;
        }
        for (int i = 0; i < 3; i++) {
            double v = gauss_velocity(g, &at, before[i]);
            double scale =
                1 + fabs(v) + fabs(before[i] * at.ratio); // a noise or score model's velocity is a difference of such terms
            CHECK_NEAR((x.col[SAMPLER_X][i] - before[i]) / s.h, v, 1e-11 * scale);
        }
    }
    f64_exec_deinit(&x);
}

TEST(sampler_conversions_are_exact) { each_triple(check_velocity); }

// And so each triple ends where the exact flow of its path does.
static void check_end(struct gauss *g, enum path_kind path) {
    struct sampler_spec spec;
    sampler_defaults(&spec, &g->model, SAMPLER_ODE);
    spec.method = METHOD_DOPRI5;
    spec.rtol = 1e-8;
    spec.atol = 1e-10;
    spec.max_evaluations = 20000;
    spec.path = path;
    spec.denoise = false;
    CHECK(error_of(&spec, g, NULL) < 1e-6);
}

TEST(sampler_converted_flows_end_alike) { each_triple(check_end); }

// From N(0, I) instead of the exact marginal at the first t: what the ends of path and model leave. Only printed where the path
// begins with pure noise (0); elsewhere the start's missing mean is what is left, its size known beforehand.
static void check_floor(struct gauss *g, enum path_kind path) {
    struct path_at a, b;
    struct sampler_spec spec;
    struct sampler s;
    sampler_defaults(&spec, &g->model, SAMPLER_ODE);
    spec.path = path;
    spec.denoise = false;
    CHECK(sampler_start(&s, &spec, &g->model, true, NULL) == OK);
    double k = s.phase == 0 ? s.keep[0] : 1;
    path_eval(path, s.t0, &a);
    path_eval(path, s.t1, &b);
    double gain = sqrt(gauss_var(g, &b) / gauss_var(g, &a)), mean = fabs(gain * a.alpha * g->mu), spread = fabs(k * gain / sqrt(gauss_var(g, &b)) - 1);
    print("    on %s from N(0, I): model kind %.0f, mean off by %.1e, standard deviation by %.1e\n", path_name(path), (double)g->model.kind, mean, spread);
    CHECK(mean < 0.013 && spread < 0.006);
}

TEST(sampler_floors_of_the_ends) { each_triple(check_floor); }

TEST(sampler_vp_model_elsewhere_starts_as_at_home) { // its first input is standard normal at VP's t = 0
    for (int path = PATH_LINEAR; path <= PATH_GVP; path++) {
        struct gauss g = gauss_path(PATH_VP, PRED_VELOCITY, 0, 1);
        struct sampler_spec spec;
        struct err e = { 0 };
        struct sampler s;
        struct sampler_step first, st;
        sampler_defaults(&spec, &g.model, SAMPLER_ODE);
        spec.path = (enum path_kind)path;
        CHECK_OK(sampler_start(&s, &spec, &g.model, false, &e), &e);
        CHECK(sampler_next(&s, NULL, &first, &e) == 1 && sampler_next(&s, NULL, &st, &e) == 1);
        CHECK_NEAR(first.assign[0].c_noise * st.in_scale, 1, 1e-12);
        CHECK(st.t < 1e-12 && st.time > 0.004 && st.time < 0.0066);
    }
}

static void decay_net(void *ctx, const struct sampler_step *st, const double *x, double *f, int n) {
    (void)ctx;
    (void)st;
    for (int e = 0; e < n; e++) f[e] = -x[e];
}

static double decay(const struct sampler_spec *spec, int *evaluations) {
    struct sampler_model m = {.path = PATH_LINEAR, .prediction = PRED_VELOCITY};
    struct err e = { 0 };
    struct sampler s;
    struct f64_exec x;
    double one = 1;
    f64_exec_init(&x, 1);
    f64_exec_set_x(&x, &one);
    x.net = decay_net;
    CHECK_OK(sampler_start(&s, spec, &m, true, &e), &e);
    CHECK_OK(f64_exec_run(&x, &s, &e), &e);
    double y = x.col[SAMPLER_X][0];
    *evaluations = x.evaluations;
    f64_exec_deinit(&x);
    return y;
}

TEST(sampler_dopri5_golden) { // torchdiffeq on y' = -y over [0, 1] at its default tolerances: 0.3682082 with 14 evaluations
                              // (true: 0.3678794)
    struct sampler_model m = {.path = PATH_LINEAR, .prediction = PRED_VELOCITY};
    struct sampler_spec spec;
    int evaluations;
    sampler_defaults(&spec, &m, SAMPLER_ODE);
    spec.method = METHOD_DOPRI5;
    spec.replay = true;
    CHECK_NEAR(decay(&spec, &evaluations), 0.3682082,
               6e-7); // 0.3682087 in double: the interpolant's terms are large, torchdiffeq adds them in float32
    CHECK(evaluations == 14);
    spec.replay = false; // ended exactly at 1 it is better
    double y = decay(&spec, &evaluations);
    print("    %s clamped end: %.7f with %.0f evaluations, true %.7f\n", "dopri5", y, evaluations, exp(-1));
    CHECK_NEAR(y, exp(-1), 1e-3 * exp(-1)); // rtol
    CHECK(evaluations <= 26);
}

TEST(sampler_dopri5_follows_its_tolerance) {
    struct gauss g = gauss_path(PATH_LINEAR, PRED_VELOCITY, 0.8, 0.3);
    struct sampler_spec spec;
    sampler_defaults(&spec, &g.model, SAMPLER_ODE);
    spec.method = METHOD_DOPRI5;
    spec.max_evaluations = 10000;
    int before = 0, evaluations;
    double first = 0, last = 0;
    for (double rtol = 1e-3; rtol > 0.5e-9; rtol /= 10) {
        spec.rtol = rtol;
        spec.atol = rtol * 1e-3;
        double err = error_of(&spec, &g, &evaluations);
        print("    %s rtol %.0e: error %.2e, %.0f evaluations\n", "dopri5", rtol, err, evaluations);
        CHECK(err < 10 * rtol && evaluations >= before);
        before = evaluations;
        if (first == 0) first = err;
        last = err;
    }
    CHECK(last < 1e-5 * first);
    CHECK(before < 600); // fifth order: a million times the accuracy for some ten times the work
}

TEST(sampler_dopri5_replay_interpolates) { // the interpolant is of fourth order: close to the clamped end, not equal to it
    struct gauss g = gauss_path(PATH_LINEAR, PRED_VELOCITY, 0.8, 0.6);
    struct sampler_spec spec;
    sampler_defaults(&spec, &g.model, SAMPLER_ODE);
    spec.method = METHOD_DOPRI5;
    spec.replay = true;
    spec.rtol = 1e-7;
    spec.atol = 1e-9;
    CHECK(error_of(&spec, &g, NULL) < 1e-5);
}

TEST(sampler_dopri5_fails_clearly) {
    struct gauss g = gauss_path(PATH_LINEAR, PRED_VELOCITY, 0.8, 0.6);
    struct sampler_spec spec;
    struct err e = { 0 };
    struct sampler s;
    struct f64_exec x;
    sampler_defaults(&spec, &g.model, SAMPLER_ODE);
    spec.method = METHOD_DOPRI5;
    spec.max_evaluations = 20;
    spec.rtol = 1e-9;
    f64_exec_init(&x, 2);
    x.net = gauss_net;
    x.ctx = &g;
    CHECK_OK(sampler_start(&s, &spec, &g.model, false, &e), &e);
    CHECK(f64_exec_run(&x, &s, &e) == E_RANGE && x.evaluations == 20);
    CHECK_STR(e.param, "sampler.max_evaluations");
    struct sampler_step st;
    double bad[2] = { NAN, 1 };
    err_clear(&e);
    CHECK_OK(sampler_start(&s, &spec, &g.model, true, &e), &e);
    CHECK(sampler_next(&s, NULL, &st, &e) == 1 && st.norms == 2);
    CHECK(sampler_next(&s, bad, &st, &e) == E_NONFINITE);
    err_clear(&e);
    CHECK(sampler_next(&s, NULL, &st, &e) == E_INTERNAL);
    f64_exec_deinit(&x);
}

static void grid_is(enum path_kind path, enum prediction prediction, const float *points, int n) {
    struct sampler_model m = {.path = path, .prediction = prediction};
    struct sampler_spec spec;
    struct err e = {0};
    struct sampler s;
    struct sampler_step st;
    sampler_defaults(&spec, &m, SAMPLER_ODE);
    spec.method = METHOD_EULER;
    spec.steps = n;
    spec.replay = true;
    CHECK_OK(sampler_start(&s, &spec, &m, true, &e), &e);
    for (int i = 0; i < n; i++) {
        CHECK(sampler_next(&s, NULL, &st, &e) == 1);
        if (st.time != (double)points[i])
            test_fail(__FILE__, __LINE__, "point %d of %d is %a, not %a", i, n, st.time, (double)points[i]);
    }
    CHECK(sampler_next(&s, NULL, &st, &e) == 0);
}

TEST(sampler_replay_grid_is_float32) { // bit for bit; from running torch
    static const float vp[] = {        // torch.linspace(0, 0.999, 13)
        0, 0x1.54fdf4p-4f, 0x1.54fdf4p-3f, 0x1.ff7ceep-3f, 0x1.54fdf4p-2f, 0x1.aa3d70p-2f,
        0x1.ff7ceep-2f, 0x1.2a5e36p-1f, 0x1.54fdf4p-1f, 0x1.7f9db2p-1f, 0x1.aa3d70p-1f, 0x1.d4dd30p-1f,
    };
    static const float noise[] = { // torch.linspace(0.001, 0.999, 8)
        0x1.0624dep-10f, 0x1.2608c8p-3f, 0x1.2502a2p-2f, 0x1.b700e2p-2f, 0x1.247f90p-1f, 0x1.6d7eb0p-1f,
        0x1.b67dcep-1f,
    };
    grid_is(PATH_VP, PRED_VELOCITY, vp, 12);
    grid_is(PATH_LINEAR, PRED_NOISE, noise, 7);
}
