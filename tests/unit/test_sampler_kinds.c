// SPDX-License-Identifier: MIT
/*
 * Discrete-time and EDM models and their samplers on Gaussian data, where everything is known: ddpm with the exact learned variance
 * keeps the marginal exactly, ddim, edm and the exponential steps converge to the flow at their orders, with every kind of network.
 * SITD_TEST_PRINT=1 prints what was measured.
 */
#include "core/diffusion/convert.h"
#include "tests/test.h"
#include "tests/unit/gauss.h"

static const struct gauss discrete = {.model = {.kind = MODEL_DISCRETE}, .mu = 0.8, .s = 0.6};

static const char *model_name(const struct sampler_model *m) {
    static char name[64];
    if (m->kind != MODEL_PATH) return m->kind == MODEL_EDM ? "edm" : "discrete";
    snprintf(name, sizeof name, "%s %s", path_name(m->path), prediction_name(m->prediction));
    return name;
}

static bool printing(void) { return getenv("SITD_TEST_PRINT") != NULL; }

/* a run on data, from places that are given */

static double run(const struct sampler_spec *spec, struct gauss *g, double x0, int *evaluations) {
    struct err e = {0};
    struct sampler s;
    struct f64_exec x;
    f64_exec_init(&x, 1);
    f64_exec_set_x(&x, &x0);
    x.net = gauss_net;
    x.ctx = g;
    CHECK_OK(sampler_start(&s, spec, &g->model, true, &e), &e);
    int expected = sampler_left(&s);
    CHECK_OK(f64_exec_run(&x, &s, &e), &e);
    if (evaluations) *evaluations = x.evaluations;
    CHECK(x.evaluations == expected);
    double y = x.col[SAMPLER_X][0];
    f64_exec_deinit(&x);
    return y;
}

// The first evaluation and the last of a run, as alpha and sigma of where it stands, and what the start multiplies noise by.
static void ends(const struct sampler_spec *spec, const struct gauss *g, struct path_at *first, struct path_at *last, double *scale) {
    struct sampler s;
    struct sampler_step st;
    struct path_at at;
    bool begun = false;
    *scale = 1;
    CHECK(sampler_start(&s, spec, &g->model, true, NULL) == OK);
    while (sampler_next(&s, NULL, &st, NULL) == 1) {
        if (!st.evaluate && !begun && st.draw == 0) *scale = st.assign[0].c[SAMPLER_X];
        if (!st.evaluate) continue;
        if (spec->type == SAMPLER_EDM) at = gauss_at(1, 1 / st.time - 1);
        else if (g->model.kind == MODEL_DISCRETE && spec->type != SAMPLER_ODE) {
            double abar = schedule_abar((int)st.t);
            at = gauss_at(sqrt(abar), sqrt(1 - abar));
        } else path_eval(spec->path, st.time, &at);
        if (!begun) *first = at;
        begun = true;
        *last = at;
    }
}

// How far a deterministic sampler that ends in x1-hat is from the flow, and x1-hat there.
static double error_of(const struct sampler_spec *spec, struct gauss *g) {
    struct path_at a, b;
    double scale, worst = 0;
    ends(spec, g, &a, &b, &scale);
    for (int i = 0; i < 4; i++) {
        double x0 = -1.7 + 1.1 * i, x = scale * x0;
        double there = b.alpha * g->mu + sqrt(gauss_var(g, &b) / gauss_var(g, &a)) * (x - a.alpha * g->mu);
        worst = fmax(worst, fabs(run(spec, g, x0, NULL) - gauss_data(g, &b, there)));
    }
    return worst;
}

