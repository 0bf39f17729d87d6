// SPDX-License-Identifier: MIT
// The names of autoencoder tensors: three spellings and two prefixes give one network; what is missing, extra or misshapen is
// named.
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/safetensors.h"
#include "core/io/vae_file.h"
#include "tests/published_vae.h"
#include "tests/test.h"

static const struct vae_arch small = {.image_channels = 3,
                                      .latent_channels = 4,
                                      .levels = 3,
                                      .layers = 2,
                                      .groups = 4,
                                      .width = {8, 12, 16},
                                      .encoder = true,
                                      .decoder = true,
                                      .quant = true,
                                      .post_quant = true,
                                      .attention = {true, true}};
enum style { NEW, OLD, COMPVIS };

struct respelled {
    struct vae_weights from;
    struct tensor_table table;
    enum style style;
    const char *prefix;
};

static int respell_unit(void *ctx, const struct vae_unit *u) {
    struct respelled *r = ctx;
    const char *name = r->style == COMPVIS ? u->compvis : r->style == OLD && u->old[0] ? u->old : u->name;
    for (int i = 0; i < 2; i++) {
        char full[128];
        snprintf(full, sizeof full, "%s.%s", u->name, i ? "bias" : "weight");
        struct tensor *t = &r->table.tensors[r->table.n++];
        *t = *tensor_find(&r->from.table, full);
        t->name = mem_printf("%s%s.%s", r->prefix, name, i ? "bias" : "weight");
        if (r->style == COMPVIS && u->side < 0 && i == 0) t->ndim = 4, t->shape[2] = t->shape[3] = 1;
    }
    return 0;
}

static struct respelled respell(enum style style, const char *prefix) {
    struct respelled r = {.style = style, .prefix = prefix};
    struct err e = {0};
    CHECK_OK(vae_random(&r.from, &small, 5, &e), &e);
    r.table.tensors = mem_array((size_t)r.from.table.n + 2, sizeof *r.table.tensors);
    vae_walk(&small, respell_unit, &r);
    CHECK(r.table.n == r.from.table.n);
    return r;
}

static void drop(struct respelled *r) {
    for (int i = 0; i < r->from.table.n; i++) mem_free((void *)r->table.tensors[i].name);
    mem_free(r->table.tensors);
    vae_weights_free(&r->from);
}

static int match(struct vae_file *f, const struct tensor_table *table, struct err *e) {
    const char *prefix;
    *f = (struct vae_file){.arch.groups = 4};
    int rc = vae_infer(&f->arch, &prefix, table, e);
    return rc == OK ? vae_match(f, table, prefix, e) : rc;
}

static void check_same(const struct vae_file *f, const struct tensor_table *want) {
    CHECK(memcmp(&f->arch, &small, sizeof small) == 0);
    CHECK(f->table.n == want->n);
    for (int i = 0; i < want->n; i++) {
        const struct tensor *a = &want->tensors[i], *b = tensor_find(&f->table, a->name);
        CHECK(b && b->count == a->count && memcmp(a->data, b->data, a->bytes) == 0);
    }
}

TEST(vae_names_of_all_writers) {
    for (int style = NEW; style <= COMPVIS; style++) {
        static const char *const prefixes[] = {"", "first_stage_model.", "vae."};
        for (int p = 0; p < 3; p++) {
            struct respelled r = respell((enum style)style, prefixes[p]);
            struct vae_file f;
            struct err e = {0};
            CHECK_OK(match(&f, &r.table, &e), &e);
            check_same(&f, &r.from.table);
            vae_file_close(&f);
            drop(&r);
        }
    }
}

static int count_unit(void *ctx, const struct vae_unit *u) {
    int64_t *n = ctx, side = u->side < 0 ? 1 : u->side;
    n[0] += 2;
    n[1] += u->out + (side ? u->out * u->in * side * side : u->out);
    return 0;
}

