// SPDX-License-Identifier: MIT
/*
 * sampler: a solver as a program over rows.
 *
 * A sampler never loops over steps. sampler_next says what happens next to one image: perhaps one evaluation of the network at
 * (scale * column[in], t), then one move of the image's columns by a small matrix whose coefficients it computed in
 * double precision. Whoever drives it (the engine with kernels, `sitd sample`, a float64 test) executes that step and asks again.
 * So a hundred images with unlike solvers, step counts and w_t share one batch, and a test may stop anywhere.
 *
 * Column SAMPLER_X is the state, always; the finished image is in SAMPLER_X. Other columns are the solver's own.
 * The struct holds no pointers and allocates nothing: copy it, embed it. Thread: its owner's.
 * Sources: SiT transport/integrators.py and transport.py (ODE, SDE, last step), torchdiffeq (tableaus, dopri5 controller), DiT
 * diffusion/ (DDPM, DDIM), EDM algorithm 2 (Karras et al. 2022), DPM-Solver++ (Lu et al. 2022).
 */
#ifndef SITD_SAMPLER_H
#define SITD_SAMPLER_H
#include <stdbool.h>
#include <stdint.h>

#include "core/base/err.h"
#include "core/diffusion/path.h"
#include "core/diffusion/schedule.h"

enum sampler_type { SAMPLER_ODE, SAMPLER_SDE, SAMPLER_DDPM, SAMPLER_DDIM, SAMPLER_EDM, SAMPLER_TYPE_COUNT };
// exponential (DDIM's step on any path) and dpmpp2m are exact where x1-hat does not change (models-and-math section 4)
enum sampler_method {
    METHOD_EULER,
    METHOD_HEUN,
    METHOD_MIDPOINT,
    METHOD_RK4,
    METHOD_DOPRI5,
    METHOD_EXPONENTIAL,
    METHOD_DPMPP2M,
    METHOD_COUNT
};
// The diffusion coefficient D(t); the paper's w = 2D. kl-eta: V L/(L + 8 eta V^2), L the model's velocity loss. knots: w itself
enum w_form { W_CONSTANT, W_SBDM, W_SIGMA, W_LINEAR, W_DECREASING, W_INC_DEC, W_KL_ETA, W_KNOTS, W_COUNT };
enum last_step { LAST_NONE, LAST_MEAN, LAST_TWEEDIE, LAST_EULER, LAST_COUNT };
// names as in the HTTP contract: "ode", "euler", "increasing-decreasing", "mean"; parse gives the index or -1
const char *sampler_type_name(int);
const char *sampler_method_name(int);
const char *w_form_name(int);
const char *last_step_name(int);
int sampler_type_parse(const char *);
int sampler_method_parse(const char *);
int w_form_parse(const char *);
int last_step_parse(const char *);

#define SAMPLER_COLS 12   // = KERN_COLS; the engine asserts it
#define SAMPLER_ASSIGN 3  // = KERN_ASSIGN
#define SAMPLER_X 0
#define SAMPLER_MAX_STEPS 10000
#define SAMPLER_MAX_EVALUATIONS 40000
#define SAMPLER_MIN_ATOL 1e-12 // far below what float32 resolves; dopri5's error norm cannot overflow
#define SAMPLER_KNOTS 64

struct sampler_curve { // linear between n points of rising t, constant outside
    int n;
    double t[SAMPLER_KNOTS], v[SAMPLER_KNOTS];
};
double sampler_curve_at(const struct sampler_curve *, double t); // n >= 1

struct sampler_spec { // one request's choice, every field filled (sampler_defaults, then the request's own)
    enum sampler_type type;
    enum sampler_method method;
    int steps;            // solver steps really made; an SDE's last step counts as one (then least 2). Not used by dopri5
    bool denoise;         // ODE: one more evaluation, the result is x1-hat at the end (exponential, dpmpp2m end so by themselves)
    int max_evaluations;  // dopri5: gives up with E_RANGE when it would need more
    enum path_kind path;  // sampling path; unlike the model's own it is converted (models-and-math section 4)
    enum w_form w_t;
    double w_t_scale, w_t_eta;  // w_t_eta: kl-eta
    struct sampler_curve knots; // knots: w in the paper's convention over the sampling path's t
    enum last_step last;
    double last_size;     // 0..1, in t
    double atol, rtol;    // dopri5
    enum spacing spacing; // ddpm, ddim of a discrete-time model
    double eta;           // ddim, 0..1
    bool clip;            // ddpm, ddim: x1-hat is clipped to [-1, 1]
    double churn, s_min, s_max, s_noise, rho, sigma_min, sigma_max; // edm; its method is heun or euler
    double guidance;      // scale; 1 = one row
    double guide_from, guide_to; // closed interval of the sampling path's t in which guidance acts
    int guide_channels;   // leading channels that are guided; the driver reads it
    // Conventions of a recorder, for replay only: the grid's points rounded to float32 and dopri5's end read from the interpolant
    bool replay;
};

