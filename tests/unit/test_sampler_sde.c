// SPDX-License-Identifier: MIT
/*
 * SDE samplers on Gaussian data. With the exact network every step is affine in x and the kicks, so x_end = A x0 + B + sum_d C_d
 * z_d, and the executor gives A, B and the C_d when its elements are told unit vectors as noise: the mean B and variance A^2 +
 * sum C_d^2 of the result come out exactly, with no Monte Carlo error, and may be compared with the marginal that the SDE must
 * keep, whatever w_t. One Monte Carlo run checks that reasoning.
 */
#include "tests/test.h"
#include "tests/unit/gauss.h"

#define COUNT(a) ((int)(sizeof(a) / sizeof *(a)))

static void spec_of(struct sampler_spec *spec, struct gauss *g, enum sampler_method method, enum w_form form, int steps) {
    sampler_defaults(spec, &g->model, SAMPLER_SDE);
    spec->method = method;
    gauss_w_t(spec, &g->model, form);
    spec->steps = steps;
    spec->last = LAST_NONE;
}

static void run(struct f64_exec *x, const struct sampler_spec *spec, struct gauss *g, bool given, struct sampler *s) {
    struct err e = { 0 };
    x->net = gauss_net;
    x->ctx = g;
    CHECK_OK(sampler_start(s, spec, &g->model, given, &e), &e);
    CHECK_OK(f64_exec_run(x, s, &e), &e);
}

// What a run from given noise multiplies it by, and the exact marginal where it begins.
static void start_of(const struct sampler_spec *spec, const struct gauss *g, double *scale, double *mean, double *sd) {
    struct sampler s;
    struct path_at at;
    CHECK(sampler_start(&s, spec, &g->model, true, NULL) == OK);
    *scale = s.phase == 0 ? s.keep[0] : 1;
    path_eval(spec->path, s.t0, &at);
    *mean = at.alpha * g->mu;
    *sd = sqrt(gauss_var(g, &at));
}

// Exact mean and variance of the result, begun from the exact marginal, and the time at which the run ended.
static void moments(const struct sampler_spec *spec, struct gauss *g, double *mean, double *var, double *end) {
    int draws = spec->steps - (spec->last != LAST_NONE), n = draws + 2; // elements: the mean; one deviation above; the mean with z_d = 1
    double *noise = calloc((size_t)draws * (size_t)n, sizeof *noise), scale, m0, sd0;
    struct f64_exec x;
    struct sampler s;
    CHECK(noise && n <= F64_MAX);
    for (int d = 0; d < draws; d++) noise[(size_t)d * (size_t)n + (size_t)d + 2] = 1;
    f64_exec_init(&x, n);
    start_of(spec, g, &scale, &m0, &sd0);
    for (int e = 0; e < n; e++) x.col[SAMPLER_X][e] = (m0 + (e == 1) * sd0) / scale;
    x.written[SAMPLER_X] = true;
    x.noise = noise;
    run(&x, spec, g, true, &s);
    *mean = x.col[SAMPLER_X][0];
    *var = 0;
    *end = s.t1;
    for (int e = 1; e < n; e++) {
        double c = x.col[SAMPLER_X][e] - *mean;
        *var += c * c;
    }
    f64_exec_deinit(&x);
    free(noise);
}

static void weak_error(const struct gauss *g0, enum path_kind path, enum sampler_method method, enum w_form form, double scale,
                       int steps, double *em, double *ev) {
    struct gauss g = *g0;
    struct sampler_spec spec;
    struct path_at at;
    double mean, var, end;
    spec_of(&spec, &g, method, form, steps);
    spec.path = path;
    spec.w_t_scale = scale;
    moments(&spec, &g, &mean, &var, &end);
    path_eval(path, end, &at);
    *em = fabs(mean - at.alpha * g.mu);
    *ev = fabs(var - gauss_var(&g, &at)) / gauss_var(&g, &at);
}