TEST(vae_published_counts) { // of stabilityai/sd-vae-ft-ema
    struct vae_arch a = published_vae;
    int64_t all[2] = {0}, decoder[2] = {0};
    vae_walk(&a, count_unit, all);
    a.encoder = false;
    vae_walk(&a, count_unit, decoder);
    CHECK(all[0] == 248 && all[1] == 83653863);
    CHECK(decoder[1] == 49490199);
}

TEST(vae_missing_tensors_are_named) {
    for (int style = NEW; style <= COMPVIS; style++) {
        struct respelled r = respell((enum style)style, "");
        for (int i = 0; i < r.table.n; i++) {
            struct tensor gone = r.table.tensors[i], last = r.table.tensors[r.table.n - 1];
            struct vae_file f;
            struct err e = {0};
            r.table.tensors[i] = last;
            r.table.n--;
            CHECK(match(&f, &r.table, &e) == E_CONFLICT && e.text[0] && e.param[0]);
            // without one of these there is no such layer, level or half: what is left over is named
            bool shape = strstr(gone.name, "conv_in.weight") || strstr(gone.name, "quant_conv.weight") ||
                         strstr(gone.name, "conv1.weight") || strstr(gone.name, "norm.weight");
            char layer[96];
            snprintf(layer, sizeof layer, "%.*s", (int)(strrchr(gone.name, '.') - gone.name), gone.name);
            bool old = style == OLD &&
                       (strstr(layer, "query") || strstr(layer, "key") || strstr(layer, "value") || strstr(layer, "proj_attn"));
            if (!shape && !old && !strstr(e.text, layer)) test_fail(__FILE__, __LINE__, "without '%s': %s", gone.name, e.text);
            vae_file_close(&f);
            r.table.tensors[i] = gone;
            r.table.tensors[r.table.n++] = last;
        }
        drop(&r);
    }
}

TEST(vae_misshapen_and_extra_tensors_are_named) {
    struct respelled r = respell(NEW, "");
    struct vae_file f;
    for (int i = 0; i < r.table.n; i++)
        for (int change = 0; change < 4; change++) {
            struct tensor was = r.table.tensors[i], *t = &r.table.tensors[i];
            struct err e = {0};
            if (change == 0) t->shape[t->ndim - 1]++;
            if (change == 1) t->ndim++, t->shape[t->ndim - 1] = 1;
            if (change == 2) t->shape[0] = 0;
            if (change == 3) t->dtype = DT_I32;
            int rc = match(&f, &r.table, &e);
            if (rc != (change == 3 ? E_UNSUPPORTED : E_CONFLICT))
                test_fail(__FILE__, __LINE__, "'%s' change %d: %d %s", was.name, change, rc, e.text);
            CHECK(e.text[0]);
            if (change == 3) CHECK(strstr(e.text, was.name));
            vae_file_close(&f);
            *t = was;
        }
    struct err e = {0};
    r.table.tensors[r.table.n] = r.table.tensors[3];
    r.table.tensors[r.table.n++].name = "decoder.up_blocks.1.attentions.0.to_q.weight";
    CHECK(match(&f, &r.table, &e) == E_CONFLICT);
    CHECK_STR(e.param, "decoder.up_blocks.1.attentions.0.to_q.weight");
    vae_file_close(&f);
    r.table.tensors[r.table.n - 1].name = "loss.discriminator.main.0.weight"; // of training: nobody minds
    e = (struct err){0};
    CHECK_OK(match(&f, &r.table, &e), &e);
    vae_file_close(&f);
    r.table.n--;
    drop(&r);
}

/* ---- files ---- */

struct sink {
    char *bytes;
    size_t n;
};
static int collect(void *ctx, const void *bytes, size_t n, struct err *e) {
    struct sink *s = ctx;
    (void)e;
    s->bytes = mem_resize(s->bytes, s->n + n, 1);
    memcpy(s->bytes + s->n, bytes, n);
    s->n += n;
    return 0;
}

static void write_weights(const char *path, const struct tensor_table *table) {
    struct sink s = {0};
    struct err e = {0};
    CHECK_OK(safetensors_write(table, NULL, 0, collect, &s, &e), &e);
    CHECK_OK(file_write(path, s.bytes, s.n, &e), &e);
    mem_free(s.bytes);
}

