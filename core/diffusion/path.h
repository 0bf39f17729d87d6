// SPDX-License-Identifier: MIT
/*
 * path: interpolants x_t = alpha(t) x1 + sigma(t) x0, x0 ~ N(0, I), and what a network's output means on them.
 *
 * Time runs as in the SiT code: t = 0 is noise, t = 1 is data. Linear (alpha t, sigma 1-t), GVP (sin, cos of pi t/2), VP
 * (alpha = exp L(t), beta from 0.1 to 20). All in double precision; pure functions; any thread. SiT paper section 3, code
 * transport/path.py.
 */
#ifndef SITD_PATH_H
#define SITD_PATH_H
#include <stdbool.h>

enum path_kind { PATH_LINEAR, PATH_GVP, PATH_VP, PATH_COUNT };
enum prediction { PRED_VELOCITY, PRED_NOISE, PRED_SCORE, PRED_COUNT };

const char *path_name(enum path_kind);       // "linear", "gvp", "vp"
const char *prediction_name(enum prediction); // "velocity", "noise", "score"
int path_parse(const char *s);               // index, or -1; accepts any letter case ("Linear", "GVP")
int prediction_parse(const char *s);

struct path_at { // a path's numbers at one t
    enum path_kind kind;
    double t, alpha, sigma, d_alpha, d_sigma; // d_: derivative in t
    double ratio; // alpha'/alpha (closed form of the path; infinite at t = 0 for linear and GVP)
    double var;   // V(t) = ratio*sigma^2 - sigma*sigma' : velocity = V*score + ratio*x
};
void path_eval(enum path_kind, double t, struct path_at *);
double path_var_over_sigma(const struct path_at *); // V/sigma, finite at t = 1 of linear and GVP
// The inverse: the time with the signal-to-noise ratio alpha/sigma (each >= 0, not both 0). Below VP's least ratio, 0.0066: 0.
double path_time(enum path_kind, double alpha, double sigma);

// A pair of numbers (a, b) meaning a*x + b*F, where F is the network's output: every conversion is linear.
struct lin { double x, f; };
struct lin path_velocity(const struct path_at *, enum prediction); // the velocity from (x, F)
struct lin path_score(const struct path_at *, enum prediction);    // the score from (x, F)
struct lin path_data(const struct path_at *, enum prediction);     // x1-hat
struct lin path_noise(const struct path_at *, enum prediction);    // x0-hat (epsilon)

#endif
