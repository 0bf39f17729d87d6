# SPDX-License-Identifier: MIT
"""The daemon against its own contract: each path of openapi.json is served, and what it answers fits the schema given there."""
import json

import pytest

from conftest import SHORT
from test_openapi import EXAMPLES, SPEC, fits, resolve

GETS = sorted(path for path, item in SPEC["paths"].items() if "get" in item)


def answer_of(operation, status):
    response = operation["responses"][str(status)]
    return resolve(response["$ref"]) if "$ref" in response else response


def check(operation, reply):
    said = answer_of(operation, reply.status)
    kind = reply.headers["Content-Type"].split(";")[0]
    assert kind in said["content"], f"{kind} is not among {list(said['content'])}"
    if kind == "application/json":
        assert fits(reply.json(), said["content"][kind]["schema"]), reply.body
    for name in said.get("headers", {}):
        assert reply.headers[name], name


@pytest.mark.parametrize("path", GETS)
def test_get_answers_as_said(daemon, path):
    reply = daemon.get(path.replace("{model}", "tiny"))
    assert reply.status == 200
    check(SPEC["paths"][path]["get"], reply)


def test_the_served_contract_is_this_one(daemon):
    assert daemon.get("/openapi.json").json() == SPEC


@pytest.mark.parametrize("accept, classes", [("application/json", [0, 3, None]), ("image/png", [1]), ("multipart/mixed", [1, 2])])
def test_samples_answer_as_said(daemon, accept, classes):
    reply = daemon.sample({"classes": classes, "sampler": SHORT["sampler"]}, accept=accept)
    assert reply.status == 200 and reply.headers["Content-Type"].startswith(accept)
    check(SPEC["paths"]["/v1/samples"]["post"], reply)


@pytest.mark.parametrize("status, body, accept", [(400, "{", None), (404, '{"class":1,"model":"none"}', None), (406, '{"class":1,"n":2}', "image/png"),
                                                  (422, '{"class":1,"steps":3}', None)])
def test_errors_answer_as_said(daemon, status, body, accept):
    reply = daemon.sample(body, accept=accept)
    assert reply.status == status
    check(SPEC["paths"]["/v1/samples"]["post"], reply)


@pytest.mark.parametrize("path", [p for p in EXAMPLES if "dit-" not in p.stem], ids=lambda p: p.stem)  # those: test_families.py
def test_examples_reach_the_sampler(daemon, path):
    """Taken with the names of a model that is here; few steps, since only the answer's form matters."""
    request = json.loads(path.read_text(encoding="utf-8"))
    request.pop("model", None)
    for field in ("class", "classes"):
        if field in request:
            request[field] = [3 if isinstance(c, str) else c for c in request[field]][:2] if field == "classes" else 3
    if "steps" in request.get("sampler", {}):
        request["sampler"]["steps"] = 3
    reply = daemon.sample({**request, **({"n": 2} if "n" in request else {})})
    assert reply.status == 200, reply.body
    check(SPEC["paths"]["/v1/samples"]["post"], reply)
