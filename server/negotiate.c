// SPDX-License-Identifier: MIT
#include "server/negotiate.h"

#include <ctype.h>
#include <string.h>
#include <strings.h>

// "0.5" in thousandths; junk counts as 1, the default.
static int parse_quality(const char *p, const char *end) {
    if (p == end || (*p != '0' && *p != '1')) return 1000;
    int q = (*p++ - '0') * 1000;
    if (p < end && *p == '.') p++;
    for (int unit = 100; p < end && isdigit((unsigned char)*p) && unit; p++, unit /= 10) q += (*p - '0') * unit;
    return q > 1000 ? 1000 : q;
}

// How specifically the range [p, end) of an Accept header names the type; -1 not at all.
static int match_range(const char *p, const char *end, const char *type) {
    size_t n = strcspn(p, ";,"), major = strcspn(type, "/");
    if (n > (size_t)(end - p)) n = (size_t)(end - p);
    while (n && isspace((unsigned char)p[n - 1])) n--;
    if (n == 3 && !memcmp(p, "*/*", 3)) return 0;
    if (n == major + 2 && !strncasecmp(p, type, major + 1) && p[n - 1] == '*') return 1;
    return n == strlen(type) && !strncasecmp(p, type, n) ? 2 : -1;
}

static int range_quality(const char *p, const char *end) {
    for (p = memchr(p, ';', (size_t)(end - p)); p; p = memchr(p, ';', (size_t)(end - p))) {
        for (p++; p < end && isspace((unsigned char)*p);) p++;
        if (end - p >= 2 && (*p == 'q' || *p == 'Q') && p[1] == '=') return parse_quality(p + 2, end);
    }
    return 1000;
}

struct offer accept_offer(const char *accept, const char *type) {
    struct offer best = {1000, 0};
    if (!accept || !accept[strspn(accept, " \t,")]) return best;
    best = (struct offer){0, -1};
    for (const char *p = accept; *p;) {
        p += strspn(p, " \t,");
        const char *end = p + strcspn(p, ",");
        int specificity = match_range(p, end, type);
        if (specificity > best.specificity) best = (struct offer){range_quality(p, end), specificity};
        p = end;
    }
    return best;
}

enum answer_format accept_choose(const char *accept, int n) {
    static const char *const types[] = {
        [ANSWER_JSON] = "application/json", [ANSWER_PNG] = "image/png", [ANSWER_MULTIPART] = "multipart/mixed"};
    enum answer_format best = ANSWER_NONE;
    struct offer most = {0, -1};
    for (int i = ANSWER_JSON; i < ANSWER_NONE; i++) {
        struct offer o = accept_offer(accept, types[i]);
        if (!o.quality || (i == ANSWER_PNG && n != 1)) continue;
        bool tie = o.quality == most.quality && o.specificity == most.specificity;
        bool more = o.quality > most.quality || (o.quality == most.quality && o.specificity > most.specificity);
        if (more || (tie && o.specificity && best == ANSWER_JSON)) most = o, best = (enum answer_format)i;
    }
    return best;
}

bool content_type_is_json(const char *type) {
    static const char json[] = "application/json";
    if (!type || strncasecmp(type, json, sizeof json - 1) != 0) return false;
    const char *p = type + sizeof json - 1 + strspn(type + sizeof json - 1, " \t");
    if (*p && *p != ';') return false;
    const char *charset = strcasestr(p, "charset=");
    if (!charset) return true;
    charset += 8 + (charset[8] == '"');
    return !strncasecmp(charset, "utf-8", 5) && !isalnum((unsigned char)charset[5]);
}

bool request_id_valid(const char *id) {
    static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:+/=@-";
    size_t n = strlen(id);
    return n >= 1 && n <= 128 && strspn(id, allowed) == n;
}

bool traceparent_valid(const char *t) {
    static const int dashes[] = {2, 35, 52};
    if (strlen(t) != 55) return false;
    for (int i = 0, d = 0; i < 55; i++) {
        if (d < 3 && i == dashes[d]) {
            if (t[i] != '-') return false;
            d++;
        } else if (!isdigit((unsigned char)t[i]) && !(t[i] >= 'a' && t[i] <= 'f')) return false;
    }
    return true;
}

bool etag_matches(const char *header, const char *etag) {
    if (!header) return false;
    return !strcmp(header, "*") || strstr(header, etag);
}
