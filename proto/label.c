// SPDX-License-Identifier: MIT
#include <stdio.h>
#include <string.h>

#include "proto/near.h"
#include "proto/request_fields.h"

static bool matches(const struct model_desc *m, int id, const char *label, bool synonyms) {
    for (int i = synonyms ? 1 : 0; i < (synonyms ? m->labels[id].n : m->labels[id].n > 0); i++)
        if (strcmp(m->labels[id].names[i], label) == 0) return true;
    return false;
}

static int ambiguous(const struct model_desc *m, const char *label, bool synonyms, const char *param, struct http_error *e) {
    char ids[200];
    size_t len = 0;
    ids[0] = 0;
    for (int id = 0; id < m->arch.num_classes && len < sizeof ids; id++)
        if (matches(m, id, label, synonyms)) len += (size_t)snprintf(ids + len, sizeof ids - len, "%s%d", len ? ", " : "", id);
    return http_error_set(e, 422, "ambiguous_label", param, "%s: \"%.80s\" names more than one class; give one of the ids %s",
                          param, label, ids);
}

static int unknown(const struct model_desc *m, const char *label, const char *param, struct http_error *e) {
    char text[300];
    if (label[strspn(label, "0123456789")] == 0)
        return http_error_set(e, 422, "unknown_label", param,
                              "%s: no class has the label \"%.80s\"; a class id is a number, without quotes", param, label);
    struct near near;
    near_init(&near, label);
    for (int id = 0; id < m->arch.num_classes; id++)
        for (int i = 0; i < m->labels[id].n; i++) near_add(&near, m->labels[id].names[i]);
    near_text(&near, text, sizeof text);
    return http_error_set(e, 422, "unknown_label", param, "%s: no class has the label \"%.80s\"%s", param, label, text);
}

int label_find(const struct model_desc *m, const char *label, const char *param, int *id, struct http_error *e) {
    if (!m->labels)
        return http_error_set(e, 422, "unknown_label", param, "%s: this model has no labels; give a class id from 0 to %d", param,
                              m->arch.num_classes - 1);
    for (int synonyms = 0; synonyms < 2; synonyms++) {
        int found = 0;
        for (int i = 0; i < m->arch.num_classes; i++)
            if (matches(m, i, label, synonyms) && found++ == 0) *id = i;
        if (found == 1) return 0;
        if (found > 1) return ambiguous(m, label, synonyms, param, e);
    }
    return unknown(m, label, param, e);
}