static void write_text(const char *path, const char *text) {
    struct err e = {0};
    CHECK_OK(file_write(path, text, strlen(text), &e), &e);
}

#define CONFIG                                                                                                                   \
    "{\"_class_name\": \"AutoencoderKL\", \"norm_num_groups\": 4, \"block_out_channels\": [8, 12, 16], \"layers_per_block\": 2"

TEST(vae_folders_and_files) {
    char dir[] = "/tmp/sitd-vae-XXXXXX", path[256], sub[128];
    struct respelled r = respell(OLD, "");
    struct vae_file f;
    struct err e = {0};
    CHECK(mkdtemp(dir));
    snprintf(sub, sizeof sub, "%s/vae", dir);
    CHECK(vae_file_open(&f, dir, NULL, &e) == E_NOTFOUND && strstr(e.text, "diffusion_pytorch_model.safetensors"));
    CHECK(mkdir(sub, 0777) == 0);
    snprintf(path, sizeof path, "%s/diffusion_pytorch_model.safetensors", sub);
    write_weights(path, &r.table);
    e = (struct err){0};
    CHECK(vae_file_open(&f, path, NULL, &e) == E_CONFLICT); // 8 channels do not fall into 32 groups
    CHECK_STR(e.param, "norm_num_groups");
    snprintf(path, sizeof path, "%s/config.json", sub);
    write_text(path, CONFIG ", \"scaling_factor\": 0.5, \"shift_factor\": 0.25, \"latents_mean\": null}");
    const char *ways[] = {dir, sub};
    for (int i = 0; i < 2; i++) {
        e = (struct err){0};
        CHECK_OK(vae_file_open(&f, ways[i], NULL, &e), &e);
        check_same(&f, &r.from.table);
        CHECK(f.scale == 0.5 && f.shift == 0.25);
        vae_file_close(&f);
    }
    static const struct {
        const char *json, *param;
        int status;
    } bad[] = {
        {"{\"_class_name\": \"AutoencoderTiny\"}", "_class_name", E_UNSUPPORTED},
        {CONFIG ", \"act_fn\": \"relu\"}", "act_fn", E_UNSUPPORTED},
        {CONFIG ", \"latent_channels\": 16}", "latent_channels", E_CONFLICT},
        {CONFIG ", \"out_channels\": 1}", "out_channels", E_CONFLICT},
        {CONFIG ", \"in_channels\": 1}", "in_channels", E_CONFLICT},
        {"{\"norm_num_groups\": 4, \"layers_per_block\": 3}", "layers_per_block", E_CONFLICT},
        {"{\"norm_num_groups\": 4, \"block_out_channels\": [8, 16, 12]}", "block_out_channels", E_CONFLICT},
        {"{\"norm_num_groups\": 0}", "norm_num_groups", E_RANGE},
        {"{\"norm_num_groups\": 4.5}", "norm_num_groups", E_RANGE},
        {"{\"norm_num_groups\": \"4\"}", "norm_num_groups", E_FORMAT},
        {CONFIG ", \"scaling_factor\": 0}", "scaling_factor", E_RANGE},
        {"[1", "", E_FORMAT},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        e = (struct err){0};
        write_text(path, bad[i].json);
        CHECK(vae_file_open(&f, sub, NULL, &e) == bad[i].status);
        CHECK_STR(e.param, bad[i].param);
    }
    write_text(path, CONFIG "}");
    e = (struct err){0};
    CHECK(vae_file_open(&f, sub, "0000000000000000000000000000000000000000000000000000000000000000", &e) == E_CONFLICT);
    CHECK_STR(e.param, "latent.vae.sha256");
    e = (struct err){0};
    CHECK(vae_file_open(&f, "tests/golden/sit-tiny.safetensors", NULL, &e) == E_CONFLICT && strstr(e.text, "AutoencoderKL"));
    unlink(path);
    snprintf(path, sizeof path, "%s/diffusion_pytorch_model.safetensors", sub);
    unlink(path), rmdir(sub), rmdir(dir);
    drop(&r);
}