TEST_LIMIT(sampler_sde_keeps_the_marginal, 120) { // every w_t on every path: the error falls with the step and is small
    for (int path = 0; path < PATH_COUNT; path++)
        for (int method = METHOD_EULER; method <= METHOD_HEUN; method++)
            for (int form = 0; form < W_COUNT; form++)
                for (int k = 0; k < 2; k++) {
                    struct gauss g = gauss_path((enum path_kind)path, PRED_VELOCITY, 0.8, 0.6);
                    double m1, v1, m2, v2, scale = k ? 0.4 : 1;
                    weak_error(&g, (enum path_kind)path, (enum sampler_method)method, (enum w_form)form, scale, 200, &m1, &v1);
                    weak_error(&g, (enum path_kind)path, (enum sampler_method)method, (enum w_form)form, scale, 800, &m2, &v2);
                    if (getenv("SITD_TEST_PRINT"))
                        printf("    %-6s %-5s %-21s x%.1f mean %.1e %.1e var %.1e %.1e\n", path_name((enum path_kind)path),
                               sampler_method_name(method), w_form_name(form), scale, m1, m2, v1, v2);
                    CHECK(m2 < 0.01 && v2 < 0.02);
                    CHECK(v2 < 0.6 * v1 || v2 < 2e-3);
                    CHECK(m2 < 0.6 * m1 || m2 < 2e-3);
                }
}

TEST_LIMIT(sampler_sde_converted_keeps_the_marginal, 120) { // every network on every path, every w_t; the error falls with the step
    for (int i = 0; i < GAUSS_MODELS; i++)
        for (int path = 0; path < PATH_COUNT; path++)
            for (int form = 0; form < W_COUNT; form++) {
                struct gauss g = gauss_model(i, 0.8, 0.6);
                double m1, v1, m2, v2;
                if (form == W_KL_ETA && g.model.kind != MODEL_PATH) continue;
                weak_error(&g, (enum path_kind)path, METHOD_EULER, (enum w_form)form, 1, 150, &m1, &v1);
                weak_error(&g, (enum path_kind)path, METHOD_EULER, (enum w_form)form, 1, 600, &m2, &v2);
                if (getenv("SITD_TEST_PRINT"))
                    printf("    model %d on %s, %s: mean %.1e %.1e var %.1e %.1e\n", i, path_name((enum path_kind)path), w_form_name(form), m1,
                           m2, v1, v2);
                CHECK(m2 < 0.02 && v2 < 0.04);
                CHECK((v2 < 0.6 * v1 || v2 < 2e-3) && (m2 < 0.6 * m1 || m2 < 2e-3));
            }
}

TEST(sampler_sde_monte_carlo) { // 16384 images of the test generator: within four standard errors and the bias of 200 steps
    for (int form = 0; form < W_COUNT; form++) {
        struct gauss g = gauss_path(PATH_LINEAR, PRED_VELOCITY, 0.8, 0.6);
        struct sampler_spec spec;
        struct sampler s;
        struct f64_exec x;
        int n = F64_MAX;
        spec_of(&spec, &g, METHOD_EULER, (enum w_form)form, 200);
        f64_exec_init(&x, n);
        x.seed = 5;
        run(&x, &spec, &g, false, &s);
        double sum = 0, sq = 0;
        for (int e = 0; e < n; e++) sum += x.col[SAMPLER_X][e];
        for (int e = 0; e < n; e++) sq += (x.col[SAMPLER_X][e] - sum / n) * (x.col[SAMPLER_X][e] - sum / n);
        CHECK_NEAR(sum / n, 0.8, 4 * 0.6 / sqrt(n) + 0.01);
        CHECK_NEAR(sq / n / 0.36, 1, 4 * sqrt(2.0 / n) + 0.025);
        f64_exec_deinit(&x);
    }
}

TEST(sampler_sde_weak_order) { // Euler-Maruyama: 1
    struct gauss g = gauss_path(PATH_LINEAR, PRED_VELOCITY, 0.8, 0.6);
    double m1, v1, m2, v2;
    weak_error(&g, PATH_LINEAR, METHOD_EULER, W_SIGMA, 1, 400, &m1, &v1);
    weak_error(&g, PATH_LINEAR, METHOD_EULER, W_SIGMA, 1, 800, &m2, &v2);
    if (getenv("SITD_TEST_PRINT")) printf("    euler-maruyama weak order: variance %.3f\n", log2(v1 / v2));
    CHECK_NEAR(log2(v1 / v2), 1, 0.1);
}

