# SPDX-License-Identifier: MIT
"""Clients that leave, at every stage, and clients that dawdle. Afterwards nothing of theirs may be left in the engine."""
import json
import resource
import socket
import struct
import threading
import time

import pytest

from conftest import JSON, LONG, SCALE, SHORT


def raw_request(request, accept="application/json"):
    body = json.dumps(request).encode()
    return (b"POST /v1/samples HTTP/1.1\r\nHost: x\r\nX-Request-Id: %s\r\nAccept: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (str(time.monotonic_ns()).encode(), accept.encode(), len(body))) + body


def leave(s, how):
    if how == "reset":
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()


def running(d):
    return d.metric("sitd_rows_running") > 0


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("sent", ["nothing", "mid request line", "mid head", "mid body", "whole, at once"])
def test_leaves_early(daemon, how, sent):
    whole = raw_request(LONG)
    cut = {"nothing": 0, "mid request line": 7, "mid head": 60, "mid body": len(whole) - 10, "whole, at once": len(whole)}[sent]
    for _ in range(3):
        s = daemon.socket()
        s.sendall(whole[:cut])
        leave(s, how)
    daemon.wait_until(lambda: daemon.metric("sitd_connections") <= 1, 5, "closed connections")
    daemon.idle()


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_leaves_while_running(daemon, how):
    before = daemon.metric('sitd_cancelled_total{stage="running"}')
    s = daemon.socket()
    whole = raw_request({**LONG, "n": 4})
    s.sendall(whole)
    daemon.wait_until(lambda: running(daemon), 5, "a running job")
    time.sleep(0.1)
    left = time.monotonic()
    s.shutdown(socket.SHUT_WR) if how == "half-close" else leave(s, how)
    daemon.idle()
    assert time.monotonic() - left < 1.5 * SCALE  # the rows are free at the next step, not when the job would have ended
    assert daemon.metric('sitd_cancelled_total{stage="running"}') == before + 1
    s.close()
    request_id = whole.split(b"X-Request-Id: ")[1].split(b"\r\n")[0].decode()
    daemon.wait_until(lambda: daemon.logged(request_id))
    assert daemon.logged(request_id)[0]["code"] == 499


def test_leaves_with_more_requests_behind(daemon):
    """Bytes that wait behind a request must not hide that its client has gone."""
    s = daemon.socket()
    s.sendall(raw_request(LONG) + raw_request(LONG))
    daemon.wait_until(lambda: running(daemon))
    s.close()
    daemon.idle()


def test_leaves_while_queued(start):
    d = start("--max-rows", "2")
    blocker = d.socket()
    blocker.sendall(raw_request({**LONG, "n": 2}))
    d.wait_until(lambda: running(d))
    waiting = [d.socket() for _ in range(5)]
    for s in waiting:
        s.sendall(raw_request(LONG))
    d.wait_until(lambda: d.metric("sitd_queue_depth") == 5)
    for s in waiting:
        s.close()
    d.wait_until(lambda: d.metric("sitd_queue_depth") == 0)
    assert d.metric('sitd_cancelled_total{stage="queued"}') == 5 and running(d)
    blocker.close()
    d.idle()


def test_leaves_mid_answer(daemon):
    """A large answer whose reader goes away after the first bytes."""
    request = {"classes": [1] * 200, "seed": 1, "sampler": {"type": "ode", "method": "euler", "steps": 1}}
    for how in ("close", "reset"):
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        s.settimeout(20 * SCALE)
        s.connect((daemon.host, daemon.port))
        s.sendall(raw_request(request))
        assert s.recv(100).startswith(b"HTTP/1.1 200")
        leave(s, how)
    daemon.idle()
    daemon.wait_until(lambda: daemon.metric("sitd_requests_active") == 1)  # the one that asks


def test_one_leaves_others_stay(daemon):
    """Batch mates of a client that leaves are served, with the bytes that they would have alone."""
    request = {"class": 2, "seed": 5, "sampler": {"type": "ode", "method": "heun", "steps": 400}}
    alone = daemon.sample(request).json()["data"]
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(daemon.sample(request))) for _ in range(3)]
    leavers = [daemon.socket() for _ in range(4)]
    for s in leavers:
        s.sendall(raw_request(LONG))
    for t in threads:
        t.start()
    daemon.wait_until(lambda: running(daemon))
    for s in leavers:
        s.close()
    for t in threads:
        t.join(60 * SCALE)
    assert [a.status for a in answers] == [200] * 3 and all(a.json()["data"] == alone for a in answers)


def receive_all(s):
    text = b""
    try:
        while chunk := s.recv(65536):
            text += chunk
    except ConnectionResetError:
        pass
    return text