// Mean and variance of the result when it starts from the exact marginal; every step is affine in x and the noise.
static void moments(const struct sampler_spec *spec, struct gauss *g, double *mean, double *var, struct path_at *last) {
    int draws = spec->steps, n = draws + 2;
    double *noise = calloc((size_t)draws * (size_t)n, sizeof *noise), scale;
    struct path_at first;
    struct f64_exec x;
    struct sampler s;
    struct err e = {0};
    CHECK(noise && n <= F64_MAX);
    ends(spec, g, &first, last, &scale);
    if (spec->type == SAMPLER_EDM) first = gauss_at(1, spec->sigma_max); // before the first churn
    for (int d = 0; d < draws; d++) noise[(size_t)d * (size_t)n + (size_t)d + 2] = 1;
    f64_exec_init(&x, n);
    for (int i = 0; i < n; i++) x.col[SAMPLER_X][i] = (first.alpha * g->mu + (i == 1) * sqrt(gauss_var(g, &first))) / scale;
    x.written[SAMPLER_X] = true;
    x.noise = noise;
    x.net = gauss_net;
    x.ctx = g;
    CHECK_OK(sampler_start(&s, spec, &g->model, true, &e), &e);
    CHECK_OK(f64_exec_run(&x, &s, &e), &e);
    *mean = x.col[SAMPLER_X][0];
    *var = 0;
    for (int i = 1; i < n; i++) *var += (x.col[SAMPLER_X][i] - *mean) * (x.col[SAMPLER_X][i] - *mean);
    f64_exec_deinit(&x);
    free(noise);
}

// By how much mean and variance miss those of x1-hat of the exact marginal at the last evaluation.
static double marginal_error(const struct sampler_spec *spec, struct gauss *g) {
    struct path_at last;
    double mean, var;
    moments(spec, g, &mean, &var, &last);
    double gain = last.alpha * g->s * g->s / gauss_var(g, &last), want = gain * gain * gauss_var(g, &last);
    return fmax(fabs(mean - g->mu), fabs(var / want - 1));
}

/* ddpm */

static void step_at(const struct sampler_spec *spec, int i, struct sampler_step *out) { // step i from the end: 1 is the last with noise
    struct sampler s;
    struct sampler_model m = {.kind = MODEL_DISCRETE, .learned_variance = true};
    struct err e = {0};
    CHECK_OK(sampler_start(&s, spec, &m, true, &e), &e);
    for (int j = spec->steps - 1; j >= i; j--) CHECK(sampler_next(&s, NULL, out, &e) == 1);
}

TEST(sampler_ddpm_golden) { // variances of the authors' tables; n = 250 has betas of its own
    struct sampler_model m = {.kind = MODEL_DISCRETE, .learned_variance = true};
    struct sampler_spec spec;
    struct sampler_step st;
    sampler_defaults(&spec, &m, SAMPLER_DDPM);
    CHECK(spec.steps == 250 && spec.spacing == SPACING_OPENAI);
    step_at(&spec, 1, &st);
    CHECK(st.learned && st.t == 4 && st.draw == 249);
    CHECK_NEAR(2 * st.log_lo, -9.3646281598, 1e-9);
    CHECK_NEAR(exp(2 * (st.log_lo + st.log_span)), 5.9906556448e-4, 1e-13);
    step_at(&spec, 249, &st);
    CHECK_NEAR(exp(2 * (st.log_lo + st.log_span)), 0.077519345, 1e-9);
    step_at(&spec, 0, &st);
    CHECK(!st.learned && st.assign[0].c_noise == 0 && st.t == 0);
    spec.steps = 1000;
    step_at(&spec, 1, &st);
    CHECK_NEAR(2 * st.log_lo, -9.8167251353, 1e-9);
    step_at(&spec, 999, &st);
    CHECK_NEAR(2 * st.log_lo, -3.9120238291, 1e-9);
    CHECK_NEAR(st.time, 1 / (1 + sqrt(1 / 4.0358298e-5 - 1)), 1e-8); // where the guidance interval is judged
}

TEST(sampler_ddpm_keeps_the_marginal) { // exactly, in any number of steps, when the learned variance is the true one
    static const int steps[] = {2, 10, 50, 250};
    for (int spacing = 0; spacing < SPACING_COUNT; spacing++)
        for (int i = 0; i < 4; i++) {
            struct gauss g = discrete;
            struct sampler_spec spec;
            g.model.learned_variance = true;
            sampler_defaults(&spec, &g.model, SAMPLER_DDPM);
            spec.spacing = (enum spacing)spacing;
            spec.steps = g.n = steps[i];
            for (int k = 0; k < g.n; k++) g.times[k] = schedule_time(spec.spacing, g.n, k);
            CHECK(marginal_error(&spec, &g) < 1e-10);
        }
}

