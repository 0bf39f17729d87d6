// SPDX-License-Identifier: MIT
/*
 * bench_samplers: sampler x network evaluations x error, on data of one dimension where the answer is known and the network is exact.
 *
 * Deterministic samplers: x1 from a mixture of two Gaussians. The flow of the probability keeps the order of points on a line, so it takes
 * x0 to the point with the same quantile, T(x0) = F^-1(Phi(x0)), whatever the path. The error is the root mean square of x_end - T(x0)
 * over 1000 x0 that are quantiles of N(0, 1); as long as the sampler keeps the order too it is the Wasserstein-2 distance to the data.
 *
 * Samplers with noise: x1 from one Gaussian. Every step is then affine in x0 and the draws, so the executor, told unit vectors as noise, gives
 * mean and variance of the result exactly; the Wasserstein-2 distance of two Gaussians is sqrt((difference of means)^2 + (of deviations)^2).
 * No Monte Carlo error anywhere.
 *
 * Both begin at N(0, 1) and are judged against the data itself, so that what the ends of a path and a last step leave is in the number.
 *   bench-samplers            CSV: panel,sampler,evaluations,error (tests/bench/plot_samplers.py draws it)
 *   bench-samplers --table    the same as Markdown
 */
#include <math.h>
#include <stdarg.h>

#include "tests/test.h"
#include "tests/unit/f64_exec.h"

#define POINTS 1000
#define COUNT(a) ((int)(sizeof(a) / sizeof *(a)))

void test_fail(const char *file, int line, const char *fmt, ...) { // the executor's guard; here it ends the program
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "bench-samplers: %s:%d: ", file, line);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    exit(1);
}

/* data, and the network that knows it */

struct data {
    int n; // components
    double weight[2], mean[2], sd[2];
};
static const struct data mixture = {2, {0.35, 0.65}, {-1, 0.6}, {0.3, 0.4}};
static const struct data gaussian = {1, {1}, {0.8}, {0.6}};

struct problem {
    struct data data;
    struct sampler_model model;
};

// E[x1 | x] and E[x0 | x] at x = alpha x1 + sigma x0.
static void posterior(const struct data *d, double alpha, double sigma, double x, double *data, double *noise) {
    double log_p[2], var[2], best = -INFINITY, sum = 0;
    for (int k = 0; k < d->n; k++) {
        double r = x - alpha * d->mean[k];
        var[k] = alpha * alpha * d->sd[k] * d->sd[k] + sigma * sigma;
        log_p[k] = log(d->weight[k]) - r * r / (2 * var[k]) - log(var[k]) / 2;
        best = fmax(best, log_p[k]);
    }
    *data = *noise = 0;
    for (int k = 0; k < d->n; k++) sum += exp(log_p[k] - best);
    for (int k = 0; k < d->n; k++) {
        double r = x - alpha * d->mean[k], p = exp(log_p[k] - best) / sum;
        *data += p * (d->mean[k] + alpha * d->sd[k] * d->sd[k] * r / var[k]);
        *noise += p * sigma * r / var[k];
    }
}

static void net(void *ctx, const struct sampler_step *st, const double *x, double *f, int n) {
    const struct problem *p = ctx;
    const double sd = p->model.sigma_data;
    struct path_at at = {.alpha = 1, .sigma = exp(4 * st->t)}; // edm
    if (p->model.kind == MODEL_PATH) path_eval(p->model.path, st->t, &at);
    if (p->model.kind == MODEL_DISCRETE) schedule_at(st->t, &at.alpha, &at.sigma);
    double sum = at.sigma * at.sigma + sd * sd; // edm: 1/c_in^2
    for (int e = 0; e < n; e++) {
        double data, noise, y = p->model.kind == MODEL_EDM ? x[e] * sqrt(sum) : x[e];
        posterior(&p->data, at.alpha, at.sigma, y, &data, &noise);
        if (p->model.kind == MODEL_PATH) f[e] = at.d_alpha * data + at.d_sigma * noise;
        else f[e] = p->model.kind == MODEL_DISCRETE ? noise : (data - sd * sd / sum * y) * sqrt(sum) / (at.sigma * sd);
        f[n + e] = 0;
    }
}

static double cdf(const struct data *d, double x) {
    double sum = 0;
    for (int k = 0; k < d->n; k++) sum += d->weight[k] * erfc((d->mean[k] - x) / (d->sd[k] * sqrt(2))) / 2;
    return sum;
}

static double quantile(const struct data *d, double q) {
    double lo = -20, hi = 20;
    for (int i = 0; i < 80; i++) {
        double mid = (lo + hi) / 2;
        if (cdf(d, mid) < q) lo = mid;
        else hi = mid;
    }
    return lo;
}

