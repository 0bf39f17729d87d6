// SPDX-License-Identifier: MIT
// The tensor lists of every family against published counts, inference from names, other people's layouts, and model.json's newer
// fields.
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/import.h"
#include "tests/test.h"

static struct arch sized(int depth, int width, int heads, int patch, int input) {
    return (struct arch){.input_size = input,
                         .patch_size = patch,
                         .in_channels = 4,
                         .hidden_size = width,
                         .depth = depth,
                         .num_heads = heads,
                         .num_classes = 1000,
                         .mlp_ratio = 4,
                         .class_dropout = true,
                         .learn_sigma = true};
}

static struct arch masked(int depth, int width, int heads) {
    struct arch a = sized(depth, width, heads, 2, 32);
    a.learn_sigma = false, a.one_hot = true;
    a.decoder.hidden_size = 512, a.decoder.depth = 8, a.decoder.num_heads = 16;
    return a;
}

static long count(const struct arch *a, long *tensors) {
    char name[64];
    int64_t shape[TENSOR_MAX_DIMS];
    long sum = 0, n = 0;
    for (int rank; (rank = arch_tensor(a, n, name, shape, NULL)); n++) {
        long one = 1;
        for (int i = 0; i < rank; i++) one *= shape[i];
        sum += one;
    }
    if (tensors) *tensors = n;
    return sum;
}

TEST(arch_counts_of_dit) { // models-and-math 1.1, got by running the authors' code; with the position table
    static const struct {
        int depth, width, heads, patch, input;
        long total;
    } known[] = {
        {12, 384, 6, 2, 32, 32963360},    {12, 768, 12, 2, 32, 130512416},  {24, 1024, 16, 2, 32, 458102816},
        {28, 1152, 16, 2, 32, 675129632}, {28, 1152, 16, 2, 64, 676014368}, {12, 384, 6, 4, 32, 32945024},
        {12, 768, 12, 4, 32, 130475648},  {24, 1024, 16, 4, 32, 458053760}, {28, 1152, 16, 4, 32, 675074432},
        {12, 384, 6, 8, 32, 33148160},    {12, 768, 12, 8, 32, 130881536},  {24, 1024, 16, 8, 32, 458594816},
        {28, 1152, 16, 8, 32, 675683072},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        struct arch a = sized(known[i].depth, known[i].width, known[i].heads, known[i].patch, known[i].input);
        long tensors, total = count(&a, &tensors);
        if (total != known[i].total)
            test_fail(__FILE__, __LINE__, "width %d patch %d: %ld, not %ld", known[i].width, known[i].patch, total,
                      known[i].total);
        CHECK(tensors == 8 + 10L * a.depth + 4);
    }
}

TEST(arch_counts_of_the_designs) { // DiT paper, table 4, XL/2: millions of parameters, the fixed position table not being one
    static const long millions[BLOCK_COUNT] = {675, 600, 598, 449}, table = 256 * 1152;
    for (int b = 0; b < BLOCK_COUNT; b++) {
        struct arch a = sized(28, 1152, 16, 2, 32);
        a.block = (enum arch_block)b;
        long total = count(&a, NULL) - table;
        if ((total + 500000) / 1000000 != millions[b]) test_fail(__FILE__, __LINE__, "%s: %ld", arch_block_name(a.block), total);
    }
}

TEST(arch_counts_of_maskdit) {
    struct arch a = masked(28, 1152, 16);
    long tensors;
    CHECK(count(&a, &tensors) == 730541200 && tensors == 378);
    a.decoder.depth = 0;
    CHECK(count(&a, NULL) == 675110032);
}