TEST(sampler_ddpm_fixed_variance_converges) { // a network without one: the upper variance, right in the limit
    double before = 1;
    for (int steps = 25; steps <= 1000; steps *= 2) {
        struct gauss g = discrete;
        struct sampler_spec spec;
        sampler_defaults(&spec, &g.model, SAMPLER_DDPM);
        spec.steps = steps;
        double err = marginal_error(&spec, &g);
        if (printing()) printf("    ddpm, upper variance, %d steps: %.2e\n", steps, err);
        CHECK(err < 0.75 * before);
        before = err;
    }
    CHECK(before < 0.03);
}

/* ddim */

TEST(sampler_ddim_order) { // 1, on the schedule and on every path
    for (int i = 0; i < GAUSS_MODELS; i++) {
        struct gauss g = gauss_model(i, 0.8, 0.6);
        struct sampler_spec spec;
        sampler_defaults(&spec, &g.model, SAMPLER_DDIM);
        spec.steps = 40;
        double a = error_of(&spec, &g);
        spec.steps = 320;
        double b = error_of(&spec, &g), slope = log2(a / b) / 3;
        if (printing()) printf("    ddim of %s: order %.3f (%.2e %.2e)\n", model_name(&g.model), slope, a, b);
        CHECK(slope > 0.85 && b < 0.01);
    }
}

TEST(sampler_ddim_eta_keeps_the_marginal) { // the error falls with the step, whatever eta
    for (int i = 0; i < GAUSS_MODELS; i++)
        for (int eta = 1; eta <= 2; eta++) {
            struct gauss g = gauss_model(i, 0.8, 0.6);
            struct sampler_spec spec;
            sampler_defaults(&spec, &g.model, SAMPLER_DDIM);
            spec.eta = eta / 2.0;
            spec.steps = 100;
            double a = marginal_error(&spec, &g);
            spec.steps = 400;
            double b = marginal_error(&spec, &g);
            if (printing()) printf("    ddim eta %.1f of %s: %.2e %.2e\n", spec.eta, model_name(&g.model), a, b);
            CHECK(b < 0.35 * a && b < 0.04);
        }
}

TEST(sampler_ddim_eta_1_is_ddpm_with_the_lower_variance) { // the authors' remark, in coefficients
    for (int i = 0; i < 20; i += 3) {
        struct sampler_spec ddpm, ddim;
        struct sampler_step a, b;
        struct sampler_model m = {.kind = MODEL_DISCRETE, .learned_variance = true};
        sampler_defaults(&ddpm, &m, SAMPLER_DDPM);
        sampler_defaults(&ddim, &m, SAMPLER_DDIM);
        ddpm.steps = ddim.steps = 20;
        ddim.eta = 1;
        step_at(&ddpm, i, &a);
        step_at(&ddim, i, &b);
        CHECK_NEAR(a.assign[0].c[SAMPLER_X], b.assign[0].c[SAMPLER_X], 1e-10);
        CHECK_NEAR(a.assign[0].c_out, b.assign[0].c_out, 1e-10);
        CHECK_NEAR(i ? exp(a.log_lo) : 0, b.assign[0].c_noise, 1e-12);
    }
}

TEST(sampler_clip) { // data beyond 1 comes out as 1, and nothing else changes where nothing is clipped
    for (int type = SAMPLER_DDPM; type <= SAMPLER_DDIM; type++)
        for (int i = 0; i < GAUSS_MODELS; i++) {
            struct gauss far = gauss_model(i, 3, 0.01), near = gauss_model(i, 0.2, 0.05);
            struct sampler_spec spec;
            sampler_defaults(&spec, &far.model, (enum sampler_type)type);
            spec.steps = 20;
            if (sampler_check(&spec, &far.model, NULL)) continue;
            double open = run(&spec, &near, 0.3, NULL);
            CHECK(run(&spec, &far, 0.3, NULL) > 1.5);
            spec.clip = true;
            CHECK_NEAR(run(&spec, &far, 0.3, NULL), 1, 0);
            CHECK_NEAR(run(&spec, &near, 0.3, NULL), open, 1e-9);
        }
}

/* edm */

