// SPDX-License-Identifier: MIT
#include "core/diffusion/path.h"

#include <math.h>

#include "core/diffusion/convert.h"
#include "tests/test.h"

static const double times[] = { 0.001, 0.05, 0.25, 0.5, 0.8, 0.96, 0.999 };
#define COUNT(a) ((int)(sizeof(a) / sizeof *(a)))

TEST(path_names) {
    CHECK(path_parse("linear") == PATH_LINEAR && path_parse("Linear") == PATH_LINEAR && path_parse("GVP") == PATH_GVP &&
          path_parse("Vp") == PATH_VP);
    CHECK(path_parse("linea") == -1 && path_parse("") == -1 && path_parse(NULL) == -1);
    for (int i = 0; i < PATH_COUNT; i++) CHECK(path_parse(path_name((enum path_kind)i)) == i);
    for (int i = 0; i < PRED_COUNT; i++) CHECK(prediction_parse(prediction_name((enum prediction)i)) == i);
    CHECK_STR(path_name((enum path_kind)99), "?");
}

TEST(path_golden) { // values of the authors' code at t = 0.25 and 0.8, and VP's ends
    struct path_at at;
    static const double var[PATH_COUNT][2] = { { 3, 0.25 }, { 3.79224, 0.510383 }, { 7.5125, 2.04 } };
    for (int k = 0; k < PATH_COUNT; k++)
        for (int i = 0; i < 2; i++) {
            path_eval((enum path_kind)k, i ? 0.8 : 0.25, &at);
            CHECK_NEAR(at.var, var[k][i], 1e-5);
        }
    path_eval(PATH_VP, 0, &at);
    CHECK_NEAR(at.alpha, 0.00657159, 1e-8);
    CHECK_NEAR(at.sigma, 0.99997841, 1e-8);
    path_eval(PATH_VP, 1, &at);
    CHECK(at.alpha == 1 && at.sigma == 0);
    path_eval(PATH_GVP, 1, &at);
    CHECK(at.alpha == 1 && at.sigma == 0);
}

TEST(path_derivatives) { // against central differences, and V and ratio against their definitions
    for (int k = 0; k < PATH_COUNT; k++)
        for (int i = 1; i < COUNT(times); i++) {
            struct path_at at, lo, hi;
            double t = times[i], h = 1e-6;
            path_eval((enum path_kind)k, t, &at);
            path_eval((enum path_kind)k, t - h, &lo);
            path_eval((enum path_kind)k, t + h, &hi);
            CHECK_NEAR(at.d_alpha, (hi.alpha - lo.alpha) / (2 * h), 1e-6 * (1 + fabs(at.d_alpha)));
            CHECK_NEAR(at.d_sigma, (hi.sigma - lo.sigma) / (2 * h), 1e-5 * (1 + fabs(at.d_sigma)));
            CHECK_NEAR(at.ratio, at.d_alpha / at.alpha, 1e-12 * at.ratio);
            CHECK_NEAR(at.var, at.ratio * at.sigma * at.sigma - at.sigma * at.d_sigma, 1e-10 * (1 + at.var));
        }
}

static double apply(struct lin l, double x, double f) { return l.x * x + l.f * f; }

TEST(path_predictions_agree) { // one (x1, e): whatever the network predicts, the same four things come out
    double x1 = 0.7, e = -1.3;
    for (int k = 0; k < PATH_COUNT; k++)
        for (int i = 0; i < COUNT(times); i++) {
            struct path_at at;
            path_eval((enum path_kind)k, times[i], &at);
            double x = at.alpha * x1 + at.sigma * e, v = at.d_alpha * x1 + at.d_sigma * e, s = -e / at.sigma;
            double out[PRED_COUNT] = { v, e, s };
            for (int p = 0; p < PRED_COUNT; p++) {
                enum prediction pred = (enum prediction)p;
                double scale = 1 / (at.alpha * at.sigma); // conditioning of the formulas near the ends
                CHECK_NEAR(apply(path_velocity(&at, pred), x, out[p]), v, 1e-12 * (1 + fabs(v)) * (1 + scale));
                CHECK_NEAR(apply(path_noise(&at, pred), x, out[p]), e, 1e-12 * (1 + scale));
                CHECK_NEAR(apply(path_score(&at, pred), x, out[p]), s, 1e-12 * (1 + fabs(s)) * (1 + scale));
                CHECK_NEAR(apply(path_data(&at, pred), x, out[p]), x1, 1e-12 * (1 + scale));
            }
        }
}

TEST(path_limits) { // what must be finite at the ends is, with the value of the limit
    struct path_at at;
    for (int k = 0; k < PATH_COUNT; k++) {
        path_eval((enum path_kind)k, 0, &at);
        struct lin s = path_score(&at, PRED_VELOCITY);
        if (k != PATH_VP) CHECK(s.x == -1 && s.f == 0);
        path_eval((enum path_kind)k, 1, &at);
        struct lin d = path_data(&at, PRED_VELOCITY), n = path_noise(&at, PRED_VELOCITY);
        CHECK(d.x == 1 && d.f == 0 && isfinite(n.x) && isfinite(n.f));
        if (k != PATH_VP) CHECK(isfinite(path_velocity(&at, PRED_NOISE).f));
    }
    struct lin s = path_score(&at, PRED_VELOCITY); // VP at 1: 2v/beta - x
    CHECK_NEAR(s.f, 20, 1e-12);
    CHECK(s.x == -1);
}

TEST(convert_golden) {
    static const struct {
        enum path_kind model, path;
        double r, t, k;
    } cases[] = {
        { PATH_LINEAR, PATH_VP, 0.5, 0.22661, 1.24084 }, { PATH_LINEAR, PATH_GVP, 0.5, 0.5, 1.41421 },
        { PATH_VP, PATH_LINEAR, 0.5, 0.74104, 0.70711 }, { PATH_GVP, PATH_VP, 0.5, 0.18145, 1 },
        { PATH_LINEAR, PATH_VP, 0.9, 0.74617, 1.26877 }, { PATH_VP, PATH_LINEAR, 0.9, 0.96955, 0.90554 },
    };
    for (int i = 0; i < COUNT(cases); i++) {
        struct sampler_model m = {.path = cases[i].model, .prediction = PRED_VELOCITY};
        struct convert_at at;
        convert_eval(cases[i].path, &m, cases[i].r, &at);
        CHECK_NEAR(at.t, cases[i].t, 1e-5);
        CHECK_NEAR(1 / at.in_scale, cases[i].k, 1e-5);
    }
}

TEST(path_time_inverts) {
    for (int k = 0; k < PATH_COUNT; k++)
        for (double t = 0; t <= 1; t += 1.0 / 64) {
            struct path_at at;
            path_eval((enum path_kind)k, t, &at);
            CHECK_NEAR(path_time((enum path_kind)k, at.alpha, at.sigma), t, 1e-14 + (k == PATH_VP ? 1e-11 : 0));
        }
    CHECK(path_time(PATH_VP, 0, 1) == 0 && path_time(PATH_VP, 1e-200, 1) == 0 && path_time(PATH_VP, 1, 0) == 1);
    struct sampler_model vp = {.path = PATH_VP}, linear = {.path = PATH_LINEAR};
    CHECK_NEAR(convert_start(PATH_LINEAR, &vp), 0.00653, 5e-6);
    CHECK(convert_start(PATH_GVP, &linear) == 0 && convert_start(PATH_VP, &vp) == 0);
}
