// SPDX-License-Identifier: MIT
/*
 * arch_config: the authors' constructor arguments (input_size, patch_size, ..., as DiT and SiT models.py name them) as JSON,
 * which recorded cases carry because no tensor tells the heads (declared in model_dir.h).
 */
#include <string.h>

#include "core/io/jsonio.h"
#include "core/io/model_dir.h"

static int whole(int *out, const json_t *root, const char *key, struct err *e) {
    const json_t *v = json_object_get(root, key);
    if (!v) return OK;
    if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > 1 << 24)
        return err_param(e, E_FORMAT, key, "config's '%s' is not a whole number from 0 to 2^24", key);
    *out = (int)json_integer_value(v);
    return OK;
}

static int real(double *out, const json_t *root, const char *key, struct err *e) {
    const json_t *v = json_object_get(root, key);
    if (!v) return OK;
    if (!json_is_number(v)) return err_param(e, E_FORMAT, key, "config's '%s' is not a number", key);
    *out = json_number_value(v);
    return OK;
}

static int block_design(struct arch *a, const json_t *root, struct err *e) {
    const json_t *v = json_object_get(root, "block");
    int block = json_is_string(v) ? arch_block_parse(json_string_value(v)) : -1;
    if (v && block < 0) return err_param(e, E_FORMAT, "block", "config's 'block' is no conditioning design that is known");
    if (v) a->block = (enum arch_block)block;
    return OK;
}

static int decoder(struct arch *a, const json_t *root, struct err *e) {
    const json_t *v = json_object_get(root, "decoder");
    if (!v) return OK;
    if (!json_is_object(v)) return err_param(e, E_FORMAT, "decoder", "config's 'decoder' is not an object");
    int rc = whole(&a->decoder.hidden_size, v, "hidden_size", e);
    if (rc == OK) rc = whole(&a->decoder.depth, v, "depth", e);
    return rc == OK ? whole(&a->decoder.num_heads, v, "num_heads", e) : rc;
}

int arch_parse_config(struct arch *a, const char *text, struct err *e) {
    json_t *root;
    int rc = jsonio_parse(&root, text, strlen(text), 8, 1000, "config", e);
    if (rc != OK) return rc;
    if (!json_is_object(root)) rc = err_param(e, E_FORMAT, "config", "config is not a JSON object");
    struct {
        const char *key;
        int *out;
    } fields[] = {
        {"input_size", &a->input_size},   {"patch_size", &a->patch_size}, {"in_channels", &a->in_channels},
        {"hidden_size", &a->hidden_size}, {"depth", &a->depth},           {"num_heads", &a->num_heads},
        {"num_classes", &a->num_classes},
    };
    for (size_t i = 0; rc == OK && i < sizeof fields / sizeof *fields; i++) rc = whole(fields[i].out, root, fields[i].key, e);
    if (rc == OK) rc = real(&a->mlp_ratio, root, "mlp_ratio", e);
    if (rc == OK) rc = block_design(a, root, e);
    if (rc == OK) rc = decoder(a, root, e);
    const json_t *sigma = json_object_get(root, "learn_sigma");
    if (rc == OK && sigma && !json_is_boolean(sigma))
        rc = err_param(e, E_FORMAT, "learn_sigma", "config's 'learn_sigma' is not true or false");
    if (rc == OK && sigma) a->learn_sigma = json_is_true(sigma);
    json_decref(root);
    return rc;
}
