// SPDX-License-Identifier: MIT
#include <jansson.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "proto/capabilities.h"
#include "proto/request.h"
#include "tests/test.h"
#include "tests/unit/test_request_model.h"

static struct engine_model model;

static struct resolved take_from(const char *body, const struct engine_model *m) {
    struct request *r;
    struct resolved out;
    struct http_error e = {0};
    if (request_parse(&r, body, strlen(body), &e) < 0) test_fail(__FILE__, __LINE__, "%s: %d %s", body, e.status, e.message);
    if (request_resolve(&out, r, m, 123456789, &e) < 0) test_fail(__FILE__, __LINE__, "%s: %d %s", body, e.status, e.message);
    request_free(r);
    return out;
}

static struct resolved take_by(enum model_kind kind, const char *body) {
    fake_family(&model, kind);
    return take_from(body, &model);
}

static struct resolved take(const char *body) {
    fake_model(&model, true, true);
    return take_from(body, &model);
}

// The error of a body that must be refused.
static struct http_error refuse(const char *body, const struct engine_model *m) {
    struct request *r;
    struct resolved out;
    struct http_error e = {0};
    if (request_parse(&r, body, strlen(body), &e) < 0) return e;
    if (request_resolve(&out, r, m, 1, &e) == 0) test_fail(__FILE__, __LINE__, "%s was taken", body);
    request_free(r);
    return e;
}

TEST(request_defaults_are_the_contract) {
    struct resolved r = take("{\"classes\":[3]}");
    const struct sampler_spec *s = &r.job.sampler;
    CHECK(r.job.n == 1 && r.job.classes[0] == 3 && r.job.seed == 123456789 && !r.seed_given && r.job.seed_index == 0);
    CHECK(s->type == SAMPLER_ODE && s->method == METHOD_HEUN && s->steps == 50 && s->path == PATH_LINEAR);
    CHECK(s->guidance == 1 && s->guide_from == 0 && s->guide_to == 1 && s->guide_channels == 1);
    CHECK(r.compression == 1 && r.job.timeout_ms == 0 && r.job.priority == 0 && !r.job.progress);
    CHECK_STR(r.job.model, "fashion-sit");
    CHECK_STR(r.job.digest, model.digest);
    resolved_deinit(&r);
}

TEST(request_every_sde_field_arrives) {
    struct resolved r = take(
        "{\"model\":\"fashion-sit@9034\",\"classes\":[9,\"sandal\",null,\"heron\"],\"seed\":7,\"seed_index\":5,\"interpolant\":"
        "\"gvp\","
        "\"sampler\":{\"type\":\"sde\",\"method\":\"heun\",\"steps\":61,\"w_t\":\"increasing-decreasing\",\"w_t_scale\":0.5,"
        "\"last_step\":\"tweedie\",\"last_step_size\":0.03},\"guidance\":{\"scale\":3,\"interval\":[0.25,0.75],\"channels\":3},"
        "\"output\":{\"format\":\"png\",\"compression\":9},\"timeout_ms\":30000,\"priority\":-7,"
        "\"stream\":false,\"previews\":0,\"async\":false}");
    const struct sampler_spec *s = &r.job.sampler;
    CHECK(r.job.n == 4 && r.job.classes[0] == 9 && r.job.classes[1] == 5 && r.job.classes[2] == -1 && r.job.classes[3] == 11);
    CHECK(r.job.seed == 7 && r.seed_given && r.job.seed_index == 5 && s->path == PATH_GVP);
    CHECK(s->type == SAMPLER_SDE && s->method == METHOD_HEUN && s->steps == 61 && s->w_t == W_INC_DEC && s->w_t_scale == 0.5);
    CHECK(s->last == LAST_TWEEDIE && s->last_size == 0.03 && s->guidance == 3 && s->guide_from == 0.25 && s->guide_to == 0.75);
    CHECK(s->guide_channels == 3 && r.compression == 9 && r.job.timeout_ms == 30000 && r.job.priority == -7);
    resolved_deinit(&r);
}