// One Brownian path at two resolutions: coarse kicks are sums of fine ones. With additive noise both schemes have strong order 1.
static double strong_gap(enum sampler_method method, int steps, const double *fine, int n, int fine_steps) {
    struct gauss g = gauss_path(PATH_LINEAR, PRED_VELOCITY, 0.8, 0.6);
    double *end[2], sum = 0;
    for (int half = 0; half < 2; half++) {
        int m = steps << half, pack = fine_steps / m;
        double *z = calloc((size_t)m * (size_t)n, sizeof *z);
        CHECK(z && (end[half] = calloc((size_t)n, sizeof **end)));
        for (int d = 0; d < fine_steps; d++)
            for (int e = 0; e < n; e++) z[(d / pack) * n + e] += fine[d * n + e] / sqrt(pack);
        struct sampler_spec spec;
        struct sampler s;
        struct f64_exec x;
        spec_of(&spec, &g, method, W_CONSTANT, m + 1);
        spec.last = LAST_EULER;
        spec.last_size = 0.1;
        f64_exec_init(&x, n);
        x.seed = 9;
        for (int e = 0; e < n; e++) x.col[SAMPLER_X][e] = f64_normal(3, 0, e);
        x.written[SAMPLER_X] = true;
        x.noise = z;
        run(&x, &spec, &g, true, &s);
        memcpy(end[half], x.col[SAMPLER_X], (size_t)n * sizeof **end);
        f64_exec_deinit(&x);
        free(z);
    }
    for (int e = 0; e < n; e++) sum += (end[0][e] - end[1][e]) * (end[0][e] - end[1][e]);
    free(end[0]);
    free(end[1]);
    return sqrt(sum / n);
}

TEST(sampler_sde_strong_order) {
    enum { N = 256, FINE = 512 };
    double *fine = calloc((size_t)N * FINE, sizeof *fine);
    CHECK(fine);
    for (int d = 0; d < FINE; d++)
        for (int e = 0; e < N; e++) fine[d * N + e] = f64_normal(4, (uint32_t)d, e);
    for (int method = METHOD_EULER; method <= METHOD_HEUN; method++) {
        double order = log2(strong_gap((enum sampler_method)method, 64, fine, N, FINE) /
                            strong_gap((enum sampler_method)method, 256, fine, N, FINE)) /
                       2;
        if (getenv("SITD_TEST_PRINT")) printf("    %s strong order %.3f\n", sampler_method_name(method), order);
        CHECK_NEAR(order, 1, 0.15);
    }
    free(fine);
}

// The paper's w_KL,eta/2 in the sampling path's own quantities: its velocity loss, for an error of x1-hat that makes the model's path
// show the loss of its table. Where V is infinite, its limit 0.
static double kl_eta(const struct gauss *g, const struct path_at *at) {
    struct path_at home;
    double t = path_time(g->model.path, at->alpha, at->sigma), w = 2 * at->var;
    if (at->alpha == 0) return 0;
    path_eval(g->model.path, t, &home);
    double loss = t < 0.1 ? 1.5 : t < 0.5 ? 1.5 - 0.7 * (t - 0.1) / 0.4 : t < 0.9 ? 0.8 + 0.4 * (t - 0.5) / 0.4 : 1.2;
    double of_home = home.d_alpha - home.d_sigma * home.alpha / home.sigma, of_path = at->d_alpha - at->d_sigma * at->alpha / at->sigma;
    loss *= of_path * of_path / (of_home * of_home);
    return w * loss / (loss + 2 * 0.5 * w * w) / 2;
}