TEST(sampler_edm_grid_golden) { // 5 steps: 80, 17.5, 2.5, 0.17, 0.002, then 0
    static const double want[] = {80, 17.52783196, 2.51521898, 0.16975276, 0.002};
    struct sampler_model m = {.kind = MODEL_EDM, .sigma_data = 0.5};
    struct sampler_spec spec;
    struct sampler s;
    struct sampler_step st;
    struct err e = {0};
    sampler_defaults(&spec, &m, SAMPLER_EDM);
    CHECK(spec.steps == 40 && spec.method == METHOD_HEUN && sampler_evaluations(&spec, &m) == 79);
    spec.method = METHOD_EULER;
    spec.steps = 5;
    CHECK_OK(sampler_start(&s, &spec, &m, false, &e), &e);
    CHECK(sampler_next(&s, NULL, &st, &e) == 1 && !st.evaluate && st.assign[0].c_noise == 80);
    for (int i = 0; i < 5; i++) {
        CHECK(sampler_next(&s, NULL, &st, &e) == 1);
        CHECK_NEAR(exp(4 * st.t), want[i], 5e-9);
        CHECK_NEAR(st.in_scale, 1 / sqrt(want[i] * want[i] + 0.25), 1e-8);
        CHECK_NEAR(st.time, 1 / (1 + want[i]), 1e-8);
    }
    CHECK(sampler_next(&s, NULL, &st, &e) == 0);
}

TEST(sampler_edm_orders) { // Euler 1, Heun 2, with every network
    for (int i = 0; i < GAUSS_MODELS; i++)
        for (int method = METHOD_EULER; method <= METHOD_HEUN; method++) {
            struct gauss g = gauss_model(i, 0.8, 0.6);
            struct sampler_spec spec;
            sampler_defaults(&spec, &g.model, SAMPLER_EDM);
            spec.method = (enum sampler_method)method;
            spec.steps = 40;
            double a = error_of(&spec, &g);
            spec.steps = 320;
            double b = error_of(&spec, &g), slope = log2(a / b) / 3;
            if (printing()) printf("    edm %s of %s: order %.3f (%.2e %.2e)\n", sampler_method_name(method), model_name(&g.model), slope, a, b);
            CHECK_NEAR(slope, method == METHOD_HEUN ? 2 : 1, 0.15);
        }
}

TEST(sampler_edm_churn_keeps_the_marginal) {
    for (int i = 0; i < GAUSS_MODELS; i++)
        for (int method = METHOD_EULER; method <= METHOD_HEUN; method++) {
            struct gauss g = gauss_model(i, 0.8, 0.6);
            struct sampler_spec spec;
            sampler_defaults(&spec, &g.model, SAMPLER_EDM);
            spec.method = (enum sampler_method)method;
            spec.churn = 20;
            spec.s_min = 0.05;
            spec.s_max = 50;
            spec.steps = 100;
            double a = marginal_error(&spec, &g);
            spec.steps = 400;
            double b = marginal_error(&spec, &g);
            if (printing()) printf("    edm %s, churn, of %s: %.2e %.2e\n", sampler_method_name(method), model_name(&g.model), a, b);
            CHECK((b < 0.35 * a || b < 1e-5) && b < 0.05);
        }
}

TEST(sampler_edm_churns_where_it_is_told) { // gamma = min(churn/n, sqrt 2 - 1) between s_min and s_max, noise of size s_noise
    struct sampler_model m = {.kind = MODEL_EDM, .sigma_data = 0.5};
    struct sampler_spec spec;
    struct sampler s;
    struct sampler_step st;
    struct err e = {0};
    for (int strong = 0; strong < 2; strong++) {
        sampler_defaults(&spec, &m, SAMPLER_EDM);
        spec.steps = 5;
        spec.churn = strong ? 1000 : 1;
        spec.s_min = 0.1;
        spec.s_max = 20;
        spec.s_noise = 1.007;
        double gamma = strong ? sqrt(2) - 1 : 0.2, sigma = 0;
        int kicks = 0;
        CHECK_OK(sampler_start(&s, &spec, &m, false, &e), &e);
        CHECK(sampler_next(&s, NULL, &st, &e) == 1);
        for (int rc; (rc = sampler_next(&s, NULL, &st, &e)) == 1;) {
            if (st.evaluate) continue;
            sigma = 1 / st.time - 1;
            CHECK(sigma > 0.16 && sigma < 18 && ++kicks <= 3);
            CHECK(st.draw == (uint32_t)(kicks + 1)); // the step's own number
            CHECK_NEAR(st.assign[0].c_noise, 1.007 * sigma * sqrt((1 + gamma) * (1 + gamma) - 1), 1e-9 * sigma);
        }
        CHECK(kicks == 3); // 17.5, 2.5, 0.17
    }
}