TEST(request_every_dopri5_field_arrives) {
    struct resolved r =
        take("{\"class\":\"top\",\"n\":3,\"sampler\":{\"method\":\"dopri5\",\"atol\":1e-7,\"rtol\":0.5,\"max_evaluations\":777},"
             "\"guidance\":{\"channels\":\"all\"}}");
    const struct sampler_spec *s = &r.job.sampler;
    CHECK(r.job.n == 3 && r.job.classes[0] == 0 && r.job.classes[2] == 0 && s->type == SAMPLER_ODE && s->method == METHOD_DOPRI5);
    CHECK(s->atol == 1e-7 && s->rtol == 0.5 && s->max_evaluations == 777 && s->guide_channels == 4);
    resolved_deinit(&r);
}

TEST(request_defaults_of_each_family) {
    struct resolved r = take_by(MODEL_DISCRETE, "{\"class\":3}");
    const struct sampler_spec *s = &r.job.sampler;
    CHECK(s->type == SAMPLER_DDPM && s->steps == 250 && s->spacing == SPACING_OPENAI && !s->clip && s->guide_channels == 3);
    resolved_deinit(&r);
    r = take_by(MODEL_DISCRETE, "{\"class\":3,\"sampler\":{\"type\":\"ddim\"},\"guidance\":{\"channels\":\"all\"}}");
    CHECK(s->type == SAMPLER_DDIM && s->steps == 50 && s->eta == 0 && s->guide_channels == 4);
    resolved_deinit(&r);
    r = take_by(MODEL_EDM, "{\"class\":3}");
    CHECK(s->type == SAMPLER_EDM && s->method == METHOD_HEUN && s->steps == 40 && s->churn == 0 && s->rho == 7 && s->s_noise == 1);
    CHECK(s->sigma_min == 0.002 && s->sigma_max == 80 && s->s_min == 0 && s->s_max > 1e300 && s->guide_channels == 4);
    resolved_deinit(&r);
}

TEST(request_every_ddim_and_edm_field_arrives) {
    struct resolved r = take_by(MODEL_DISCRETE, "{\"class\":3,\"sampler\":{\"type\":\"ddim\",\"steps\":20,\"spacing\":\"trailing\",\"eta\":0.25,"
                                                "\"clip\":true},\"guidance\":{\"scale\":2,\"channels\":8}}");
    const struct sampler_spec *s = &r.job.sampler;
    CHECK(s->spacing == SPACING_TRAILING && s->eta == 0.25 && s->clip && s->steps == 20 && s->guide_channels == 8);
    resolved_deinit(&r);
    r = take_by(MODEL_EDM, "{\"class\":3,\"sampler\":{\"method\":\"euler\",\"steps\":18,\"churn\":40,\"s_min\":0.05,\"s_max\":50,"
                           "\"s_noise\":1.003,\"rho\":5,\"sigma_min\":0.01,\"sigma_max\":70}}");
    CHECK(s->method == METHOD_EULER && s->churn == 40 && s->s_min == 0.05 && s->s_max == 50 && s->s_noise == 1.003);
    CHECK(s->rho == 5 && s->sigma_min == 0.01 && s->sigma_max == 70);
    resolved_deinit(&r);
}

TEST(request_w_t_by_every_way) {
    struct resolved r = take("{\"class\":0,\"sampler\":{\"type\":\"sde\",\"w_t\":\"kl\"}}");
    const struct sampler_spec *s = &r.job.sampler;
    CHECK(s->w_t == W_SBDM);
    resolved_deinit(&r);
    r = take("{\"class\":0,\"sampler\":{\"type\":\"sde\",\"w_t\":[[0,1],[0.25,2.5],[1,0]]}}");
    CHECK(s->w_t == W_KNOTS && s->knots.n == 3 && s->knots.t[1] == 0.25 && s->knots.v[1] == 2.5 && s->knots.v[2] == 0);
    resolved_deinit(&r);
    fake_model(&model, true, true);
    model.sampler.loss = (struct sampler_curve){2, {0, 1}, {1.5, 0.5}};
    r = take_from("{\"class\":0,\"sampler\":{\"type\":\"sde\",\"w_t\":\"kl-eta\",\"w_t_eta\":0.5}}", &model);
    CHECK(s->w_t == W_KL_ETA && s->w_t_eta == 0.5);
    char *text = request_normalised(&r, &model, 0);
    CHECK(strstr(text, "\"w_t\":\"kl-eta\",\"w_t_scale\":1,\"w_t_eta\":0.5,"));
    mem_free(text);
    resolved_deinit(&r);
}