TEST(sampler_sde_drift_is_exact) { // each Euler-Maruyama step, its noise 0: h (v + D s) and sqrt(2 D h), D by the table of the
                                   // paper's code
    static const double pi = 3.14159265358979323846;
    for (int mp = 0; mp < PATH_COUNT; mp++)
        for (int pred = 0; pred < PRED_COUNT; pred++)
            for (int path = 0; path < PATH_COUNT; path++)
                for (int form = 0; form < W_COUNT; form++) {
                    struct gauss g = gauss_path((enum path_kind)mp, (enum prediction)pred, 0.8, 0.6);
                    struct sampler_spec spec;
                    struct err e = { 0 };
                    struct sampler s;
                    struct sampler_step st;
                    struct f64_exec x;
                    double eta = 0.7, zero[32] = { 0 };
                    spec_of(&spec, &g, METHOD_EULER, (enum w_form)form, 20);
                    spec.path = (enum path_kind)path;
                    spec.w_t_scale = eta;
                    f64_exec_init(&x, 1);
                    x.net = gauss_net;
                    x.ctx = &g;
                    x.col[SAMPLER_X][0] = 0.9;
                    x.written[SAMPLER_X] = true;
                    x.noise = zero;
                    CHECK_OK(sampler_start(&s, &spec, &g.model, true, &e), &e);
                    double before = 0.9;
                    for (int rc; (rc = f64_exec_step(&x, &s, &st, &e)) > 0; before = x.col[SAMPLER_X][0]) {
                        struct path_at at;
                        path_eval(spec.path, st.time, &at);
                        if (!st.evaluate) continue; // the scaled start
                        double t = st.time, c = eta * cos(pi * t) + 1, sn = sin(pi * t);
                        double d[W_COUNT] = {eta, eta * at.var, eta * at.sigma, eta * (1 - t), 0.25 * c * c, eta * sn * sn};
                        double w = t < 0.4 ? 0.5 + 1.5 * t / 0.4 : 2 - 1.9 * (t - 0.4) / 0.6; // gauss_w_t's knots
                        d[W_KNOTS] = eta * w / 2;
                        d[W_KL_ETA] = eta * kl_eta(&g, &at);
                        double want = s.h * (gauss_velocity(&g, &at, before) + d[form] * gauss_score(&g, &at, before));
                        double scale =
                            fabs(before) + fabs(want) +
                            s.h * (1 + d[form]) * (1 + fabs(before)) * (1 + (at.ratio < 1e9 ? at.ratio : 0)) / at.sigma;
                        CHECK_NEAR(x.col[SAMPLER_X][0] - before, want, 1e-11 * scale);
                        CHECK_NEAR(st.assign[0].c_noise, sqrt(2 * d[form] * s.h), 1e-12 * (1 + sqrt(d[form])));
                    }
                    f64_exec_deinit(&x);
                }
}

TEST(sampler_sde_last_steps) { // at t1 = 1 - h: mean x + h (v + D s), tweedie E[x1|x], euler x + h v; on linear tweedie and euler
                               // agree
    for (int mp = 0; mp < PATH_COUNT; mp++)
        for (int path = 0; path < PATH_COUNT; path++) {
            double tweedie = 0;
            for (int last = LAST_MEAN; last < LAST_COUNT; last++) {
                struct gauss g = gauss_path((enum path_kind)mp, PRED_VELOCITY, 0.8, 0.6);
                struct sampler_spec spec;
                struct err e = { 0 };
                struct sampler s;
                struct sampler_step st;
                struct f64_exec x;
                double zero[8] = { 0 }, before = 0;
                spec_of(&spec, &g, METHOD_EULER, W_SIGMA, 3);
                spec.path = (enum path_kind)path;
                spec.last = (enum last_step)last;
                spec.last_size = 0.1;
                f64_exec_init(&x, 1);
                x.net = gauss_net;
                x.ctx = &g;
                x.col[SAMPLER_X][0] = 0.9;
                x.written[SAMPLER_X] = true;
                x.noise = zero;
                CHECK_OK(sampler_start(&s, &spec, &g.model, true, &e), &e);
                while (s.step < 2) CHECK(f64_exec_step(&x, &s, &st, &e) == 1);
                before = x.col[SAMPLER_X][0];
                CHECK(f64_exec_step(&x, &s, &st, &e) == 1);
                CHECK_NEAR(st.time, 0.9, 1e-15);
                struct path_at at;
                path_eval(spec.path, st.time, &at);
                double v = gauss_velocity(&g, &at, before), sc = gauss_score(&g, &at, before);
                double want = last == LAST_TWEEDIE ? gauss_data(&g, &at, before)
                                                   : before + 0.1 * (v + (last == LAST_MEAN ? at.sigma * sc : 0));
                CHECK_NEAR(x.col[SAMPLER_X][0], want, 1e-12);
                CHECK(f64_exec_step(&x, &s, &st, &e) == 0);
                if (last == LAST_TWEEDIE) tweedie = x.col[SAMPLER_X][0];
                if (last == LAST_EULER && path == PATH_LINEAR) CHECK_NEAR(x.col[SAMPLER_X][0], tweedie, 1e-12);
                f64_exec_deinit(&x);
            }
        }
}