/* exponential, dpmpp2m */

// 1; and 2 but for what steps that are even in t do at the ends of ln(alpha/sigma): a logarithm on linear and gvp, without which
// the slope is 2; on vp a small error of order 1.
TEST(sampler_exponential_orders) {
    for (int i = 0; i < GAUSS_MODELS; i++)
        for (int path = 0; path < PATH_COUNT; path++)
            for (int method = METHOD_EXPONENTIAL; method <= METHOD_DPMPP2M; method++) {
                struct gauss g = gauss_model(i, 0.8, 0.6);
                struct sampler_spec spec;
                sampler_defaults(&spec, &g.model, SAMPLER_ODE);
                spec.method = (enum sampler_method)method;
                spec.path = (enum path_kind)path;
                spec.steps = 320;
                double a = error_of(&spec, &g);
                spec.steps = 2560;
                double b = error_of(&spec, &g), slope = log2(a / b) / 3;
                if (printing())
                    printf("    %s of %s on %s: order %.3f (%.2e %.2e)\n", sampler_method_name(method), model_name(&g.model),
                           path_name((enum path_kind)path), slope, a, b);
                if (method == METHOD_EXPONENTIAL) CHECK(slope > 0.9);
                else CHECK(slope + log2(log(2560) / log(320)) / 3 > (path == PATH_VP ? 1.6 : 1.85));
            }
}

TEST(sampler_exponential_on_linear_is_euler) {
    struct gauss g = gauss_path(PATH_LINEAR, PRED_VELOCITY, 0.8, 0.6);
    struct sampler_spec a, b;
    sampler_defaults(&a, &g.model, SAMPLER_ODE);
    a.steps = 12;
    b = a;
    a.method = METHOD_EULER;
    b.method = METHOD_EXPONENTIAL;
    CHECK_NEAR(run(&a, &g, 0.7, NULL), run(&b, &g, 0.7, NULL), 1e-13);
    sampler_defaults(&b, &g.model, SAMPLER_DDIM);
    b.steps = 12;
    CHECK_NEAR(run(&a, &g, 0.7, NULL), run(&b, &g, 0.7, NULL), 1e-13);
}

TEST(sampler_exponential_asks_no_further_than_the_model_knows) { // many steps: the last evaluation is where its range ends
    for (int path = 0; path < PATH_COUNT; path++)
        for (int i = 0; i < GAUSS_MODELS; i++) {
            struct gauss g = gauss_model(i, 0.8, 0.6);
            struct sampler_spec spec;
            struct path_at a, b;
            double scale, least, most;
            sampler_defaults(&spec, &g.model, SAMPLER_ODE);
            spec.method = METHOD_DPMPP2M;
            spec.path = (enum path_kind)path;
            spec.steps = 5000;
            ends(&spec, &g, &a, &b, &scale);
            convert_range(&g.model, &least, &most);
            CHECK(b.alpha / b.sigma <= most * (1 + 1e-9));
            if (g.model.kind != MODEL_PATH && path != PATH_VP) CHECK(b.alpha / b.sigma > 0.9 * most);
        }
}

/* ODE with a last estimate of the data */

TEST(sampler_denoise) { // the flow to t1, then x1-hat; dopri5 and fixed steps, every network, every path
    for (int i = 0; i < GAUSS_MODELS; i++)
        for (int path = 0; path < PATH_COUNT; path++) {
            struct gauss g = gauss_model(i, 0.8, 0.6);
            struct sampler_spec spec;
            sampler_defaults(&spec, &g.model, SAMPLER_ODE);
            CHECK(spec.denoise == (g.model.kind != MODEL_PATH));
            spec.denoise = true;
            spec.path = (enum path_kind)path;
            spec.method = METHOD_RK4;
            spec.steps = 800;
            bool leads = path == PATH_VP && g.model.kind == MODEL_PATH && g.model.path != PATH_VP && g.model.prediction == PRED_VELOCITY;
            CHECK(sampler_evaluations(&spec, &g.model) == 3201 + leads);
            CHECK(error_of(&spec, &g) < 2e-5);
        }
}