// What capabilities say of a model is what requests to it may say, and no more.
TEST(request_capabilities_of_a_family_are_what_it_takes) {
    for (int kind = 0; kind < MODEL_KIND_COUNT; kind++) {
        fake_family(&model, (enum model_kind)kind);
        const struct engine_model *models[] = {&model};
        char *text = capabilities_json(&(struct capabilities){"0.1", "cpu", models, 1, 64, 16, 600000, REQUEST_MAX_BODY});
        json_t *root = json_loads(text, JSON_REJECT_DUPLICATES, NULL), *samplers;
        const char *home;
        CHECK(root && json_unpack(root, "{s:[{s:s,s:o}]}", "models", "sampler", &home, "samplers", &samplers) == 0);
        CHECK_STR(home, kind == MODEL_PATH ? "ode" : kind == MODEL_DISCRETE ? "ddpm" : "edm");
        for (int t = 0; t < SAMPLER_TYPE_COUNT; t++) {
            const char *name = sampler_type_name(t);
            json_t *one = json_object_get(samplers, name);
            char body[1200], all[1000] = "";
            snprintf(body, sizeof body, "{\"class\":0,\"sampler\":{\"type\":\"%s\"}}", name);
            if (!one) {
                CHECK_STR(refuse(body, &model).param, "sampler.type");
                continue;
            }
            json_t *defaults = json_object_get(one, "defaults");
            CHECK(defaults && json_array_size(json_object_get(one, "interpolants")) <= PATH_COUNT);
            json_object_del(defaults, "w_t_eta"); // of choices that are not the default
            json_object_del(defaults, "max_evaluations");
            json_object_del(defaults, "atol");
            json_object_del(defaults, "rtol");
            json_object_set_new(defaults, "type", json_string(name));
            CHECK(json_dumpb(defaults, all, sizeof all - 1, JSON_COMPACT) < sizeof all - 1);
            struct resolved plain = take_from(body, &model);
            snprintf(body, sizeof body, "{\"class\":0,\"sampler\":%s}", all);
            struct resolved sent = take_from(body, &model);
            CHECK(memcmp(&plain.job.sampler, &sent.job.sampler, sizeof plain.job.sampler) == 0);
            resolved_deinit(&plain);
            resolved_deinit(&sent);
        }
        CHECK(json_object_size(samplers) == (kind == MODEL_DISCRETE ? 5 : 4));
        json_decref(root);
        mem_free(text);
    }
}

TEST(request_names_are_those_of_diffusion) {
    char body[128];
    for (int i = 0; i < METHOD_COUNT; i++) {
        snprintf(body, sizeof body, "{\"class\":0,\"sampler\":{\"method\":\"%s\"}}", sampler_method_name(i));
        struct resolved r = take(body);
        CHECK((int)r.job.sampler.method == i);
        resolved_deinit(&r);
    }
    for (int i = 0; i < W_KL_ETA * LAST_COUNT; i++) {
        snprintf(body, sizeof body, "{\"class\":0,\"sampler\":{\"type\":\"sde\",\"w_t\":\"%s\",\"last_step\":\"%s\"}}",
                 w_form_name(i / LAST_COUNT), last_step_name(i % LAST_COUNT));
        struct resolved r = take(body);
        CHECK((int)r.job.sampler.w_t == i / LAST_COUNT && (int)r.job.sampler.last == i % LAST_COUNT);
        resolved_deinit(&r);
    }
    for (int i = 0; i < PATH_COUNT; i++) {
        snprintf(body, sizeof body, "{\"class\":0,\"interpolant\":\"%s\"}", path_name((enum path_kind)i));
        struct resolved r = take(body);
        CHECK((int)r.job.sampler.path == i);
        resolved_deinit(&r);
    }
}

