// SPDX-License-Identifier: MIT
/*
 * solver: what the sampler's families share. Private to core/diffusion; sampler.h is the interface.
 *
 * Columns: X the state, Y the input of stages after the first, K(i) the drift at stage i.
 */
#ifndef SITD_SOLVER_H
#define SITD_SOLVER_H
#include "core/diffusion/convert.h"
#include "core/diffusion/sampler.h"

#define COL_Y 1
#define COL_K(i) (2 + (i))
#define SOLVER_STAGES 7

enum { PHASE_START, PHASE_LEAD, PHASE_RUN, PHASE_DENOISE, PHASE_DONE }; // of struct sampler
#define SOLVER_EPS 1e-3                      // by how much a singular end is moved (SiT's sample_eps)

// interval.c: where a run begins and ends, and what moved
enum note {
    NOTE_PREDICTION_ENDS,
    NOTE_VP_END,
    NOTE_VP_START_LINEAR,
    NOTE_VP_START_GVP,
    NOTE_SBDM_START,
    NOTE_HEUN_END,
    NOTE_ZERO_LAST,
    NOTE_DISCRETE_START,                     // + path
    NOTE_DISCRETE_END = NOTE_DISCRETE_START + PATH_COUNT,
    NOTE_EDM_START = NOTE_DISCRETE_END + PATH_COUNT,
    NOTE_EDM_END = NOTE_EDM_START + PATH_COUNT,
    NOTE_DENOISE = NOTE_EDM_END + PATH_COUNT,
    NOTE_VP_LEAD,
    NOTE_COUNT
};
struct interval {
    double t0, t1;
    double asked;   // exponential steps: the network is asked up to here, though the run goes on to t1 = 1
    unsigned notes; // bit 1 << enum note
};
void interval_of(const struct sampler_spec *, const struct sampler_model *, struct interval *);
const char *interval_note(enum note);

// Which program a spec runs.
bool solver_adaptive(const struct sampler_spec *);
bool solver_exponential(const struct sampler_spec *, const struct sampler_model *); // steps of x1-hat over a path's time
bool solver_discrete(const struct sampler_spec *, const struct sampler_model *);    // ddpm, ddim along the model's own schedule
bool solver_denoises(const struct sampler_spec *, const struct sampler_model *);    // an evaluation more at the end

bool solver_leads(const struct sampler_spec *, const struct sampler_model *);       // an evaluation more at the beginning

// ode.c: explicit Runge-Kutta in general. Stage i is evaluated at t + c[i] h; y_i = x + h sum_j a[i][j] k_j; x += h sum_j b[j]
// k_j.
struct tableau {
    int stages;
    double c[SOLVER_STAGES], a[SOLVER_STAGES][SOLVER_STAGES - 1], b[SOLVER_STAGES];
};
extern const struct tableau ode_euler, ode_heun;
// Adds dst <- X + h sum_j w[j] k_j, j <= i, to the step; k_i is the drift just evaluated (at *now, from column `in` and F), the
// others are columns. now NULL: all k are columns.
void ode_combine(struct sampler_step *, int dst, double h, const double *w, int i, const struct lin *now);
// What stage i leaves behind: k_i if a later stage wants it, and the next stage's input, or the new state.
void ode_stage(struct sampler_step *, const struct tableau *, int i, double h, const struct lin *now);
int ode_stages(enum sampler_method); // evaluations a step; 0 for the other programs
int ode_next(struct sampler *, struct sampler_step *);
int sde_next(struct sampler *, struct sampler_step *);
int sde_steps(const struct sampler_spec *); // steps with noise, without the last step
int dopri5_next(struct sampler *, const double *norms, struct sampler_step *, struct err *);
int exponential_next(struct sampler *, struct sampler_step *);
// One ddim step from a x1 + s x0 to a_next x1 + s_next x0; net: what the evaluation of column X says.
void exponential_ddim(const struct sampler_spec *, struct sampler_step *, const struct convert_net *net, double a, double s,
                      double a_next, double s_next);
int discrete_next(struct sampler *, struct sampler_step *);
int edm_next(struct sampler *, struct sampler_step *);
int edm_evaluations(const struct sampler_spec *);

// w_t.c
double w_t_diffusion(const struct sampler_spec *, const struct sampler_model *, const struct path_at *); // D
// D/sigma for the forms whose limit at sigma = 0 is finite; elsewhere the plain quotient.
double w_t_over_sigma(const struct sampler_spec *, const struct sampler_model *, const struct path_at *);
bool w_t_infinite_at_0(const struct sampler_spec *); // of linear and GVP

// sampler.c
// Point i of n intervals from t0 to t1; replay: as a float32 linspace rounds it.
double sampler_grid(const struct sampler *, int i, int n);
// Asks for an evaluation of column `in` at time t of the sampling path; *at says what it means.
void sampler_ask(const struct sampler *, struct sampler_step *, int in, double t, struct convert_at *at);
// The same where the sampler stands at alpha x1 + sigma x0 of no path.
void sampler_ask_net(const struct sampler *, struct sampler_step *, int in, double alpha, double sigma, struct convert_net *);
struct sampler_assign *sampler_assign_to(struct sampler_step *, int dst); // a new assignment, all 0
// Adds weight times the value l, of column `in` and F.
void sampler_add(struct sampler_assign *, int in, double weight, struct lin l);

#endif
