# SPDX-License-Identifier: MIT
"""Every path: what it answers, and what it refuses."""
import json
import re
import socket

import pytest

from conftest import JSON, ROOT, SHORT, Daemon

POSTS = ["/v1/samples"]
GETS = ["/v1/models", "/v1/capabilities", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready", "/metrics",
        "/openapi.json"]


@pytest.mark.parametrize("path", GETS)
def test_get(daemon, path):
    r = daemon.get(path)
    assert r.status == 200
    assert r.headers["Content-Type"].startswith("text/plain" if path == "/metrics" else "application/json")
    if path != "/metrics":
        r.json()


@pytest.mark.parametrize("path", GETS)
def test_head(daemon, path):
    r = daemon.request("HEAD", path)
    assert r.status == 200 and r.body == b"" and int(r.headers["Content-Length"]) > 0


@pytest.mark.parametrize("path", GETS + POSTS)
def test_wrong_method(daemon, path):
    for method in ["PUT", "DELETE", "PATCH", "GET" if path in POSTS else "POST"]:
        r = daemon.request(method, path, body=b"{}" if method != "GET" else None, headers=JSON)
        assert r.status == 405 and r.error["code"] == "method_not_allowed", (method, r.body)
        allow = {m.strip() for m in r.headers["Allow"].split(",")}
        assert allow == ({"POST", "OPTIONS"} if path in POSTS else {"GET", "HEAD", "OPTIONS"})


@pytest.mark.parametrize("path", GETS + POSTS)
def test_options(daemon, path):
    r = daemon.request("OPTIONS", path)
    assert r.status == 204 and "OPTIONS" in r.headers["Allow"]
    assert r.headers["Access-Control-Allow-Origin"] is None


@pytest.mark.parametrize("path", ["/nope", "/healthz%00", "/%00", "/v1", "/v1/", "/v1/samples/", "/v1/models/tiny/x", "//healthz", "/healthz/", "/v2/models//ready", "/%2e%2e/etc/passwd"])
def test_unknown_path(daemon, path):
    r = daemon.get(path)
    assert r.status == 404
    assert r.error["code"] == "not_found" and r.error["type"] == "not_found_error" and set(r.error) == {"message", "type", "param", "code"}


def test_models_are_openai_shaped(daemon):
    listing = daemon.get("/v1/models").json()
    assert listing["object"] == "list"
    (m,) = listing["data"]
    assert m["id"] == "tiny" and m["object"] == "model" and isinstance(m["created"], int) and m["owned_by"] == "sitd"
    assert m["version"] == 1000 and re.fullmatch("[0-9a-f]{64}", m["digest"])


def test_capabilities(daemon):
    c = daemon.get("/v1/capabilities").json()
    (m,) = c["models"]
    assert m["name"] == "tiny" and m["labels"][1] == ["one", "first"] and m["null_class"] is True
    assert c["limits"]["max_body_bytes"] == 64 << 10
    assert "heun" in c["samplers"]["ode"]["methods"] and "euler" in c["samplers"]["sde"]["methods"]


def test_contract_is_the_one_in_the_tree(daemon):
    r = daemon.get("/openapi.json")
    assert r.body == (ROOT / "proto" / "openapi.json").read_bytes()
    again = daemon.get("/openapi.json", **{"If-None-Match": r.headers["ETag"]})
    assert again.status == 304 and again.body == b""


def test_every_path_of_the_contract_exists(daemon):
    for path, methods in json.loads((ROOT / "proto" / "openapi.json").read_bytes())["paths"].items():
        if path == "/" and daemon.get("/").status == 404:
            continue  # a build without the page
        for method in methods:
            if method in ("get", "post"):
                r = daemon.request(method.upper(), path.replace("{model}", "tiny"), body=b"{}" if method == "post" else None, headers=JSON)
                assert r.status in (200, 202, 422) and str(r.status) in methods[method]["responses"], (method, path, r.status)


def test_unknown_model_is_not_ready(daemon):
    r = daemon.get("/v2/models/other/ready")
    assert r.status == 404 and r.error["param"] == "model"


def test_request_id_is_echoed_or_made(daemon):
    assert daemon.get("/healthz", **{"X-Request-Id": "abc-1.2:3/4"}).headers["X-Request-Id"] == "abc-1.2:3/4"
    made = daemon.get("/healthz").headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", made) and made != daemon.get("/healthz").headers["X-Request-Id"]
    for bad in ["a b", 'a"b', "x" * 129, "\x7f", "é"]:
        assert re.fullmatch("[0-9a-f]{32}", daemon.get("/healthz", **{"X-Request-Id": bad.encode("utf-8").decode("latin-1")}).headers["X-Request-Id"])