TEST(request_seed_takes_all_64_bits) {
    static const struct {
        const char *text;
        uint64_t seed;
    } good[] = {{"0", 0},
                {"9223372036854775807", INT64_MAX},
                {"\"0\"", 0},
                {"\"9007199254740993\"", 9007199254740993u},
                {"\"18446744073709551615\"", UINT64_MAX}};
    static const char *const bad[] = {
        "-1",       "1.0", "1e3", "true", "null", "\"\"", "\"-1\"", "\"+1\"", "\"01\"", "\"1 \"", "\"18446744073709551616\"",
        "\"0x10\"", "[1]"};
    char body[96];
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        snprintf(body, sizeof body, "{\"class\":0,\"seed\":%s}", good[i].text);
        struct resolved r = take(body);
        CHECK(r.job.seed == good[i].seed && r.seed_given);
        resolved_deinit(&r);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        snprintf(body, sizeof body, "{\"class\":0,\"seed\":%s}", bad[i]);
        struct http_error e = refuse(body, &model);
        CHECK(e.status == 422);
        CHECK_STR(e.param, "seed");
    }
}

TEST(request_random_seed_stays_below_2_53) {
    struct request *r;
    struct resolved out;
    struct http_error e;
    fake_model(&model, true, true);
    CHECK(request_parse(&r, "{\"class\":1}", 11, &e) == 0);
    CHECK(request_resolve(&out, r, &model, UINT64_MAX, &e) == 0);
    CHECK(out.job.seed == ((uint64_t)1 << 53) - 1 && !out.seed_given);
    resolved_deinit(&out);
    request_free(r);
}

TEST(request_model_versions) {
    static const char *const good[] = {"fashion-sit", "fashion-sit@9034", "fashion-sit@0a1b2c",
                                       "fashion-sit@0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9"};
    static const char *const bad[] = {"fashion",
                                      "fashion-sit@9035",
                                      "fashion-sit@0a1b2",
                                      "fashion-sit@0A1B2C",
                                      "fashion-sit@09034",
                                      "fashion-sit@latest",
                                      "fashion-sit@0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90",
                                      "other@9034"};
    char body[160];
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        snprintf(body, sizeof body, "{\"class\":0,\"model\":\"%s\"}", good[i]);
        struct resolved r = take(body);
        CHECK_STR(r.job.model, "fashion-sit");
        resolved_deinit(&r);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        snprintf(body, sizeof body, "{\"class\":0,\"model\":\"%s\"}", bad[i]);
        struct http_error e = refuse(body, &model);
        CHECK(e.status == 404);
        CHECK_STR(e.param, "model");
        CHECK_STR(e.type, "not_found_error");
    }
}

TEST(request_model_name_is_the_part_before_the_at) {
    struct request *r;
    struct http_error e;
    static const char names[2][64] = {"emoji-sit", "fashion-sit"};
    const char *body = "{\"class\":0,\"model\":\"fashon-sit@12\"}";
    CHECK(request_parse(&r, body, strlen(body), &e) == 0);
    CHECK_STR(request_model(r), "fashon-sit@12");
    CHECK_STR(request_model_name(r), "fashon-sit");
    CHECK(request_model_unknown(r, names, 2, &e) == -1 && e.status == 404);
    CHECK(strstr(e.message, "did you mean \"fashion-sit\"?"));
    request_free(r);
    CHECK(request_parse(&r, "{\"class\":0}", 11, &e) == 0);
    CHECK(!request_model(r) && !request_model_name(r));
    CHECK(request_model_unknown(r, names, 2, &e) == -1 && e.status == 422);
    request_free(r);
}