/* errors */

static int run(struct f64_exec *x, const struct sampler_spec *spec, struct problem *p) {
    struct err e = {0};
    struct sampler s;
    x->net = net;
    x->ctx = p;
    if (sampler_start(&s, spec, &p->model, true, &e) || f64_exec_run(x, &s, &e)) test_fail(__FILE__, __LINE__, "%s: %s", e.param, e.text);
    return x->evaluations;
}

static double flow_error(const struct sampler_spec *spec, struct problem *p, int *evaluations) {
    static const struct data normal = {1, {1}, {0}, {1}};
    struct f64_exec x;
    double x0[POINTS], sum = 0;
    for (int i = 0; i < POINTS; i++) x0[i] = quantile(&normal, (i + 0.5) / POINTS);
    f64_exec_init(&x, POINTS);
    f64_exec_set_x(&x, x0);
    *evaluations = run(&x, spec, p);
    for (int i = 0; i < POINTS; i++) {
        double miss = x.col[SAMPLER_X][i] - quantile(&p->data, (i + 0.5) / POINTS);
        sum += miss * miss;
    }
    f64_exec_deinit(&x);
    return sqrt(sum / POINTS);
}

static double marginal_error(const struct sampler_spec *spec, struct problem *p, int *evaluations) {
    int draws = spec->steps, n = draws + 2; // elements: x0 = 0; x0 = 1; x0 = 0 and draw d = 1
    double *noise = calloc((size_t)draws * (size_t)n, sizeof *noise), var = 0;
    struct f64_exec x;
    CHECK(noise && n <= F64_MAX);
    for (int d = 0; d < draws; d++) noise[(size_t)d * (size_t)n + (size_t)d + 2] = 1;
    f64_exec_init(&x, n);
    memset(x.col[SAMPLER_X], 0, (size_t)n * sizeof(double));
    x.col[SAMPLER_X][1] = 1;
    x.written[SAMPLER_X] = true;
    x.noise = noise;
    *evaluations = run(&x, spec, p);
    double mean = x.col[SAMPLER_X][0];
    for (int e = 1; e < n; e++) var += (x.col[SAMPLER_X][e] - mean) * (x.col[SAMPLER_X][e] - mean);
    f64_exec_deinit(&x);
    free(noise);
    return hypot(mean - p->data.mean[0], sqrt(var) - p->data.sd[0]);
}

/* the rows */

static struct problem problem_of(const struct data *d, enum sampler_type type) {
    struct problem p = {.data = *d, .model = {.path = PATH_LINEAR, .prediction = PRED_VELOCITY, .sigma_data = 0.5}};
    if (type == SAMPLER_DDPM || type == SAMPLER_DDIM) p.model.kind = MODEL_DISCRETE;
    if (type == SAMPLER_EDM) p.model.kind = MODEL_EDM;
    p.model.loss.n = 33; // for kl-eta, the exact network's: Var(x1 - x0 | x) = s^2/(t^2 s^2 + (1 - t)^2), one Gaussian, linear path
    for (int i = 0; i < p.model.loss.n; i++) {
        double t = i / 32.0, s2 = d->sd[0] * d->sd[0];
        p.model.loss.t[i] = t;
        p.model.loss.v[i] = s2 / (t * t * s2 + (1 - t) * (1 - t));
    }
    return p;
}

// The most steps that fit in so many evaluations; 0: none do.
static int steps_within(struct sampler_spec spec, const struct sampler_model *m, int budget) {
    int fit = 0;
    for (spec.steps = 1; spec.steps <= budget; spec.steps++)
        if (sampler_check(&spec, m, NULL) == OK && sampler_evaluations(&spec, m) <= budget) fit = spec.steps;
    return fit;
}

enum { TABLE_COLUMNS = 6, LEAST = 8 }; // 8, 16, ... 256
static bool table;

static void put(const char *panel, const char *name, int evaluations, double error) {
    if (table) printf(" %.1e |", error);
    else printf("%s,%s,%d,%.6e\n", panel, name, evaluations, error);
}

static void row(const char *panel, const char *name, struct sampler_spec spec, struct problem *p, bool noisy) {
    if (table) printf("| %s |", name);
    for (int i = 0, evaluations; i < TABLE_COLUMNS; i++) {
        spec.steps = steps_within(spec, &p->model, LEAST << i);
        double error = noisy ? marginal_error(&spec, p, &evaluations) : flow_error(&spec, p, &evaluations);
        put(panel, name, evaluations, error);
    }
    if (table) putchar('\n');
}