// What arch_random makes of an arch, arch_infer reads back, but for what no tensor tells.
TEST(arch_infer_reads_every_list) {
    struct arch all[8];
    int n = 0;
    for (int b = 0; b < BLOCK_COUNT; b++, n++) {
        all[n] = sized(2, 48, 2, 2, 8);
        all[n].block = (enum arch_block)b;
    }
    all[n++] = masked(2, 48, 2);
    all[n] = masked(2, 48, 2);
    all[n].num_classes = 48, all[n++].mlp_ratio = 2; // a square label table
    all[n] = sized(3, 48, 2, 2, 8);
    all[n++].block_embedders = true;
    for (int i = 0; i < n; i++) {
        struct arch_weights w;
        struct arch back;
        struct err e = {0};
        CHECK_OK(arch_random(&w, &all[i], 1, &e), &e);
        CHECK_OK(arch_infer(&back, &w.table, &e), &e);
        CHECK(back.input_size == 0 && back.num_heads == 0); // no position table; no published width
        back.input_size = all[i].input_size, back.num_heads = all[i].num_heads;
        CHECK(back.block == all[i].block && back.depth == all[i].depth && back.hidden_size == all[i].hidden_size);
        CHECK(back.num_classes == all[i].num_classes && back.one_hot == all[i].one_hot && back.class_dropout);
        CHECK(back.decoder.hidden_size == all[i].decoder.hidden_size && back.decoder.depth == all[i].decoder.depth);
        CHECK(back.decoder.num_heads == all[i].decoder.num_heads && back.block_embedders == all[i].block_embedders);
        CHECK(back.learn_sigma == all[i].learn_sigma && back.mlp_ratio == all[i].mlp_ratio && back.patch_size == 2);
        CHECK_OK(arch_match(&all[i], &w.table, &e), &e);
        struct arch other = all[i];
        other.block = all[i].block == BLOCK_IN_CONTEXT ? BLOCK_ADALN : BLOCK_IN_CONTEXT;
        other.decoder.depth = 0;
        CHECK(arch_match(&other, &w.table, &e) == E_CONFLICT && e.param[0]);
        arch_weights_free(&w);
    }
}

/* ---- layouts ---- */

struct renamed { // a checkpoint under other names, kept as safetensors bytes
    char *bytes;
    size_t n;
    struct checkpoint c;
};

static int append(void *ctx, const void *bytes, size_t n, struct err *e) {
    struct renamed *r = ctx;
    (void)e;
    r->bytes = realloc(r->bytes, r->n + n);
    memcpy(r->bytes + r->n, bytes, n);
    r->n += n;
    return OK;
}

static int reread(struct renamed *r, const struct tensor_table *t, struct err *e) {
    *r = (struct renamed){0};
    CHECK_OK(safetensors_write(t, NULL, 0, append, r, e), e);
    return checkpoint_parse(&r->c, r->bytes, r->n, "renamed", e);
}

// maskdit-tiny under `prefix`, with one tensor more
static int with_prefix(struct renamed *r, const char *prefix, const char *extra, struct err *e) {
    struct checkpoint c;
    float one = 1;
    CHECK_OK(checkpoint_open(&c, "tests/golden/maskdit-tiny.safetensors", e), e);
    CHECK(c.table.n < 100);
    struct tensor all[101];
    struct tensor_table table = {all, c.table.n};
    char names[100][96];
    for (int i = 0; i < c.table.n; i++) {
        all[i] = c.table.tensors[i];
        snprintf(names[i], sizeof names[i], "%s%s", prefix, all[i].name);
        all[i].name = names[i];
    }
    if (extra)
        all[table.n++] =
            (struct tensor){.name = extra, .dtype = DT_F32, .ndim = 1, .shape = {1}, .data = &one, .bytes = 4, .count = 1};
    int rc = reread(r, &table, e);
    checkpoint_close(&c);
    return rc;
}

static void renamed_close(struct renamed *r) {
    checkpoint_close(&r->c);
    free(r->bytes);
}

static int describe(const struct checkpoint *c, struct model_desc *d, const struct import_flags *said, struct err *e) {
    struct import_fact facts[IMPORT_FACTS];
    int n, rc = import_describe(d, facts, &n, c, said, e);
    CHECK(n <= IMPORT_FACTS);
    return rc == OK ? import_require(facts, n, e) : rc;
}

