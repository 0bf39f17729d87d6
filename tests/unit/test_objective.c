// SPDX-License-Identifier: MIT
/*
 * The numbers of an objective that the recorded cases (tests/golden) do not pin: what is drawn, and the loss by time.
 */
#include "core/train/objective.h"

#include <math.h>

#include "tests/test.h"

enum { DRAWS = 20000 };

static const struct objective velocity = {
    .path = PATH_LINEAR, .prediction = PRED_VELOCITY, .drop = 0.1, .null_label = 10, .seed = 7};

TEST(objective_draws_depend_on_their_place_alone) {
    struct objective_row a, b;
    objective_row(&velocity, 5, 3, 2, 0.25, &a);
    objective_row(&velocity, 6, 4, 2, 0.25, &b);
    CHECK(a.t != b.t);
    objective_row(&velocity, 5, 3, 2, 0.25, &b);
    CHECK(a.t == b.t && a.y == b.y && a.mix.seed == 7 && a.mix.image == 3 && a.mix.draw == 5 && a.loss.grad == 0.25f);
}

// Mean, deviation and ends of the times, and how many labels go.
static void check_times(struct objective o, double mean, double sd, double least, double most) {
    double sum = 0, squares = 0, low = INFINITY, high = -INFINITY;
    int dropped = 0;
    for (uint32_t i = 0; i < DRAWS; i++) {
        struct objective_row row;
        objective_row(&o, i / 100, i % 100, 1, 1, &row);
        double t = (double)row.t;
        sum += t, squares += t * t, low = fmin(low, t), high = fmax(high, t);
        dropped += row.y == o.null_label;
        CHECK(row.y == 1 || row.y == o.null_label);
    }
    double m = sum / DRAWS, s = sqrt(squares / DRAWS - m * m);
    CHECK_NEAR(m, mean, 4 * sd / sqrt(DRAWS));
    CHECK_NEAR(s, sd, 0.02 * sd);
    CHECK_NEAR((double)dropped / DRAWS, o.drop, 4 * sqrt(o.drop / DRAWS));
    CHECK(low >= least - 1e-8 && high <= most + 1e-8);
}

TEST(objective_times) {
    struct objective o = velocity;
    check_times(o, 0.5, sqrt(1 / 12.0), 0, 1);
    o.prediction = PRED_SCORE;
    check_times(o, 0.5, 0.998 * sqrt(1 / 12.0), 0.001, 0.999);
    o.path = PATH_VP;
    check_times(o, 0.5, sqrt(1 / 12.0), 0, 0.99999);
    o = velocity, o.discrete = true;
    check_times(o, 499.5, 1000 * sqrt(1 / 12.0), 0, 999);
    o = velocity, o.density = DENSITY_LOGIT_NORMAL, o.mean = 0, o.std = 1; // its deviation: numerical integral of the density
    check_times(o, 0.5, 0.20825, 0, 1);
}

// models-and-math 2: numbers of the authors' tables.
TEST(objective_learned_range) {
    struct objective o = {.discrete = true, .learned_range = true};
    struct objective_row row;
    objective_row_at(&o, 0, 0, 1, &row);
    CHECK(row.loss.first);
    CHECK_NEAR((double)row.loss.log_lo, -9.8167251353, 1e-6);
    CHECK_NEAR((double)(row.loss.log_lo + row.loss.log_span), -9.2103403720, 1e-6);
    CHECK_NEAR((double)row.loss.posterior, 1, 1e-7);
    objective_row_at(&o, 1, 0, 1, &row);
    CHECK(!row.loss.first);
    CHECK_NEAR((double)row.loss.lv_true, -9.8167251353, 1e-6);
    objective_row_at(&o, 999, 0, 1, &row);
    CHECK_NEAR((double)row.loss.log_lo, -3.9120238291, 1e-6);
    CHECK_NEAR((double)(row.mix.a1 * row.mix.a1), 4.0358298e-5, 1e-10);
}

// A network that is off by d in the noise is off by d V/sigma in the velocity, whatever it says and however its loss is weighted.
TEST(objective_loss_of_the_velocity) {
    for (int p = 0; p < PATH_COUNT; p++)
        for (int w = 0; w < WEIGHTING_COUNT; w++)
            for (int kind = PRED_NOISE; kind <= PRED_SCORE; kind++) {
                struct objective o = {
                    .path = (enum path_kind)p, .prediction = (enum prediction)kind, .weighting = (enum weighting)w};
                struct objective_row row;
                struct path_at at;
                double d = 0.01;
                objective_row_at(&o, 0.375, 0, 1, &row);
                path_eval(o.path, 0.375, &at);
                double off = kind == PRED_NOISE ? d : d / at.sigma, e = (double)row.loss.c_out * off;
                double loss = (double)row.loss.weight * e * e, v = path_velocity(&at, o.prediction).f * off;
                CHECK_NEAR(loss * row.velocity / (v * v), 1, 1e-6);
            }
}

TEST(objective_refuses) {
    static const struct {
        struct objective o;
        const char *culprit;
    } cases[] = {
        {{.drop = 1.5}, "drop"},
        {{.drop = (double)NAN}, "drop"},
        {{.drop = 0.1, .null_label = -1}, "drop"},
        {{.density = DENSITY_LOGIT_NORMAL, .std = 0}, "std"},
        {{.density = DENSITY_LOGIT_NORMAL, .std = 1, .mean = (double)INFINITY}, "mean"},
        {{.weighting = WEIGHTING_VELOCITY}, "weighting"},
        {{.discrete = true, .prediction = PRED_NOISE, .weighting = WEIGHTING_LIKELIHOOD}, "weighting"},
        {{.learned_range = true}, "learned_range"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct err e = {0};
        CHECK(objective_check(&cases[i].o, &e) != OK);
        CHECK_STR(e.param, cases[i].culprit);
    }
    CHECK(objective_check(&velocity, NULL) == OK);
}

TEST(objective_bins) {
    struct objective_bins b = {0};
    struct loss_knot knots[OBJECTIVE_BINS];
    CHECK(objective_bins_curve(&b, knots) == 0);
    objective_bins_add(&b, 0, 4);
    objective_bins_add(&b, 0.01, 2);
    objective_bins_add(&b, 1, 1);
    CHECK(objective_bins_curve(&b, knots) == 2);
    CHECK_NEAR(knots[0].loss, 3, 1e-12);
    CHECK_NEAR(knots[0].t, 0.5 / OBJECTIVE_BINS, 1e-12);
    CHECK_NEAR(knots[1].t, 1 - 0.5 / OBJECTIVE_BINS, 1e-12);
    for (int i = 0; i < 100000; i++) objective_bins_add(&b, 1, 5); // ten times what fades
    CHECK(objective_bins_curve(&b, knots) == 2);
    CHECK_NEAR(knots[1].loss, 5, 1e-3);
}
