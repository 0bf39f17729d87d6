# SPDX-License-Identifier: MIT
"""POST /v1/samples: forms of the answer, its facts, and every refusal."""
import base64
import email.parser
import hashlib
import json
import struct
import zlib

import pytest

from conftest import JSON, LONG, ROOT, SHORT


def chunks(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at:at + 8])
        data = png[at + 8:at + 8 + size]
        assert zlib.crc32(kind + data) == struct.unpack(">I", png[at + 8 + size:at + 12 + size])[0]
        yield kind, data
        at += 12 + size


def texts(png):
    out = {}
    for kind, data in chunks(png):
        if kind == b"iTXt":
            key, rest = data.split(b"\0", 1)
            packed, rest = rest[0], rest[2:]
            value = rest.split(b"\0", 2)[2]
            out[key.decode()] = (zlib.decompress(value) if packed else value).decode()
    return out


def pixels(png):
    """Unfilters 8-bit grey or RGB."""
    width, height, depth, colour = struct.unpack(">IIBB", dict(chunks(png))[b"IHDR"][:10])
    assert depth == 8 and colour in (0, 2)
    bpp = 1 if colour == 0 else 3
    raw = zlib.decompress(b"".join(d for k, d in chunks(png) if k == b"IDAT"))
    out, above, stride = bytearray(), bytearray(width * bpp), width * bpp
    for y in range(height):
        kind, line = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1:(y + 1) * (stride + 1)])
        for i in range(stride):
            a, b, c = line[i - bpp] if i >= bpp else 0, above[i], above[i - bpp] if i >= bpp else 0
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            line[i] = (line[i] + (0, a, b, (a + b) // 2, paeth)[kind]) & 255
        out += line
        above = line
    return bytes(out)


def test_json(daemon):
    r = daemon.sample({"classes": [1, "four", "first", None], "seed": 7, "seed_index": 5, "guidance": {"scale": 2}, "sampler": {"type": "ode", "steps": 4}})
    assert r.status == 200 and r.headers["Content-Type"] == "application/json"
    a = r.json()
    assert set(a) == {"id", "created", "model", "version", "digest", "seed", "evaluations", "notes", "timings_ms", "data"}
    assert a["model"] == "tiny" and a["version"] == 1000 and a["seed"] == 7 and set(a["timings_ms"]) == {"queue", "denoise", "decode", "encode"}
    assert [d["class"] for d in a["data"]] == [1, 4, 1, None] and [d["label"] for d in a["data"]] == ["one", "four", "one", None]
    assert [d["seed_index"] for d in a["data"]] == [5, 6, 7, 8]
    assert r.headers["X-Seed"] == "7" and r.headers["X-Model-Version"] == "1000" and r.headers["X-Model-Digest"] == a["digest"]
    assert all(f"{p};dur=" in r.headers["Server-Timing"] for p in ("queue", "denoise", "decode", "encode"))
    for d in a["data"]:
        assert hashlib.sha256(pixels(base64.b64decode(d["b64_json"]))).hexdigest() == d["pixels_sha256"]


def test_png_carries_what_made_it(daemon):
    r = daemon.sample({**SHORT, "class": "one"}, accept="image/png")
    assert r.status == 200 and r.headers["Content-Type"] == "image/png"
    t = texts(r.body)
    request = json.loads(t["sitd-request"])
    assert request["seed"] == 1 and request["classes"] == [1] and request["sampler"]["steps"] == 3 and "n" not in request
    assert t["sitd-pixels-sha256"] == hashlib.sha256(pixels(r.body)).hexdigest()
    assert len(t["sitd-weights"]) == 64
    again = daemon.sample(request, accept="image/png")
    assert again.status == 200 and again.body == r.body  # what it carries makes it again


def test_multipart(daemon):
    r = daemon.sample({**SHORT, "n": 3}, accept="multipart/mixed")
    assert r.status == 200 and r.headers["Content-Type"].startswith("multipart/mixed; boundary=")
    message = email.parser.BytesParser().parsebytes(b"Content-Type: " + r.headers["Content-Type"].encode() + b"\r\n\r\n" + r.body)
    parts = message.get_payload()
    assert [p.get_content_type() for p in parts] == ["application/json"] + ["image/png"] * 3
    facts = json.loads(parts[0].get_payload(decode=True))
    for d, p in zip(facts["data"], parts[1:]):
        png = p.get_payload(decode=True)
        assert d["pixels_sha256"] == hashlib.sha256(pixels(png)).hexdigest() and d["b64_json"] is None
        assert int(p["Content-Length"]) == len(png)


@pytest.mark.parametrize("accept,n,kind", [
    (None, 1, "application/json"), ("*/*", 1, "application/json"), ("image/*", 1, "image/png"), ("image/png", 1, "image/png"),
    ("image/png, application/json", 1, "image/png"), ("image/png, application/json", 2, "application/json"),
    ("image/png;q=0.5, application/json;q=0.9", 1, "application/json"), ("image/png, */*;q=0.1", 2, "application/json"),
    ("IMAGE/PNG", 1, "image/png"), ("text/html, multipart/mixed", 2, "multipart/mixed"), ("application/json;q=0, */*", 1, "image/png"),
    ("image/png", 2, 406), ("image/*", 2, 406), ("text/html", 1, 406), ("application/json;q=0", 2, 406), ("application/*", 1, "application/json")])
def test_negotiation(daemon, accept, n, kind):
    r = daemon.sample({**SHORT, "n": n}, accept=accept)
    if kind == 406:
        assert r.status == 406 and r.error["code"] == "not_acceptable"
    else:
        assert r.status == 200 and r.headers["Content-Type"].startswith(kind)


def test_two_accept_headers(daemon):
    c = daemon.connection()
    c.putrequest("POST", "/v1/samples")
    body = json.dumps(SHORT).encode()
    for k, v in [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Accept", "text/html"), ("Accept", "image/png")]:
        c.putheader(k, v)
    c.endheaders(body)
    r = c.getresponse()
    assert r.status == 200 and r.headers["Content-Type"] == "image/png"
    c.close()


@pytest.mark.parametrize("content_type,code", [
    ("application/json", 200), ("application/json; charset=utf-8", 200), ('Application/JSON;charset="UTF-8"', 200), ("application/json; charset=latin1", 415),
    ("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("application/jsonp", 415), (None, 415)])
def test_content_type(daemon, content_type, code):
    r = daemon.request("POST", "/v1/samples", body=json.dumps(SHORT), headers={"Content-Type": content_type} if content_type else {})
    assert r.status == code


def test_content_encoding(daemon):
    r = daemon.sample(zlib.compress(json.dumps(SHORT).encode()), headers={"Content-Encoding": "deflate"})
    assert r.status == 415


@pytest.mark.parametrize("body,where", [
    (b"{", "line 1"), (b"", "empty"), (b'{"class":1,\n "seed":}', "line 2"), (b'{"class":1,"class":2}', "class"), (b'{"class":1}x', "column"),
    (b'{"class":1e999}', "line 1"), (b'{"seed":99999999999999999999}', "line 1"), (b"[" * 5000, "column"), (b'{"class":"\xff"}', "line 1"), (b"\0\0", "line 1")])
def test_not_json(daemon, body, where):
    r = daemon.sample(body)
    assert r.status == 400 and r.error["type"] == "invalid_request_error" and where in r.error["message"], r.body


@pytest.mark.parametrize("change,param", [
    ({"clas": 1}, "clas"), ({"class": 10}, "class"), ({"class": "nine hundred"}, "class"), ({"class": "shared"}, "class"), ({"n": 0}, "n"),
    ({"n": 100000}, "n"), ({"seed": -1}, "seed"), ({"sampler": {"type": "ode", "steps": 0}}, "sampler.steps"),
    ({"sampler": {"type": "ode", "w_t": "sigma"}}, "sampler.w_t"), ({"sampler": {"type": "xyz"}}, "sampler.type"),
    ({"guidance": {"scale": -1}}, "guidance.scale"), ({"output": {"format": "gif"}}, "output.format"), ({"timeout_ms": 0}, "timeout_ms"),
    ({"timeout_ms": 3600001}, "timeout_ms"), ({"classes": [1]}, None)])
def test_wrong_value(daemon, change, param):
    r = daemon.sample({**SHORT, **change})
    assert r.status == 422 and r.error["message"], r.body
    if param:
        assert r.error["param"] == param


def test_many_values_are_refused_unparsed(daemon):
    r = daemon.sample(b'{"classes":[' + b"[]," * 10000 + b"1]}")
    assert r.status == 400 and r.error["code"] == "json_too_long"


def test_query_is_not_ignored(daemon):
    r = daemon.request("POST", "/v1/samples?seed=5&n=2", body=json.dumps(SHORT), headers=JSON)
    assert r.status == 422 and r.error["param"] in ("seed", "n") and "body" in r.error["message"]


def test_missing_class(daemon):
    r = daemon.sample({"seed": 1})
    assert r.status == 422 and "class" in r.error["message"]


def test_examples_of_the_contract(daemon):
    for file in sorted((ROOT / "proto" / "examples").glob("*.json")):
        request = json.loads(file.read_text())
        request = request.get("request", request)
        if isinstance(request, dict) and request.get("model", "tiny").startswith("tiny"):
            assert daemon.sample(request).status in (200, 422), file.name


def test_unknown_model(daemon):
    r = daemon.sample({**SHORT, "model": "tiney"})
    assert r.status == 404 and r.error["param"] == "model" and r.error["code"] == "model_not_found" and "tiny" in r.error["message"]


def test_model_version_and_digest(daemon):
    digest = daemon.get("/v1/models").json()["data"][0]["digest"]
    for name, code in [("tiny", 200), ("tiny@1000", 200), (f"tiny@{digest[:12]}", 200), ("tiny@999", 404), ("tiny@ffffffffffff", 404)]:
        assert daemon.sample({**SHORT, "model": name}).status == code, name


def test_two_models(start, two_models):
    d = start(models_dir=two_models)
    r = d.sample(SHORT)
    assert r.status == 422 and r.error["param"] == "model"
    assert {m["id"] for m in d.get("/v1/models").json()["data"]} == {"alpha", "beta"}
    assert d.sample({**SHORT, "model": "beta"}).json()["version"] == 2000
    png = d.sample({**SHORT, "model": "alpha"}, accept="image/png").body
    assert struct.unpack(">IIBB", dict(chunks(png))[b"IHDR"][:10]) == (16, 16, 8, 2)


def test_body_too_large(daemon):
    for body in (b" " * 65537, b" " * (1 << 20)):
        r = daemon.sample(body)
        assert r.status == 413 and r.error["code"] == "body_too_large"
    assert daemon.sample(b" " * 65000 + json.dumps(SHORT).encode()).status == 200


def test_chunked_body(daemon):
    def pieces(n):
        yield from (b" " * 1000 for _ in range(n))
        yield json.dumps(SHORT).encode()
    for n, code in [(0, 200), (60, 200), (70, 413), (1000, 413)]:
        c = daemon.connection()
        c.request("POST", "/v1/samples", body=pieces(n), headers=JSON, encode_chunked=True)
        assert c.getresponse().status == code
        c.close()


def test_huge_chunked_body_is_not_read_for_ever(daemon):
    with daemon.socket() as s:
        s.sendall(b"POST /v1/samples HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent, text = 0, b""
        try:
            while sent < 64 << 20:
                s.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
                sent += 65536
        except OSError:
            pass
        assert sent < 32 << 20


def test_expect_continue(daemon):
    head = b"POST /v1/samples HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
    body = json.dumps(SHORT).encode()
    with daemon.socket() as s:
        s.sendall(head % (b"application/json", len(body)))
        assert s.recv(4096).startswith(b"HTTP/1.1 100 ")
        s.sendall(body)
        assert s.recv(4096).startswith(b"HTTP/1.1 200 ")
    with daemon.socket() as s:  # refused without the body being sent
        s.sendall(head % (b"application/json", 1 << 30))
        assert s.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_seed_is_drawn_and_echoed(daemon):
    request = {k: v for k, v in SHORT.items() if k != "seed"}
    a, b = daemon.sample(request), daemon.sample(request)
    assert a.json()["seed"] != b.json()["seed"] and a.headers["X-Seed"] == str(a.json()["seed"]) and a.json()["seed"] < 1 << 53
    again = daemon.sample({**request, "seed": a.json()["seed"]})
    assert again.json()["data"] == a.json()["data"]
    big = daemon.sample({**request, "seed": "18446744073709551615"})
    assert big.headers["X-Seed"] == "18446744073709551615" and big.json()["seed"] == "18446744073709551615"


def test_many_images_come_in_order(daemon):
    # dopri5 takes as many steps as an image needs, so they do not come out of the engine in order
    request = {"classes": [i % 10 for i in range(40)], "seed": 3, "sampler": {"type": "ode", "method": "dopri5", "atol": 1e-4, "rtol": 1e-3}}
    many = daemon.sample(request).json()["data"]
    assert [d["seed_index"] for d in many] == list(range(40))
    for i in (0, 17, 39):  # each is the image that it would be alone
        (one,) = daemon.sample({**request, "classes": [i % 10], "seed_index": i}).json()["data"]
        assert one == many[i]


def test_deadline_while_running(daemon):
    before = daemon.metrics()
    r = daemon.sample({**LONG, "n": 4, "timeout_ms": 300})
    assert r.status == 504 and r.error["type"] == "timeout_error", r.body
    daemon.idle(5)
    key = 'sitd_images_total{model="tiny",outcome="cancelled"}'
    assert daemon.metrics()[key] - before.get(key, 0) == 4


def test_default_timeout(start):
    d = start("--default-timeout", "200ms", "--max-timeout", "1h")
    assert d.sample(LONG).status == 504
    assert d.sample({**SHORT, "timeout_ms": 60000}).status == 200