def test_request_id_in_errors_and_the_answer(daemon):
    r = daemon.sample(SHORT, headers={"X-Request-Id": "mine"})
    assert r.headers["X-Request-Id"] == "mine" and r.json()["id"] == "mine"
    assert daemon.sample(b"{", headers={"X-Request-Id": "bad"}).headers["X-Request-Id"] == "bad"


def test_access_log(daemon):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    daemon.sample(SHORT, headers={"X-Request-Id": "log-1", "traceparent": trace})
    daemon.wait_until(lambda: daemon.logged("log-1"))
    (line,) = daemon.logged("log-1")
    assert line["route"] == "/v1/samples" and line["code"] == 200 and line["model"] == "tiny" and line["images"] == 1 and line["traceparent"] == trace
    assert {"receive_ms", "queue_ms", "denoise_ms", "decode_ms", "encode_ms", "total_ms"} <= set(line)
    assert line["total_ms"] >= line["denoise_ms"] > 0


@pytest.mark.parametrize("path,logged", [
    (b"/%ff%fe%80x", "/\ufffd\ufffd\ufffdx"), (b"/\xff", "/\ufffd"), (b"/%ed%a0%80", "/\ufffd\ufffd\ufffd"), (b"/%c3%a9%f0%9f%98%80", "/\u00e9\U0001f600"),
    (b"/%22%5c%0a%1b%7f", '/"\\\n\x1b\x7f'), (b"/" + b"a" * 9000, "/" + "a" * 1022 + "\u2026"), (b"/" + b"%c3%a9" * 2000, "/" + "\u00e9" * 511 + "\u2026")],
    ids=["bytes", "raw", "surrogate", "utf8", "controls", "long", "long-utf8"])
def test_hostile_path_in_the_log(daemon, path, logged):
    """Whatever a path holds, its line is JSON in UTF-8 and has its other fields."""
    with daemon.socket() as s:
        s.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nX-Request-Id: path-%d\r\nConnection: close\r\n\r\n" % len(logged))
        assert s.recv(4096).startswith(b"HTTP/1.1 404 ")
    daemon.wait_until(lambda: daemon.logged(f"path-{len(logged)}"))
    line = daemon.logged(f"path-{len(logged)}")[-1]
    assert line["path"] == logged and line["total_ms"] >= 0 and line["code"] == 404


def test_keep_alive(daemon):
    c = daemon.connection()
    for _ in range(3):
        c.request("POST", "/v1/samples", body=json.dumps(SHORT), headers=JSON)
        r = c.getresponse()
        assert r.status == 200 and r.headers["Connection"] != "close"
        r.read()
        c.request("POST", "/v1/samples", body=b"{", headers=JSON)  # an error keeps the connection too
        r = c.getresponse()
        assert r.status == 400
        r.read()
    c.close()


def test_refused_before_the_body_keeps_the_connection(daemon):
    c = daemon.connection()
    for headers, body, code in [({"Content-Type": "text/plain"}, b"x" * 1000, 415), (JSON, b" " * 200000, 413), (JSON, json.dumps(SHORT).encode(), 200)]:
        c.request("POST", "/v1/samples", body=body, headers=headers)
        r = c.getresponse()
        assert r.status == code
        r.read()
    c.close()