static void head(const char *panel) {
    if (!table) return;
    printf("\n| %s |", panel);
    for (int i = 0; i < TABLE_COLUMNS; i++) printf(" %d |", LEAST << i);
    printf("\n|---|");
    for (int i = 0; i < TABLE_COLUMNS; i++) printf("---|");
    putchar('\n');
}

static void typed(const char *panel, const struct data *d, enum sampler_type type, enum sampler_method method, double eta, double churn) {
    struct problem p = problem_of(d, type);
    struct sampler_spec spec;
    char name[64], extra[32] = "";
    sampler_defaults(&spec, &p.model, type);
    spec.method = method;
    spec.eta = eta;
    spec.churn = churn;
    if (eta > 0) snprintf(extra, sizeof extra, " eta %g", eta);
    if (churn > 0) snprintf(extra, sizeof extra, " churn %g", churn);
    bool one = type == SAMPLER_DDPM || type == SAMPLER_DDIM; // has no methods
    snprintf(name, sizeof name, "%s%s%s%s", sampler_type_name(type), one ? "" : " ", one ? "" : sampler_method_name(method), extra);
    row(panel, name, spec, &p, d->n == 1);
}

static void dopri5(const char *panel) { // its evaluations follow from the tolerance
    struct problem p = problem_of(&mixture, SAMPLER_ODE);
    struct sampler_spec spec;
    sampler_defaults(&spec, &p.model, SAMPLER_ODE);
    spec.method = METHOD_DOPRI5;
    if (table) printf("\n| ode dopri5, rtol | evaluations | error |\n|---|---|---|\n");
    for (spec.rtol = 1e-2; spec.rtol > 0.5e-7; spec.rtol /= 10) {
        int evaluations;
        spec.atol = spec.rtol / 100;
        double error = flow_error(&spec, &p, &evaluations);
        if (table) printf("| %.0e | %d |", spec.rtol, evaluations);
        put(panel, "ode dopri5", evaluations, error);
        if (table) putchar('\n');
    }
}

static void deterministic(void) {
    static const enum sampler_method methods[] = {METHOD_EULER, METHOD_HEUN, METHOD_MIDPOINT, METHOD_RK4, METHOD_EXPONENTIAL, METHOD_DPMPP2M};
    const char *panel = "deterministic";
    head(panel);
    for (int i = 0; i < COUNT(methods); i++) typed(panel, &mixture, SAMPLER_ODE, methods[i], 0, 0);
    typed(panel, &mixture, SAMPLER_DDIM, METHOD_EULER, 0, 0);
    typed(panel, &mixture, SAMPLER_EDM, METHOD_EULER, 0, 0);
    typed(panel, &mixture, SAMPLER_EDM, METHOD_HEUN, 0, 0);
    dopri5(panel);
}

static void sde(const char *panel, enum sampler_method method, enum w_form form, enum last_step last) {
    struct problem p = problem_of(&gaussian, SAMPLER_SDE);
    struct sampler_spec spec;
    char name[64];
    sampler_defaults(&spec, &p.model, SAMPLER_SDE);
    bool other = last != spec.last;
    spec.method = method;
    spec.w_t = form;
    spec.w_t_eta = 0.5;
    spec.last = last;
    snprintf(name, sizeof name, "sde %s %s%s%s", sampler_method_name(method), w_form_name((int)form), other ? " last " : "",
             other ? last_step_name((int)last) : "");
    row(panel, name, spec, &p, true);
}

static void stochastic(const char *panel, enum sampler_method method) {
    head(panel);
    for (int form = 0; form < W_KNOTS; form++) sde(panel, method, (enum w_form)form, LAST_MEAN); // knots are any curve: none to show
    sde(panel, method, W_SIGMA, LAST_TWEEDIE);
    if (method == METHOD_EULER) typed(panel, &gaussian, SAMPLER_DDPM, method, 0, 0);
    if (method == METHOD_EULER) typed(panel, &gaussian, SAMPLER_DDIM, method, 1, 0);
    typed(panel, &gaussian, SAMPLER_EDM, method, 0, 20);
    typed(panel, &gaussian, SAMPLER_ODE, method, 0, 0); // beside them, without noise
}

int main(int argc, char **argv) {
    table = argc == 2 && strcmp(argv[1], "--table") == 0;
    if (argc > 1 && !table) return fprintf(stderr, "usage: bench-samplers [--table]\n"), 2;
    if (!table) printf("panel,sampler,evaluations,error\n");
    deterministic();
    stochastic("noise euler", METHOD_EULER);
    stochastic("noise heun", METHOD_HEUN);
    return 0;
}