TEST(request_labels_exact_before_synonym) {
    struct resolved r = take("{\"classes\":[\"coat\",\"trainer\",\"ankle boot\",\"boot\"]}"); // "coat" is also a synonym of bag
    CHECK(r.job.classes[0] == 4 && r.job.classes[1] == 7 && r.job.classes[2] == 9 && r.job.classes[3] == 9);
    resolved_deinit(&r);
    struct http_error e = refuse("{\"classes\":[0,\"shoe\"]}", &model);
    CHECK_STR(e.param, "classes[1]");
    CHECK_STR(e.code, "ambiguous_label");
    CHECK(strstr(e.message, "5, 7"));
    e = refuse("{\"class\":\"crane\"}", &model);
    CHECK_STR(e.param, "class");
    CHECK(strstr(e.message, "10, 11"));
    e = refuse("{\"class\":\"sneeker\"}", &model);
    CHECK(strstr(e.message, "did you mean \"sneaker\"?"));
    e = refuse("{\"class\":\"ankle\"}", &model);
    CHECK(strstr(e.message, "\"ankle boot\""));
    e = refuse("{\"class\":\"7\"}", &model);
    CHECK(strstr(e.message, "without quotes"));
}

TEST(request_models_without_labels_or_null_class) {
    struct engine_model bare;
    fake_model(&bare, false, false);
    struct resolved r = take_from("{\"class\":11}", &bare);
    resolved_deinit(&r);
    CHECK(strstr(refuse("{\"class\":\"bag\"}", &bare).message, "no labels"));
    CHECK_STR(refuse("{\"class\":null}", &bare).param, "class");
    CHECK_STR(refuse("{\"class\":1,\"guidance\":{\"scale\":2}}", &bare).param, "guidance.scale");
    r = take_from("{\"class\":11,\"guidance\":{\"scale\":1}}", &bare);
    resolved_deinit(&r);
}

TEST(request_limits_of_n) {
    char body[8192] = "{\"classes\":[0";
    struct resolved r = take("{\"class\":0,\"n\":1024}");
    CHECK(r.job.n == 1024 && r.job.classes[1023] == 0);
    resolved_deinit(&r);
    for (int i = 1; i < 1025; i++) strcat(body, ",1");
    strcat(body, "]}");
    struct http_error e = refuse(body, &model);
    CHECK_STR(e.param, "classes");
    CHECK(strstr(e.message, "1 to 1024"));
    r = take("{\"class\":0,\"n\":2,\"seed_index\":4294967294}");
    resolved_deinit(&r);
    CHECK_STR(refuse("{\"class\":0,\"n\":2,\"seed_index\":4294967295}", &model).param, "seed_index");
}

// Everything but what the normalised form leaves out by contract: n, timeout, priority.
static void check_same(const struct resolved *a, const struct resolved *b, int i) {
    const struct sampler_spec *s = &a->job.sampler, *t = &b->job.sampler;
    CHECK(b->job.n == 1 && b->job.classes[0] == a->job.classes[i] && b->job.seed == a->job.seed &&
          b->job.seed_index == a->job.seed_index + (uint32_t)i && b->job.rng == a->job.rng);
    CHECK_STR(a->job.model, b->job.model);
    CHECK(s->type == t->type && s->method == t->method && s->steps == t->steps && s->max_evaluations == t->max_evaluations &&
          s->path == t->path);
    CHECK(s->w_t == t->w_t && s->w_t_scale == t->w_t_scale && s->last == t->last && s->atol == t->atol && s->rtol == t->rtol);
    CHECK(s->last == LAST_NONE || s->last_size == t->last_size);
    CHECK(s->guidance == t->guidance && s->guide_from == t->guide_from && s->guide_to == t->guide_to &&
          s->guide_channels == t->guide_channels);
    CHECK(s->type != SAMPLER_SDE || (s->w_t_eta == t->w_t_eta && memcmp(&s->knots, &t->knots, sizeof s->knots) == 0));
    CHECK(s->spacing == t->spacing && s->eta == t->eta && s->clip == t->clip && s->denoise == t->denoise && s->churn == t->churn && s->s_min == t->s_min &&
          s->s_max == t->s_max && s->s_noise == t->s_noise && s->rho == t->rho && s->sigma_min == t->sigma_min && s->sigma_max == t->sigma_max);
    CHECK(a->compression == b->compression);
}

