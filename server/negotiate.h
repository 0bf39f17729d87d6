// SPDX-License-Identifier: MIT
/*
 * negotiate: what a client's headers ask for. Pure functions on strings from outside. RFC 9110 sections 8.3 and 12.5.1. Thread:
 * any.
 */
#ifndef SITD_NEGOTIATE_H
#define SITD_NEGOTIATE_H
#include <stdbool.h>
#include <stddef.h>

struct offer {
    int quality, specificity;
}; // quality 0 (refused) to 1000; specificity 0 */*, 1 type/*, 2 type/subtype

// How much a client wants a type ("image/png"). No header (NULL) or an empty one accepts everything. The most specific range that
// matches decides.
struct offer accept_offer(const char *accept, const char *type);

enum answer_format { ANSWER_JSON, ANSWER_PNG, ANSWER_MULTIPART, ANSWER_NONE };
// The best form for n images: several cannot be one PNG. Equal wishes: PNG, then parts, then JSON, as who names an image means
// it; but JSON where only a wildcard matches all. ANSWER_NONE: 406.
enum answer_format accept_choose(const char *accept, int n);

bool content_type_is_json(const char *content_type); // application/json, any parameters but a charset other than UTF-8
bool request_id_valid(const char *id);               // 1 to 128 of [A-Za-z0-9._:+/=@-]: safe in headers, logs and JSON
bool traceparent_valid(const char *);                // W3C: 00-<32 hex>-<16 hex>-<2 hex>
bool etag_matches(const char *if_none_match, const char *etag);

#endif