TEST(sampler_sde_without_noise_is_the_ode) { // as w_t_scale goes to 0, SDE Heun goes to ODE Heun
    struct gauss g = gauss_path(PATH_GVP, PRED_VELOCITY, 0.8, 0.6);
    struct sampler_spec sde, ode;
    struct sampler s;
    struct f64_exec a, b;
    double x0[2] = { 0.4, -1.1 };
    spec_of(&sde, &g, METHOD_HEUN, W_SIGMA, 20);
    sde.w_t_scale = 1e-20;
    sampler_defaults(&ode, &g.model, SAMPLER_ODE);
    ode.steps = 20;
    f64_exec_init(&a, 2);
    f64_exec_init(&b, 2);
    f64_exec_set_x(&a, x0);
    f64_exec_set_x(&b, x0);
    run(&a, &sde, &g, true, &s);
    run(&b, &ode, &g, true, &s);
    for (int i = 0; i < 2; i++) CHECK_NEAR(a.col[SAMPLER_X][i], b.col[SAMPLER_X][i], 2e-3); // the ends differ by 1e-3
    f64_exec_deinit(&a);
    f64_exec_deinit(&b);
}

static void affine_net(void *ctx, const struct sampler_step *st, const double *x, double *f, int n) {
    (void)ctx;
    for (int e = 0; e < n; e++) f[e] = 0.3 * st->t - 0.5 * x[e]; // unlike an exact network, with e-hat other than 0 at t = 1
}

// Where D s has a limit at t = 1 the drift takes it, though s itself is infinite there. Only a replay comes so far: the
// recorder's Heun without a last step asks for the drift at 1 (and on linear got NaN). The run must agree with one that stops just
// short.
TEST(sampler_sde_drift_has_its_limit) {
    for (int form = 0; form < W_KNOTS; form++) {
        struct gauss g = gauss_path(PATH_LINEAR, PRED_VELOCITY, 0.8, 0.6);
        struct sampler_spec spec;
        struct err e = { 0 };
        struct sampler s;
        struct f64_exec a, b;
        double x0 = 0.4;
        if (form == W_SBDM) continue; // infinite at the other end
        spec_of(&spec, &g, METHOD_HEUN, (enum w_form)form, 10);
        spec.replay = true;
        f64_exec_init(&a, 1);
        f64_exec_init(&b, 1);
        f64_exec_set_x(&a, &x0);
        f64_exec_set_x(&b, &x0);
        a.net = b.net = affine_net;
        CHECK_OK(sampler_start(&s, &spec, &g.model, true, &e), &e);
        CHECK(s.t1 == 1);
        int rc = f64_exec_run(&a, &s, &e);
        if (form == W_CONSTANT) {
            CHECK(rc == E_NONFINITE && e.text[0]);
        } else {
            CHECK_OK(rc, &e);
            CHECK_OK(sampler_start(&s, &spec, &g.model, true, &e), &e);
            s.t1 = 1 - 0x1p-20;
            CHECK_OK(f64_exec_run(&b, &s, &e), &e);
            CHECK_NEAR(a.col[SAMPLER_X][0], b.col[SAMPLER_X][0], 1e-4);
        }
        f64_exec_deinit(&a);
        f64_exec_deinit(&b);
    }
}

// The authors' code on GVP takes cos(pi/2) in float32, -4.4e-8: where the last drift of Heun without a last step is evaluated, its
// score of a velocity is -1.46e7 v, which D may cancel or not. Numbers from running it.
TEST(sampler_sde_recorded_end_of_gvp) {
    static const struct {
        enum w_form form;
        double times_v; // D s / v
    } ends[] = {{W_SIGMA, 0.63662}, {W_LINEAR, 0}, {W_INC_DEC, 0}, {W_DECREASING, 0}, {W_CONSTANT, -1.456385e7}};
    struct sampler_model m = {.path = PATH_GVP, .prediction = PRED_VELOCITY};
    struct err e = {0};
    for (int i = 0; i < COUNT(ends); i++) {
        struct sampler_spec spec;
        struct sampler s;
        struct sampler_step st, last = {0};
        sampler_defaults(&spec, &m, SAMPLER_SDE);
        spec.method = METHOD_HEUN;
        spec.w_t = ends[i].form;
        spec.last = LAST_NONE;
        spec.steps = 4;
        spec.replay = true;
        CHECK_OK(sampler_start(&s, &spec, &m, true, &e), &e);
        int rc;
        while ((rc = sampler_next(&s, NULL, &st, &e)) == 1) last = st;
        CHECK_OK(rc, &e);
        CHECK(last.time == 1 && last.n == 1);
        CHECK_NEAR(last.assign[0].c_out, 0.125 * (1 + ends[i].times_v), 1e-5 * (1 + fabs(ends[i].times_v)));
    }
}