TEST(request_normalised_gives_the_same_job) {
    static const char *const bodies[] = {
        "{\"classes\":[3,null,\"bag\"]}",
        "{\"class\":3,\"seed\":0,\"rng\":\"torch-cpu\"}",
        "{\"classes\":[3],\"seed\":\"18446744073709551615\",\"sampler\":{\"method\":\"dopri5\",\"atol\":1.2345678901234567e-7,"
        "\"max_evaluations\":40000}}",
        "{\"class\":1,\"n\":2,\"seed\":9007199254740993,\"seed_index\":17,\"interpolant\":\"vp\",\"sampler\":{\"type\":\"sde\","
        "\"last_step\":\"none\",\"steps\":1}}",
        "{\"class\":1,\"sampler\":{\"type\":\"sde\",\"w_t_scale\":0.1,\"last_step_size\":0},\"guidance\":{\"scale\":4.123,"
        "\"interval\":[0.1,0.3],\"channels\":\"all\"}}",
        "{\"class\":1,\"guidance\":{\"scale\":3,\"interval\":[-0.0,1]}}",
        "{\"class\":1,\"sampler\":{\"method\":\"rk4\",\"steps\":10000},\"guidance\":{\"scale\":0},\"output\":{\"compression\":0},"
        "\"timeout_ms\":5,\"priority\":3}",
    };
    for (size_t k = 0; k < sizeof bodies / sizeof *bodies; k++) {
        struct resolved a = take(bodies[k]);
        for (int i = 0; i < a.job.n; i++) {
            char *text = request_normalised(&a, &model, i);
            struct resolved b = take(text);
            char *again = request_normalised(&b, &model, 0);
            check_same(&a, &b, i);
            CHECK_STR(text, again);
            mem_free(text);
            mem_free(again);
            resolved_deinit(&b);
        }
        resolved_deinit(&a);
    }
}

TEST(request_normalised_gives_the_same_job_by_every_sampler) {
    static const struct {
        enum model_kind kind;
        const char *sampler;
    } want[] = {{MODEL_DISCRETE, "{}"},
                {MODEL_DISCRETE, "{\"steps\":100,\"spacing\":\"leading\",\"clip\":true}"},
                {MODEL_DISCRETE, "{\"type\":\"ddim\",\"eta\":0.123456789,\"spacing\":\"ddim\"}"},
                {MODEL_DISCRETE, "{\"type\":\"edm\",\"churn\":5,\"s_max\":40}"},
                {MODEL_DISCRETE, "{\"type\":\"sde\",\"w_t\":[[0,2],[0.3,1.1],[1,0]]}"},
                {MODEL_DISCRETE, "{\"type\":\"ode\",\"method\":\"dpmpp2m\",\"steps\":12}"},
                {MODEL_EDM, "{}"},
                {MODEL_EDM, "{\"method\":\"euler\",\"rho\":3.7,\"s_min\":0.1,\"s_max\":5,\"s_noise\":1.01,\"churn\":9,\"sigma_max\":33}"},
                {MODEL_EDM, "{\"type\":\"ddim\",\"eta\":1,\"clip\":true,\"steps\":7}"},
                {MODEL_PATH, "{\"type\":\"ddim\",\"steps\":9}"},
                {MODEL_PATH, "{\"denoise\":true}"},
                {MODEL_DISCRETE, "{\"type\":\"ode\",\"denoise\":false}"},
                {MODEL_PATH, "{\"type\":\"edm\"}"},
                {MODEL_PATH, "{\"method\":\"exponential\"}"},
                {MODEL_PATH, "{\"type\":\"sde\",\"w_t\":\"kl\"}"}};
    for (size_t k = 0; k < sizeof want / sizeof *want; k++) {
        char body[256];
        snprintf(body, sizeof body, "{\"class\":1,\"sampler\":%s,\"guidance\":{\"scale\":2}}", want[k].sampler);
        struct resolved a = take_by(want[k].kind, body);
        char *text = request_normalised(&a, &model, 0);
        struct resolved b = take_from(text, &model);
        char *again = request_normalised(&b, &model, 0);
        check_same(&a, &b, 0);
        CHECK_STR(text, again);
        mem_free(text);
        mem_free(again);
        resolved_deinit(&a);
        resolved_deinit(&b);
    }
}