def test_pipelined_requests(daemon):
    body = json.dumps(SHORT).encode()
    one = b"POST /v1/samples HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with daemon.socket() as s:
        s.sendall(one + one + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        text = b""
        while chunk := s.recv(65536):
            text += chunk
    assert text.count(b"HTTP/1.1 200 OK") == 3 and text.endswith(b'{"status":"live"}')


def test_http_1_0(daemon):
    with daemon.socket() as s:
        s.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        text = b""
        while chunk := s.recv(65536):
            text += chunk
    assert b" 200 OK" in text and text.endswith(b'{"status":"live"}')


def test_metrics(daemon):
    daemon.sample(SHORT)
    daemon.idle()
    text = daemon.get("/metrics").body.decode()
    m = daemon.metrics()
    for name in ["requests_total", "images_total", "queue_depth", "queue_wait_seconds", "rows_running", "batch_rows", "steps_total",
                 "model_evaluations_total", "residual_overflows_total", "request_duration_seconds", "phase_duration_seconds", "rejected_total", "cancelled_total",
                 "model_reloads_total", "model_info", "device_memory_bytes", "draining", "build_info"]:
        assert f"# TYPE sitd_{name} " in text and f"# HELP sitd_{name} " in text, name
    families = re.findall(r"^# TYPE (\S+)", text, re.M)
    assert len(families) == len(set(families))
    assert m['sitd_requests_total{route="/v1/samples",code="200"}'] >= 1
    assert m['sitd_images_total{model="tiny",outcome="done"}'] >= 1
    assert m["sitd_ready"] == 1 and m["sitd_draining"] == 0 and m["sitd_rows_running"] == 0 and m["sitd_device_ok"] == 1
    assert m['sitd_model_reloads_total{result="succeeded"}'] == 1
    buckets = [v for k, v in m.items() if k.startswith('sitd_request_duration_seconds_bucket{route="/v1/samples"')]
    assert buckets == sorted(buckets) and buckets[-1] == m['sitd_request_duration_seconds_count{route="/v1/samples"}']
    assert m["sitd_batch_rows_sum"] == m["sitd_model_evaluations_total"] and m['sitd_batch_rows_bucket{le="+Inf"}'] == m["sitd_batch_rows_count"]
    assert m["process_resident_memory_bytes"] > 1 << 20 and m["process_open_fds"] > 5 and m["process_cpu_seconds_total"] > 0


def test_evaluations_are_counted(daemon):
    before = daemon.metric("sitd_model_evaluations_total"), daemon.metric('sitd_steps_total{sampler="ode"}')
    r = daemon.sample({"class": 1, "n": 2, "guidance": {"scale": 2}, "sampler": {"type": "ode", "method": "euler", "steps": 5}})
    assert r.json()["evaluations"] == 10
    assert daemon.metric("sitd_model_evaluations_total") - before[0] == 20  # two rows each
    assert daemon.metric('sitd_steps_total{sampler="ode"}') - before[1] == 10


@pytest.mark.parametrize("header,code", [("x" * 17000, 431), ("x" * 100000, 431)])
def test_head_too_large(daemon, header, code):
    with daemon.socket() as s:
        try:
            s.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Big: " + header.encode() + b"\r\n\r\n")
        except OSError:
            pass
        assert s.recv(4096).startswith(b"HTTP/1.1 %d " % code)


@pytest.mark.parametrize("garbage", [b"\x00" * 100, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n",
                                     b"POST /v1/samples HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
                                     b"POST /v1/samples HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
                                     b"POST /v1/samples HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"])
def test_garbage(daemon, garbage):
    with daemon.socket(10) as s:
        s.sendall(garbage)
        s.shutdown(socket.SHUT_WR)
        while s.recv(65536):
            pass
    assert daemon.get("/healthz").status == 200


@pytest.mark.parametrize("framing", ["Content-Length: 4\r\nTransfer-Encoding: chunked", "Content-Length: 4\r\nContent-Length: 44", "Transfer-Encoding: gzip, chunked",
                                     "Transfer-Encoding: identity\r\nContent-Length: 4", "Transfer-Encoding: xchunked"])
def test_ambiguous_length(daemon, framing):
    """Such a request is refused and its connection closed, so that nothing behind it is taken for another request."""
    with daemon.socket(5) as s:
        s.sendall(b"POST /v1/samples HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + framing.encode()
                  + b"\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\nX-Request-Id: smuggled\r\n\r\n")
        text = b""
        while chunk := s.recv(65536):
            text += chunk
    assert text.startswith(b"HTTP/1.1 400 ") and text.count(b"HTTP/1.1") == 1 and b"invalid_framing" in text and b"Connection: close" in text
    assert not daemon.logged("smuggled")


def test_cors_only_for_the_named_origin(start):
    d = start("--cors-origin", "https://a.example")
    preflight = d.request("OPTIONS", "/v1/samples", headers={"Origin": "https://a.example", "Access-Control-Request-Method": "POST"})
    assert preflight.status == 204 and preflight.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "Content-Type" in preflight.headers["Access-Control-Allow-Headers"]
    r = d.sample(SHORT, headers={"Origin": "https://a.example"})
    assert r.headers["Access-Control-Allow-Origin"] == "https://a.example" and "X-Seed" in r.headers["Access-Control-Expose-Headers"]
    assert d.sample(SHORT, headers={"Origin": "https://b.example"}).headers["Access-Control-Allow-Origin"] is None


def test_ipv6(start):
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no ::1 here")
    d = start(listen="[::1]:0")
    assert d.first_line == f"listening on http://[::1]:{d.port}\n" and d.get("/healthz").status == 200


def test_unix_socket(start, tmp_path):
    path = tmp_path / "s.sock"
    for _ in range(2):  # the second start replaces nothing, as the first removed its file
        d = start(listen=f"unix:{path}", ready=False)
        assert d.first_line == f"listening on unix:{path}\n"
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(path))
            s.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            text = b""
            while chunk := s.recv(65536):
                text += chunk
            assert text.endswith(b'{"status":"live"}')
        d.process.kill() if _ == 0 else None  # leaves a stale file behind
        d.process.wait() if _ == 0 else None
        if _ == 0:
            assert path.exists()
        else:
            assert d.stop() == 0 and not path.exists()