/* what is refused */

static void refused(const struct sampler_spec *spec, const struct gauss *g, const char *param, const char *why) {
    struct err e = {0};
    CHECK(sampler_check(spec, &g->model, &e) == E_RANGE);
    CHECK_STR(e.param, param);
    if (!strstr(e.text, why)) test_fail(__FILE__, __LINE__, "\"%s\" does not say \"%s\"", e.text, why);
}

#define REFUSED(g, type, field, value, param, why)                                                                               \
    do {                                                                                                                         \
        struct sampler_spec q_;                                                                                                  \
        sampler_defaults(&q_, &(g).model, type);                                                                                 \
        q_.field = value;                                                                                                        \
        refused(&q_, &(g), param, why);                                                                                          \
    } while (0)

TEST(sampler_refusals_of_kinds) {
    struct gauss sit = gauss_path(PATH_LINEAR, PRED_VELOCITY, 0, 1), dit = discrete, edm = gauss_model(GAUSS_MODELS - 1, 0, 1);
    struct gauss vp = gauss_path(PATH_VP, PRED_NOISE, 0, 1);
    REFUSED(sit, SAMPLER_DDPM, steps, 250, "sampler.type", "discrete times");
    REFUSED(edm, SAMPLER_DDPM, steps, 250, "sampler.type", "discrete times");
    REFUSED(dit, SAMPLER_DDPM, steps, 1001, "sampler.steps", "1000");
    REFUSED(dit, SAMPLER_DDIM, steps, 0, "sampler.steps", "1000");
    REFUSED(dit, SAMPLER_DDPM, path, PATH_LINEAR, "interpolant", "schedule of its own");
    REFUSED(dit, SAMPLER_DDIM, path, PATH_GVP, "interpolant", "schedule of its own");
    REFUSED(sit, SAMPLER_EDM, path, PATH_VP, "interpolant", "edm");
    REFUSED(dit, SAMPLER_DDPM, eta, 1, "sampler.eta", "ddim");
    REFUSED(dit, SAMPLER_DDIM, eta, 1.01, "sampler.eta", "1");
    REFUSED(sit, SAMPLER_DDIM, eta, NAN, "sampler.eta", "1");
    REFUSED(sit, SAMPLER_DDIM, spacing, SPACING_LEADING, "sampler.spacing", "discrete times");
    REFUSED(dit, SAMPLER_DDIM, spacing, (enum spacing)9, "sampler.spacing", "9");
    struct sampler_spec stride;
    sampler_defaults(&stride, &dit.model, SAMPLER_DDIM);
    stride.spacing = SPACING_DDIM;
    stride.steps = 37;
    refused(&stride, &dit, "sampler.steps", "36 is");
    stride.steps = 1;
    refused(&stride, &dit, "sampler.steps", "2 is");
    REFUSED(edm, SAMPLER_EDM, method, METHOD_RK4, "sampler.method", "heun or euler");
    REFUSED(edm, SAMPLER_EDM, rho, 0, "sampler.rho", "0.1");
    REFUSED(edm, SAMPLER_EDM, churn, -1, "sampler.churn", "0");
    REFUSED(edm, SAMPLER_EDM, s_noise, NAN, "sampler.s_noise", "100");
    REFUSED(edm, SAMPLER_EDM, s_min, -1, "sampler.s_min", "0");
    REFUSED(edm, SAMPLER_EDM, s_max, NAN, "sampler.s_max", "inf");
    REFUSED(edm, SAMPLER_EDM, sigma_min, 0, "sampler.sigma_min", "80");
    REFUSED(edm, SAMPLER_EDM, sigma_min, 81, "sampler.sigma_min", "80");
    REFUSED(edm, SAMPLER_EDM, sigma_max, INFINITY, "sampler.sigma_max", "100000");
    REFUSED(dit, SAMPLER_EDM, sigma_min, 0.002, "sampler.sigma_min", "0.01000");
    REFUSED(dit, SAMPLER_EDM, sigma_max, 160, "sampler.sigma_max", "157.4");
    REFUSED(vp, SAMPLER_EDM, sigma_max, 153, "sampler.sigma_max", "152.1");
    struct sampler_spec churned;
    sampler_defaults(&churned, &dit.model, SAMPLER_EDM);
    churned.sigma_max = 150;
    CHECK(sampler_check(&churned, &dit.model, NULL) == OK);
    churned.churn = 4; // 150 * 1.1
    refused(&churned, &dit, "sampler.sigma_max", "157.4");
    churned.s_max = 100; // 100 * 1.1
    CHECK(sampler_check(&churned, &dit.model, NULL) == OK);
}