TEST(request_normalised_text) {
    struct resolved r = take("{\"classes\":[0,\"bag\"],\"seed\":7,\"sampler\":{\"type\":\"sde\",\"steps\":50},\"guidance\":{"
                             "\"scale\":3.0},\"timeout_ms\":9}");
    char *text = request_normalised(&r, &model, 1);
    CHECK_STR(
        text,
        "{\"model\":\"fashion-sit\",\"classes\":[8],\"seed\":7,\"seed_index\":1,\"rng\":\"native\",\"interpolant\":\"linear\",\"sampler\":{\"type\":"
        "\"sde\","
        "\"method\":\"euler\",\"steps\":50,\"w_t\":\"sigma\",\"w_t_scale\":1,\"last_step\":\"mean\",\"last_step_size\":0.04},"
        "\"guidance\":{\"scale\":3,\"interval\":[0,1],\"channels\":1},\"output\":{\"format\":\"png\",\"compression\":1}}");
    mem_free(text);
    resolved_deinit(&r);
}

TEST(request_answer_is_json) {
    struct resolved r = take("{\"classes\":[8,null],\"seed\":\"9223372036854775808\"}");
    r.notes[r.n_notes++] = "a \"quoted\" note\n";
    struct answer_image images[] = {{8, 0, "ab", "aGVsbG8="}, {-1, 1, "cd", "d29ybGQ="}};
    struct answer a = {"req-1", 1700000000, 200, 1.25, 333.3333333, 0.5, 2, images, 2};
    char *text = answer_json(&a, &r, &model);
    json_t *root = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
    const char *id, *name, *digest, *seed, *note, *label, *b64;
    json_int_t version;
    double denoise;
    json_t *label1, *class1;
    CHECK(root &&
          json_unpack(root, "{s:s, s:s, s:I, s:s, s:s, s:[s], s:{s:f}, s:[{s:s,s:s},{s:o,s:o}]}", "id", &id, "model", &name,
                      "version", &version, "digest", &digest, "seed", &seed, "notes", &note, "timings_ms", "denoise", &denoise,
                      "data", "label", &label, "b64_json", &b64, "label", &label1, "class", &class1) == 0);
    CHECK_STR(id, "req-1");
    CHECK_STR(seed, "9223372036854775808");
    CHECK_STR(note, "a \"quoted\" note\n");
    CHECK_STR(label, "bag");
    CHECK_STR(b64, "aGVsbG8=");
    CHECK(version == 9034 && denoise == 333.333 && json_is_null(label1) && json_is_null(class1));
    json_decref(root);
    mem_free(text);
    resolved_deinit(&r);
}

TEST(request_error_table) {
    static const struct {
        int status;
        const char *param;
        int http;
        const char *type;
    } want[] = {{E_RANGE, "sampler.steps", 422, "invalid_request_error"},
                {E_BUSY, "", 503, "overloaded_error"},
                {E_TIMEOUT, "", 504, "timeout_error"},
                {E_NOTFOUND, "model", 404, "not_found_error"},
                {E_CONFLICT, "digest", 409, "invalid_request_error"},
                {E_CONFLICT, "sampler.w_t", 422, "invalid_request_error"},
                {E_NONFINITE, "", 500, "server_error"},
                {E_DEVICE, "", 503, "unavailable_error"},
                {E_NOMEM, "", 503, "unavailable_error"},
                {E_PERM, "", 403, "permission_error"},
                {E_INTERNAL, "", 500, "server_error"},
                {-99, "", 500, "server_error"},
                {0, "", 500, "server_error"}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        struct err err = {.status = want[i].status, .text = "why"};
        struct http_error e;
        strcpy(err.param, want[i].param);
        CHECK(http_error_from(&e, &err) == -1 && e.status == want[i].http);
        CHECK_STR(e.type, want[i].type);
        CHECK_STR(e.param, want[i].param);
    }
}

