# SPDX-License-Identifier: MIT
"""The contract, without a daemon: openapi.json is generated from openapi.yaml, every reference leads somewhere, every example fits the schema, and the schema refuses
what the codec refuses (tests/bad/request, which a C test drives through request_parse)."""
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEC = json.loads((ROOT / "proto/openapi.json").read_text(encoding="utf-8"))


def resolve(ref):
    node = SPEC
    assert ref.startswith("#/"), ref
    for part in ref[2:].split("/"):
        node = node[part.replace("~1", "/").replace("~0", "~")]
    return node


def is_type(value, name):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {"object": isinstance(value, dict), "array": isinstance(value, list), "string": isinstance(value, str), "null": value is None,
            "boolean": isinstance(value, bool), "number": number, "integer": number and isinstance(value, int)}[name]


def scalar_fits(value, s):
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (value >= s.get("minimum", value) and value <= s.get("maximum", value) and ("exclusiveMinimum" not in s or value > s["exclusiveMinimum"])
                and ("exclusiveMaximum" not in s or value < s["exclusiveMaximum"]))
    if isinstance(value, str):
        return s.get("minLength", 0) <= len(value) <= s.get("maxLength", 1 << 30) and ("pattern" not in s or re.search(s["pattern"], value) is not None)
    return True


def fits(value, s):
    """The part of JSON Schema that the contract uses. Integers are strict: 50.0 is none."""
    if "$ref" in s and not fits(value, resolve(s["$ref"])):
        return False
    types = s.get("type", [])
    if types and not any(is_type(value, t) for t in ([types] if isinstance(types, str) else types)):
        return False
    if "enum" in s and not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in s["enum"]):
        return False
    if "const" in s and (value != s["const"] or isinstance(value, bool) != isinstance(s["const"], bool)):
        return False
    if "oneOf" in s and sum(fits(value, o) for o in s["oneOf"]) != 1:
        return False
    if "anyOf" in s and not any(fits(value, o) for o in s["anyOf"]):
        return False
    if "not" in s and fits(value, s["not"]):
        return False
    if isinstance(value, dict):
        known = s.get("properties", {})
        return (all(k in value for k in s.get("required", [])) and (s.get("additionalProperties", True) or all(k in known for k in value))
                and all(fits(v, known[k]) for k, v in value.items() if k in known))
    if isinstance(value, list):
        return s.get("minItems", 0) <= len(value) <= s.get("maxItems", 1 << 30) and all(fits(v, s.get("items", {})) for v in value)
    return scalar_fits(value, s)


REQUEST = {"$ref": "#/components/schemas/SampleRequest"}
EXAMPLES = sorted((ROOT / "proto/examples").glob("*.json"))
# Refused for what no schema says: the model at hand, or two fields together.
NEEDS_A_MODEL = {"range-class", "range-class-huge", "range-classes", "range-sde-steps", "range-guidance-channels-2", "range-guidance-interval",
                 "range-last-step-size-3", "range-seed-2", "range-model-2", "range-model-3", "range-knot-t", "range-knot-order"}
BAD = sorted(d for d in (ROOT / "tests/bad/request").iterdir() if d.name.split("-")[0] in ("type", "range", "unknown", "later", "body"))


def walk(node, where="#"):
    yield where, node
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []:
        yield from walk(child, f"{where}/{key}")


def test_json_is_generated_from_yaml():
    subprocess.run([sys.executable, str(ROOT / "tools/openapi.py"), "--check"], check=True)


def test_references_lead_somewhere():
    refs = [(where, node["$ref"]) for where, node in walk(SPEC) if isinstance(node, dict) and "$ref" in node]
    assert len(refs) > 40
    for where, ref in refs:
        assert resolve(ref), where


def test_operations_are_named_once_and_answer_something():
    operations = [op for path in SPEC["paths"].values() for op in path.values()]
    names = [op["operationId"] for op in operations]
    assert len(names) == len(set(names)) >= 10
    for op in operations:
        assert op["summary"] and {"200", "202"} & set(op["responses"]), op["operationId"]


def test_components_are_used():
    used = {node["$ref"] for _, node in walk(SPEC) if isinstance(node, dict) and "$ref" in node}
    for kind in ("schemas", "responses", "headers", "parameters", "examples"):
        for name in SPEC["components"][kind]:
            assert f"#/components/{kind}/{name}" in used, name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_fits(path):
    assert fits(json.loads(path.read_text(encoding="utf-8")), REQUEST)


@pytest.mark.parametrize("name", sorted(SPEC["components"]["examples"]))
def test_example_in_the_contract_is_the_file(name):
    assert SPEC["components"]["examples"][name]["value"] == json.loads((ROOT / f"proto/examples/{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", BAD, ids=lambda p: p.name)
def test_schema_refuses_what_the_codec_refuses(path):
    assert fits(json.loads((path / "input").read_bytes()), REQUEST) == (path.name in NEEDS_A_MODEL)


def test_schema_fields_are_the_codecs():
    """Field names of the schema against the table in request_parse.c."""
    table = re.findall(r'\{(NULL|"(\w+)"), "(\w+)", (read_\w+)', (ROOT / "proto/request_parse.c").read_text(encoding="utf-8"))
    ours = {(group, name) for _, group, name, read in table if read != "read_later"}
    schemas = SPEC["components"]["schemas"]
    theirs = {("", name) for name in schemas["SampleRequest"]["properties"]} - {("", "sampler"), ("", "guidance"), ("", "output")}
    for group in ("Sampler", "Guidance", "Output"):
        theirs |= {(group.lower(), name) for name in schemas[group]["properties"]}
    assert ours == theirs