TEST(sampler_refusals_of_w_t) {
    struct gauss sit = gauss_path(PATH_LINEAR, PRED_VELOCITY, 0, 1), dit = discrete;
    struct sampler_spec spec, bad;
    REFUSED(sit, SAMPLER_SDE, w_t, W_KL_ETA, "sampler.w_t", "loss");
    REFUSED(dit, SAMPLER_SDE, w_t, W_KL_ETA, "sampler.w_t", "loss");
    REFUSED(sit, SAMPLER_SDE, w_t, W_KNOTS, "sampler.w_t", "1 to 64");
    sampler_defaults(&spec, &sit.model, SAMPLER_SDE);
    CHECK(gauss_w_t(&spec, &sit.model, W_KNOTS) && sampler_check(&spec, &sit.model, NULL) == OK);
    bad = spec, bad.knots.n = 65;
    refused(&bad, &sit, "sampler.w_t", "65");
    bad = spec, bad.knots.t[1] = 0;
    refused(&bad, &sit, "sampler.w_t", "pair 1");
    bad = spec, bad.knots.t[2] = 1.1;
    refused(&bad, &sit, "sampler.w_t", "pair 2");
    bad = spec, bad.knots.t[0] = NAN;
    refused(&bad, &sit, "sampler.w_t", "pair 0");
    bad = spec, bad.knots.v[1] = -0.1;
    refused(&bad, &sit, "sampler.w_t", "pair 1");
    bad = spec, bad.knots.v[1] = INFINITY;
    refused(&bad, &sit, "sampler.w_t", "pair 1");
    spec.w_t = W_KL_ETA;
    CHECK(sampler_check(&spec, &sit.model, NULL) == OK);
    bad = spec, bad.w_t_eta = -1;
    refused(&bad, &sit, "sampler.w_t_eta", "0");
    bad = spec, bad.w_t_eta = NAN;
    refused(&bad, &sit, "sampler.w_t_eta", "0");
    sit.model.loss.v[0] = 0;
    refused(&spec, &sit, "model.loss", "pair 0");
}

TEST(sampler_notes_of_kinds) { // their numbers are those of the intervals
    for (int kind = 0; kind < 2; kind++)
        for (int path = 0; path < PATH_COUNT; path++) {
            struct gauss g = gauss_model(GAUSS_MODELS - 2 + kind, 0, 1);
            struct sampler_spec spec;
            const char *notes[8];
            char want[2][24];
            int found[2] = {0};
            sampler_defaults(&spec, &g.model, SAMPLER_ODE);
            CHECK(spec.path == (kind ? PATH_LINEAR : PATH_VP));
            spec.path = (enum path_kind)path;
            int n = sampler_notes(&spec, &g.model, notes, 8);
            double t0 = convert_start(spec.path, &g.model), t1 = path == PATH_VP ? 0.999 : convert_end(spec.path, &g.model);
            snprintf(want[0], sizeof want[0], "t = %.4f", t0);
            snprintf(want[1], sizeof want[1], path == PATH_VP ? "t = %.3f" : "t = %.4f", t1);
            for (int i = 0; i < n; i++)
                for (int k = 0; k < 2; k++) found[k] += strstr(notes[i], want[k]) != NULL;
            if (printing()) for (int i = 0; i < n; i++) printf("    %s\n", notes[i]);
            CHECK(found[0] == (t0 > 0) && found[1] == 1 && n == 2 + (t0 > 0)); // and the last evaluation
            sampler_defaults(&spec, &g.model, sampler_home_type(&g.model));
            CHECK(sampler_notes(&spec, &g.model, notes, 8) == 0);
        }
}