TEST(request_error_json_survives_any_bytes) {
    struct http_error e;
    http_error_set(&e, 422, "unknown_field", "a\"b\\\n\xff", "caf\xc3\xa9 \xe2\x82 \xed\xa0\x80 \xf4\x90\x80\x80 end");
    char *text = http_error_json(&e);
    json_t *root = json_loads(text, 0, NULL);
    const char *message, *type, *param, *code;
    CHECK(root && json_unpack(root, "{s:{s:s,s:s,s:s,s:s}}", "error", "message", &message, "type", &type, "param", &param, "code",
                              &code) == 0);
    CHECK_STR(param, "a\"b\\\n\xef\xbf\xbd");
    CHECK(strncmp(message, "caf\xc3\xa9 \xef\xbf\xbd", 9) == 0 && strstr(message, " end"));
    json_decref(root);
    mem_free(text);
    http_error_set(&e, 404, "not_found", NULL, "no");
    text = http_error_json(&e);
    CHECK_STR(text, "{\"error\":{\"message\":\"no\",\"type\":\"not_found_error\",\"param\":null,\"code\":\"not_found\"}}");
    mem_free(text);
}

TEST(request_capabilities_shape) {
    struct engine_model two;
    fake_model(&model, true, true);
    fake_model(&two, false, false);
    strcpy(two.name, "other");
    two.desc.is_default = true;
    const struct engine_model *models[] = {&model, &two};
    struct capabilities c = {"0.1", "a \"cpu\"", models, 2, 64, 16, 600000, REQUEST_MAX_BODY};
    char *text = capabilities_json(&c);
    json_t *root = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
    int d0, d1, nc;
    json_t *labels, *none, *methods, *w, *limits, *paths;
    CHECK(root && json_unpack(root, "{s:[{s:o,s:b,s:b},{s:o,s:b}], s:o, s:{s:{s:o},s:{s:o}}, s:o}", "models", "labels", &labels,
                              "default", &d0, "null_class", &nc, "labels", &none, "default", &d1, "interpolants", &paths,
                              "samplers", "ode", "methods", &methods, "sde", "w_t", &w, "limits", &limits) == 0);
    CHECK(json_array_size(labels) == FAKE_CLASSES && json_array_size(json_array_get(labels, 7)) == 3 &&
          json_array_size(none) == 0);
    CHECK(!d0 && d1 && nc && json_array_size(methods) == METHOD_COUNT && json_array_size(w) == W_KNOTS &&
          json_array_size(paths) == PATH_COUNT);
    CHECK(json_integer_value(json_object_get(limits, "max_images")) == 64 &&
          json_integer_value(json_object_get(limits, "max_steps")) == SAMPLER_MAX_STEPS);
    json_decref(root);
    mem_free(text);
    text = models_json(models, 2, 1700000000);
    root = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
    const char *id;
    CHECK(root && json_unpack(root, "{s:[*,{s:s}]}", "data", "id", &id) != 0);
    CHECK_STR(json_string_value(json_object_get(json_array_get(json_object_get(root, "data"), 1), "id")), "other");
    json_decref(root);
    mem_free(text);
}

// Every allocation on the way may fail: an error, never a crash or a leak (the leak checker's part), and never a half answer.
TEST(request_out_of_memory) {
    const char *body = "{\"model\":\"fashion-sit@9034\",\"classes\":[9,\"sandal\",null],\"sampler\":{\"type\":\"sde\"},"
                       "\"guidance\":{\"interval\":[0,1]}}";
    fake_model(&model, true, true);
    int failures = 0;
    for (long n = 1;; n++) {
        struct request *r;
        struct resolved out;
        struct http_error e = {0};
        char *text = NULL;
        fault_arm(FAULT_ALLOC, n, false);
        int rc = request_parse(&r, body, strlen(body), &e);
        if (rc == 0) {
            rc = request_resolve(&out, r, &model, 1, &e);
            if (rc == 0) {
                text = request_normalised(&out, &model, 0);
                resolved_deinit(&out);
            }
            request_free(r);
        }
        fault_disarm();
        if (text) {
            mem_free(text);
            break;
        }
        failures++;
        if (rc != 0 && e.status != 503) test_fail(__FILE__, __LINE__, "allocation %ld: %d %s", n, e.status, e.message);
    }
    CHECK(failures > 20);
}