TEST(layout_wrappers_and_teachers) {
    static const char *const wrappers[] = {"", "model.", "module.model.", "_orig_mod.model.", "model._orig_mod.", "student."};
    static const char *const extras[] = {NULL, "teacher.blocks.0.attn.qkv.weight", "head.last_layer.weight_g", "center"};
    const struct import_flags heads = {.step = -1, .heads = 2, .decoder_heads = 3};
    for (size_t w = 0; w < sizeof wrappers / sizeof *wrappers; w++)
        for (size_t x = 0; x < sizeof extras / sizeof *extras; x++) {
            struct renamed r;
            struct model_desc d;
            struct import_table it;
            struct err e = {0};
            CHECK_OK(with_prefix(&r, wrappers[w], extras[x], &e), &e);
            CHECK_OK(describe(&r.c, &d, &heads, &e), &e);
            CHECK_STR(d.family, extras[x] ? "sd-dit" : "maskdit");
            CHECK(d.guide_channels == -1 && d.arch.one_hot && d.arch.decoder.num_heads == 3 && d.latent.scale == 0.18215);
            CHECK_OK(import_convert(&it, &r.c.table, DT_F16, &e), &e);
            CHECK(it.table.n == 58 && (!extras[x] || !tensor_find(&it.table, extras[x])));
            CHECK(tensor_find(&it.table, "decoder_pos_embed")->dtype == DT_F32 &&
                  tensor_find(&it.table, "blocks.0.mlp.fc1.weight")->dtype == DT_F16);
            import_free(&it);
            renamed_close(&r);
        }
    struct renamed r;
    struct model_desc d;
    struct err e = {0};
    CHECK_OK(with_prefix(&r, "model.", "decoder_blocks.0.norm1.weight", &e), &e);
    CHECK(describe(&r.c, &d, &heads, &e) == E_CONFLICT);
    CHECK_STR(e.param, "decoder_blocks.0.norm1.weight");
    renamed_close(&r);
    err_clear(&e);
    CHECK_OK(with_prefix(&r, "model.", NULL, &e), &e);
    CHECK(describe(&r.c, &d, &(struct import_flags){.step = -1, .family = "sit"}, &e) == E_CONFLICT);
    CHECK_STR(e.param, "--family");
    renamed_close(&r);
}

// REPA's SiT: four channels out, projectors beside the network, time from data to noise, prediction "v".
TEST(layout_of_repa) {
    struct arch a = sized(2, 48, 2, 2, 8);
    struct arch_weights w;
    struct model_desc d;
    struct import_flags f = {.step = -1, .heads = 2, .path = "linear", .prediction = "velocity", .input_size = 8};
    struct checkpoint c = {.layout = ""};
    struct err e = {0};
    a.learn_sigma = false;
    CHECK_OK(arch_random(&w, &a, 1, &e), &e);
    c.table = w.table;
    struct tensor *all = mem_array((size_t)w.table.n + 1, sizeof *all);
    memcpy(all, w.table.tensors, (size_t)w.table.n * sizeof *all);
    all[w.table.n] = (struct tensor){.name = "projectors.0.4.bias", .dtype = DT_F32, .ndim = 1, .shape = {768}};
    c.table = (struct tensor_table){all, w.table.n + 1};
    CHECK_OK(describe(&c, &d, &f, &e), &e);
    CHECK_STR(d.family, "sit");
    CHECK(d.arch.reversed && d.arch.negated && d.guide_channels == -1 && !d.arch.learn_sigma);
    f.prediction = "noise";
    CHECK_OK(describe(&c, &d, &f, &e), &e);
    CHECK(d.arch.reversed && !d.arch.negated);
    f.time = "forward";
    CHECK_OK(describe(&c, &d, &f, &e), &e);
    CHECK(!d.arch.reversed);
    f.time = "backward";
    CHECK(describe(&c, &d, &f, &e) == E_RANGE);
    CHECK_STR(e.param, "--time");
    mem_free(all);
    arch_weights_free(&w);
}