@pytest.mark.parametrize("part", ["head", "body", "second head"])
def test_slow_sender(start, part):
    d = start("--request-timeout", "600ms", "--idle-timeout", "1s")
    whole = raw_request(SHORT)
    with d.socket() as s:
        if part == "second head":
            s.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert s.recv(4096).startswith(b"HTTP/1.1 200")
        sent = whole[:-40] if part == "body" else b"POST /v1/sam"
        s.sendall(sent)
        began, text = time.monotonic(), b""
        s.settimeout(0.15)
        while time.monotonic() - began < 8 * SCALE:  # one byte at a time keeps a plain inactivity timeout happy
            try:
                s.sendall(b"{" if part == "body" else b"x")
                text = s.recv(65536)
                break
            except (socket.timeout, BrokenPipeError, ConnectionResetError):
                continue
        took = time.monotonic() - began
        assert text.startswith(b"HTTP/1.1 408 "), (text, took)
        assert json.loads(text.split(b"\r\n\r\n")[1])["error"]["code"] == "request_timeout"
        assert took < (2.5 if part == "second head" else 1.5) * SCALE
    d.wait_until(lambda: d.metric("sitd_connections") == 1)
    assert d.metric('sitd_rejected_total{reason="slow"}') == 1


def test_silent_connections_are_closed(start):
    d = start("--request-timeout", "500ms", "--idle-timeout", "1s")
    with d.socket() as fresh, d.socket() as idle:
        idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(4096).startswith(b"HTTP/1.1 200")
        idle.settimeout(5 * SCALE)
        fresh.settimeout(5 * SCALE)
        receive_all(fresh)
        assert receive_all(idle) == b""
    d.wait_until(lambda: d.metric("sitd_connections") == 1)


def test_slow_reader(start):
    """An answer that is not fetched does not stay for ever, and disturbs nobody meanwhile."""
    d = start("--idle-timeout", "1s")
    request = {"classes": [1] * 1000, "seed": 1, "sampler": {"type": "ode", "method": "euler", "steps": 1}}
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    s.connect((d.host, d.port))
    s.sendall(raw_request(request))
    d.wait_until(lambda: d.metrics().get('sitd_images_total{model="tiny",outcome="done"}') == 1000, 20)
    assert d.sample(SHORT).status == 200
    d.wait_until(lambda: d.metric("sitd_requests_active") == 1, 5)
    s.close()


def test_connection_limit(start):
    d = start("--max-connections", "8", "--request-timeout", "700ms", "--idle-timeout", "1s")
    hogs = [d.socket() for _ in range(20)]
    for s in hogs:
        s.sendall(b"POST /v1/samples HTTP/1.1\r\nHost: x\r\n")
    assert d.request("GET", "/healthz", timeout=10).status == 200  # hogs are thrown out in their turn, then it is ours
    for s in hogs:
        s.close()


def test_descriptors_run_out(start):
    """The system's limit, not ours, stops accept(): who waits in the kernel is taken when others have gone."""
    d = start()
    _, hard = resource.prlimit(d.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(d.process.pid, resource.RLIMIT_NOFILE, (int(d.metric("process_open_fds")) + 10, hard))
    hogs = [d.socket() for _ in range(30)]
    time.sleep(0.2)
    for s in hogs:
        s.close()
    assert d.request("GET", "/healthz", timeout=5).status == 200


def test_descriptors_suffice_for_the_connections(start):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(128, hard), hard))  # what the daemon inherits
    try:
        d = start("--max-connections", "200")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert d.metric("process_max_fds") >= 200 + 64


def test_queue_full(start):
    d = start("--max-rows", "2", "--max-jobs", "4", "--max-images", "100")
    hogs = [d.socket() for _ in range(4)]
    for s in hogs:
        s.sendall(raw_request(LONG))
    d.wait_until(lambda: d.metric("sitd_jobs") == 4)
    r = d.sample(SHORT)
    assert r.status == 503 and r.error["code"] == "queue_full"
    assert 1 <= int(r.headers["Retry-After"]) < 3600 * SCALE ** 2  # hours of work for a sanitized build
    assert d.metric('sitd_rejected_total{reason="queue_full"}') == 1
    for s in hogs:
        s.close()
    d.idle()
    assert d.sample(SHORT).status == 200
    assert d.sample({**SHORT, "n": 101}).status == 422  # would never fit


def test_many_come_and_go(daemon):
    """A crowd that connects, asks and leaves at random leaves nothing behind."""
    rng_stop = time.monotonic() + 3
    failures = []

    def visitor(i):
        step = 0
        while time.monotonic() < rng_stop:
            step += 1
            try:
                s = daemon.socket()
                whole = raw_request(LONG if (i + step) % 3 else SHORT)
                s.sendall(whole[:(i * 37 + step * 101) % (len(whole) + 60)])
                time.sleep(((i * 7 + step * 13) % 10) * 0.02)
                leave(s, "reset" if (i + step) % 2 else "close")
            except OSError as e:
                failures.append(e)
    threads = [threading.Thread(target=visitor, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    daemon.idle(10)
    daemon.wait_until(lambda: daemon.metric("sitd_connections") <= 1)
    assert daemon.metric("sitd_requests_active") == 1