// How a network's input and output are to be read:
//   path      x on `path` at its t; F is `prediction`                                                             (SiT)
//   discrete  x at time 0..999 of the schedule, whole or not; F is the noise                                       (DiT)
//   edm       c_in x at ln(sigma)/4, x = x1 + sigma x0; F gives x1-hat = c_skip x + c_out F                        (MaskDiT)
enum model_kind { MODEL_PATH, MODEL_DISCRETE, MODEL_EDM, MODEL_KIND_COUNT };
struct sampler_model { // what a sampler must know of a network
    enum path_kind path;        // MODEL_PATH
    enum prediction prediction; // MODEL_PATH
    enum model_kind kind;
    bool learned_variance;      // MODEL_DISCRETE: the second half of the output channels interpolates ddpm's variance
    double sigma_data;          // MODEL_EDM: 0.5 in every published model
    struct sampler_curve loss;  // MODEL_PATH: measured velocity loss over t, for w_t kl-eta; n 0: not known
};
// The path on which a model is sampled unless a request names one: its own; vp for discrete (what its schedule approximates), linear for edm.
enum path_kind sampler_home_path(const struct sampler_model *);
enum sampler_type sampler_home_type(const struct sampler_model *); // ode, ddpm, edm

// Fills spec with the contract's defaults for that model and type (ode: heun, 50; sde: euler, 250, sigma, mean, 0.04; dopri5 1e-6, 1e-3;
// ddpm 250; ddim 50; edm: heun, 40, sigma from 80 to 0.002 as far as the model reaches). ODE of a discrete or edm model: denoise.
void sampler_defaults(struct sampler_spec *, const struct sampler_model *, enum sampler_type);
// Ranges and combinations; err.param is the contract's field name ("sampler.steps").
int sampler_check(const struct sampler_spec *, const struct sampler_model *, struct err *);
// What a documented limit changed (a moved end, a clamped time of a converted path), one sentence a note; returns how many, at most max.
int sampler_notes(const struct sampler_spec *, const struct sampler_model *, const char **notes, int max);
// Network evaluations that the whole run needs (an estimate for dopri5); rows at most (1, or 2 when guidance can act).
int sampler_evaluations(const struct sampler_spec *, const struct sampler_model *);
int sampler_peak_rows(const struct sampler_spec *);

struct sampler_assign { // dst <- sum_j c[j] column_j + c_out F + c_clip D + c_noise Z, all assignments of a step read the old columns
    int dst;
    double c[SAMPLER_COLS], c_out, c_clip, c_noise;
};
struct sampler_clip { // D = sum_j c[j] column_j + c_out F, clipped to [-1, 1]
    double c[SAMPLER_COLS], c_out;
};
struct sampler_norm { // sqrt(mean(((sum_j c[j] column_j)/(atol + rtol max(|column_a|, |column_b|)))^2))
    int a, b;
    double c[SAMPLER_COLS], atol, rtol;
};
struct sampler_step {
    bool evaluate;        // run the network first; else the step only moves columns (initial noise, a kick)
    int in;               // network input = in_scale * column[in]
    double in_scale;
    double t;             // network's time
    double time;          // sampling path's time (guidance interval, progress)
    double guidance;      // scale at this evaluation; 1 = one row
    uint32_t draw;        // number of the noise draw for c_noise (0: the initial noise, then 1, 2, ... per kick)
    bool learned;         // Z is multiplied by exp(log_lo + (v + 1)/2 log_span), v the network's output in its second half of channels
    double log_lo, log_span;
    struct sampler_clip clip; // read where an assignment has c_clip
    int n;                // assignments
    struct sampler_assign assign[SAMPLER_ASSIGN];
    int norms;            // norms to take after the assignments (0..2), handed to the next sampler_next
    struct sampler_norm norm[2];
};

struct sampler {
    struct sampler_spec spec;
    struct sampler_model model;
    int phase, stage, step, evaluations, estimate; // where the program stands
    uint32_t draws;
    double t0, t1, asked, t, h, h_try; // ends, last time the network may be asked (exponential steps), present time, step sizes
    double keep[8];
};

// Starts a program whose first step draws x0 (draw 0) into SAMPLER_X. start_given: X already holds x0, no initial draw (replay).
int sampler_start(struct sampler *, const struct sampler_spec *, const struct sampler_model *, bool start_given, struct err *);
// Next step into *out. norms: what out->norms of the previous step gave (NULL when it asked none). 1: do this step; 0: finished, X is the
// sample; < 0: failed (dopri5: too many evaluations, step size underflow, norm not finite).
int sampler_next(struct sampler *, const double *norms, struct sampler_step *out, struct err *);
int sampler_left(const struct sampler *); // evaluations left (estimate for dopri5)
double sampler_progress(const struct sampler *); // 0..1

#endif