/* ---- diffusers folders ---- */

#define TINY "tests/golden/dit-diffusers-tiny/transformer"
static char dir[64];

static void put(const char *name, const void *bytes, size_t n) {
    char path[256];
    struct err e = {0};
    snprintf(path, sizeof path, "%s/%s", dir, name);
    CHECK_OK(file_write(path, bytes, n, &e), &e);
}

// A copy of the tiny folder's config with `old` replaced; its weights under `weights` unless that is NULL.
static void folder(const char *old, const char *new, const char *weights) {
    void *config, *bytes;
    size_t n, size;
    struct err e = {0};
    char text[4096];
    snprintf(dir, sizeof dir, "/tmp/sitd-test-XXXXXX");
    CHECK(mkdtemp(dir));
    CHECK_OK(file_read(&config, &n, TINY "/config.json", sizeof text - 100, &e), &e);
    const char *at = old ? strstr(config, old) : config;
    CHECK(at);
    size_t before = (size_t)(at - (const char *)config), skip = old ? strlen(old) : 0;
    snprintf(text, sizeof text, "%.*s%s%.*s", (int)before, (const char *)config, old ? new : "", (int)(n - before - skip),
             at + skip);
    put("config.json", text, strlen(text));
    CHECK_OK(file_read(&bytes, &size, TINY "/diffusion_pytorch_model.safetensors", 1 << 24, &e), &e);
    if (weights) put(weights, bytes, size);
    mem_free(config);
    mem_free(bytes);
}

static void remove_dir(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", dir);
    CHECK(system(command) == 0);
}

static void refused(int status, const char *param, const char *text) {
    struct checkpoint c;
    struct err e = {0};
    int rc = checkpoint_open(&c, dir, &e);
    if (rc != status || strcmp(e.param, param) || !strstr(e.text, text))
        test_fail(__FILE__, __LINE__, "%d [%s] %s", rc, e.param, e.text);
    remove_dir();
}

TEST(diffusers_config_contradicts_its_tensors) {
    static const struct {
        const char *old, *new;
        int status;
        const char *param, *text;
    } cases[] = {
        {"\"num_layers\": 2", "\"num_layers\": 3", E_CONFLICT, "blocks.2.t_embedder.mlp.0.weight", "contradicts"},
        {"\"num_layers\": 2", "\"num_layers\": 1", E_CONFLICT, "blocks.1.t_embedder.mlp.2.weight", "1 blocks only"},
        {"\"attention_head_dim\": 24", "\"attention_head_dim\": 32", E_CONFLICT, "x_embedder.proj.bias", "needs [64]"},
        {"\"in_channels\": 4", "\"in_channels\": 3", E_CONFLICT, "x_embedder.proj.weight", "needs [48, 3, 2, 2]"},
        {"\"out_channels\": 8", "\"out_channels\": 4", E_CONFLICT, "final_layer.linear.bias", "needs [16]"},
        {"\"patch_size\": 2", "\"patch_size\": 4", E_CONFLICT, "x_embedder.proj.weight", "needs [48, 4, 4, 4]"},
        {"\"num_embeds_ada_norm\": 20", "\"num_embeds_ada_norm\": 1000", E_CONFLICT, "blocks.0.y_embedder.embedding_table.weight",
         "needs [1001, 48]"},
        {"\"num_layers\": 2", "\"num_layers\": \"2\"", E_FORMAT, "num_layers", "whole number"},
        {"ada_norm_zero", "ada_norm_single", E_UNSUPPORTED, "norm_type", "ada_norm_single"},
        {"DiTTransformer2DModel", "UNet2DModel", E_UNSUPPORTED, "_class_name", "UNet2DModel"},
        {"gelu-approximate", "geglu", E_UNSUPPORTED, "activation_fn", "geglu"},
        {"}", "", E_FORMAT, "", "not valid JSON"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        folder(cases[i].old, cases[i].new, "diffusion_pytorch_model.safetensors");
        refused(cases[i].status, cases[i].param, cases[i].text);
    }
    folder(NULL, NULL, NULL);
    refused(E_NOTFOUND, "", "diffusion_pytorch_model");
}

static void index_of(const char *text) {
    folder(NULL, NULL, "one.safetensors");
    put("diffusion_pytorch_model.safetensors.index.json", text, strlen(text));
}

TEST(diffusers_shards) {
    struct checkpoint whole, c;
    struct err e = {0};
    CHECK_OK(checkpoint_open(&whole, TINY, &e), &e);
    CHECK_STR(whole.layout, "diffusers");
    CHECK_STR(checkpoint_meta(&whole, "num_heads"), "2");
    folder(NULL, NULL, "diffusion_pytorch_model.bin"); // by its first bytes, whatever its name says
    CHECK_OK(checkpoint_open(&c, dir, &e), &e);
    CHECK(c.table.n == whole.table.n);
    checkpoint_close(&c);
    remove_dir();

    struct tensor half[2][40]; // two shards of the tensors as they lie in the file
    struct tensor_table tables[2] = {{half[0], 0}, {half[1], 0}};
    struct safetensors st;
    void *bytes;
    size_t n;
    CHECK_OK(file_read(&bytes, &n, TINY "/diffusion_pytorch_model.safetensors", 1 << 24, &e), &e);
    CHECK_OK(safetensors_parse(&st, bytes, n, &e), &e);
    for (int i = 0; i < st.table.n; i++) half[i % 2][tables[i % 2].n++] = st.table.tensors[i];
    index_of("{\"weight_map\": {\"a\": \"one.safetensors\", \"b\": \"two.safetensors\", \"c\": \"one.safetensors\"}}");
    for (int i = 0; i < 2; i++) {
        struct renamed r = {0};
        CHECK_OK(safetensors_write(&tables[i], NULL, 0, append, &r, &e), &e);
        put(i ? "two.safetensors" : "one.safetensors", r.bytes, r.n);
        free(r.bytes);
    }
    CHECK_OK(checkpoint_open(&c, dir, &e), &e);
    CHECK(c.table.n == whole.table.n);
    for (int i = 0; i < c.table.n; i++) {
        const struct tensor *a = &c.table.tensors[i], *b = tensor_find(&whole.table, a->name);
        CHECK(b && a->bytes == b->bytes && memcmp(a->data, b->data, a->bytes) == 0);
    }
    checkpoint_close(&c);
    remove_dir();
    safetensors_close(&st);
    mem_free(bytes);
    checkpoint_close(&whole);

    static const char *const names[] = {"../one.safetensors", "/etc/passwd", "", ".hidden", "a/b"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char text[128];
        snprintf(text, sizeof text, "{\"weight_map\": {\"a\": \"%s\"}}", names[i]);
        index_of(text);
        refused(E_FORMAT, "weight_map", "plain name");
    }
    index_of("{\"weight_map\": [1]}");
    refused(E_FORMAT, "weight_map", "missing or no object");
    index_of("{\"weight_map\": {\"a\": \"three.safetensors\"}}");
    refused(E_NOTFOUND, "", "three.safetensors");
    index_of("{\"weight_map\": {}}");
    refused(E_FORMAT, "weight_map", "names no file");
}

// Copies of one embedder become one; then the network is the authors'.
TEST(diffusers_copies_are_united) {
    struct safetensors st;
    struct renamed r;
    void *bytes;
    size_t n;
    struct arch a;
    struct err e = {0};
    CHECK_OK(file_read(&bytes, &n, TINY "/diffusion_pytorch_model.safetensors", 1 << 24, &e), &e);
    CHECK_OK(safetensors_parse(&st, bytes, n, &e), &e);
    for (int i = 0; i < st.table.n; i++) {
        struct tensor *t = &st.table.tensors[i];
        char first[128];
        if (!strstr(t->name, "blocks.1.norm1.emb.")) continue;
        snprintf(first, sizeof first, "transformer_blocks.0.%s", t->name + strlen("transformer_blocks.1."));
        t->data = tensor_find(&st.table, first)->data;
    }
    CHECK_OK(reread(&r, &st.table, &e), &e);
    CHECK_OK(arch_infer(&a, &r.c.table, &e), &e);
    CHECK(!a.block_embedders && a.depth == 2 && r.c.table.n == 12 - 1 + 20 &&
          tensor_find(&r.c.table, "y_embedder.embedding_table.weight"));
    renamed_close(&r);
    for (int i = 0; i < st.table.n; i++) { // a query without its key
        if (strcmp(st.table.tensors[i].name, "transformer_blocks.1.attn1.to_k.bias") == 0)
            st.table.tensors[i] = st.table.tensors[--st.table.n];
    }
    CHECK(reread(&r, &st.table, &e) == E_CONFLICT && strstr(e.text, "transformer_blocks.1.attn1.to_k.bias"));
    renamed_close(&r);
    safetensors_close(&st);
    mem_free(bytes);
}

/* ---- model.json ---- */

static void round_trip(struct model_desc *d, struct model_desc *back) {
    struct err e = {0};
    memset(d->weights_sha256, 'a', 64);
    snprintf(d->weights_file, sizeof d->weights_file, "w.safetensors");
    char *text = model_desc_dump(d, &e);
    CHECK(text);
    CHECK_OK(model_desc_parse(back, text, strlen(text), &e), &e);
    mem_free(text);
}

TEST(desc_newer_fields_round_trip) {
    double mean[4] = {0.1, -2.5, 0, 1e-3}, std[4] = {1, 0.18215, 3, 4};
    struct loss_knot curve[3] = {{0, 2.25}, {0.3, 0.7}, {1, 1}};
    struct model_desc sit = {.family = "sit",
                             .path = "linear",
                             .prediction = "velocity",
                             .guide_channels = -1,
                             .n_loss_curve = 3},
                      back;
    sit.arch = sized(2, 48, 2, 2, 8);
    sit.arch.block = BLOCK_CROSS_ATTENTION, sit.arch.reversed = true;
    sit.latent.mean = mean, sit.latent.std = std, sit.loss_curve = curve;
    round_trip(&sit, &back);
    CHECK(back.arch.block == BLOCK_CROSS_ATTENTION && back.arch.reversed && back.arch.negated && !back.arch.one_hot &&
          !back.arch.diffusers);
    CHECK(back.latent.scale == 0 && !memcmp(back.latent.mean, mean, sizeof mean) && !memcmp(back.latent.std, std, sizeof std));
    CHECK(back.n_loss_curve == 3 && !memcmp(back.loss_curve, curve, sizeof curve));
    model_desc_deinit(&back);

    struct model_desc edm = {.family = "maskdit", .guide_channels = -1, .arch = masked(2, 48, 2)};
    edm.latent.scale = 0.18215;
    snprintf(edm.latent.vae_file, sizeof edm.latent.vae_file, "vae.pth");
    memset(edm.latent.vae_sha256, 'b', 64);
    round_trip(&edm, &back);
    CHECK(back.arch.one_hot && back.arch.decoder.hidden_size == 512 && back.arch.decoder.depth == 8 &&
          back.arch.decoder.num_heads == 16);
    CHECK_STR(back.latent.vae_file, "vae.pth");
    CHECK_STR(back.latent.vae_sha256, edm.latent.vae_sha256);
    CHECK(back.latent.scale == 0.18215 && !back.loss_curve);
    model_desc_deinit(&back);

    struct model_desc dit = {.family = "dit", .guide_channels = 3, .arch = sized(2, 48, 2, 2, 8)};
    dit.arch.diffusers = dit.arch.block_embedders = true;
    round_trip(&dit, &back);
    CHECK(back.arch.diffusers && back.arch.block_embedders && !back.latent.vae_file[0] && back.arch.block == BLOCK_ADALN_ZERO);
    model_desc_deinit(&back);
}
