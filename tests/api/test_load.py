# SPDX-License-Identifier: MIT
"""Load: unlike clients at once, and what the loop costs. The printed numbers are for people (pytest -s); the limits are wide."""
import random
import statistics
import threading
import time

import pytest

from conftest import LONG, SCALE, SHORT
from test_same_bytes import crowd_request


def percentile(values, p):
    return sorted(values)[min(len(values) - 1, int(len(values) * p / 100))]


def test_32_mixed_clients(daemon):
    """Each asks for all kinds of things for a while, some leave; every answer is a right one."""
    end, wrong, served = time.monotonic() + 6, [], [0]

    def client(i):
        rng = random.Random(i)
        while time.monotonic() < end:
            try:
                dice = rng.random()
                if dice < 0.1:
                    expected, r = 422, daemon.sample({**SHORT, "class": 99})
                elif dice < 0.2:
                    expected, r = 400, daemon.sample(b'{"class":')
                elif dice < 0.3:
                    expected, r = 200, daemon.get(rng.choice(["/metrics", "/healthz", "/readyz", "/v1/models", "/v1/capabilities", "/openapi.json"]))
                elif dice < 0.35:
                    expected, r = 504, daemon.sample({**LONG, "timeout_ms": 50})
                elif dice < 0.4:
                    s = daemon.socket()
                    s.sendall(b"POST /v1/samples HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 400\r\n\r\n{")
                    s.close()
                    continue
                else:
                    expected, r = 200, daemon.sample(crowd_request(rng), accept=rng.choice([None, "multipart/mixed", "application/json"]))
                served[0] += 1
                if r.status != expected and r.status != 503:
                    wrong.append((expected, r.status, r.body[:300]))
            except OSError as e:
                wrong.append(e)
    threads = [threading.Thread(target=client, args=(i,)) for i in range(32)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    daemon.idle(20)
    print(f"\n32 mixed clients: {served[0]} answers in 6 s")
    assert not wrong and served[0] > 60 / SCALE
    daemon.wait_until(lambda: daemon.metric("sitd_requests_active") == 1)


@pytest.mark.full
def test_health_stays_quick_under_load(daemon):
    stop = threading.Event()

    def client(i):
        rng = random.Random(100 + i)
        while not stop.is_set():
            daemon.sample(crowd_request(rng))
    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    c, times = daemon.connection(), []
    time.sleep(0.3)
    for _ in range(600):
        began = time.perf_counter()
        c.request("GET", "/healthz")
        c.getresponse().read()
        times.append((time.perf_counter() - began) * 1000)
        time.sleep(0.003)
    c.close()
    stop.set()
    for t in threads:
        t.join()
    print(f"\n/healthz under load, ms: p50 {statistics.median(times):.2f} p99 {percentile(times, 99):.2f} max {max(times):.2f} (this client shares the cores)")
    assert percentile(times, 99) < 100


@pytest.mark.full
def test_overhead(daemon):
    """Request time less engine time, from the daemon's own log: what HTTP, JSON, encoding and the loop add."""
    ids = [f"overhead-{i}" for i in range(300)]
    for name in ids:
        assert daemon.sample({**SHORT, "output": {"format": "png"}}, accept="image/png", headers={"X-Request-Id": name}).status == 200
    daemon.wait_until(lambda: daemon.logged(ids[-1]))
    lines = [daemon.logged(i)[0] for i in ids]
    extra = [x["total_ms"] - x["queue_ms"] - x["denoise_ms"] - x["decode_ms"] for x in lines]
    print(f"\nrequest less engine, ms: p50 {statistics.median(extra):.2f} p99 {percentile(extra, 99):.2f} max {max(extra):.2f}")
    assert percentile(extra, 99) < 100


@pytest.mark.full
def test_memory_does_not_grow(daemon):
    def rss():
        return daemon.metric("process_resident_memory_bytes")

    def burst(n):
        for i in range(n):
            daemon.sample({**SHORT, "n": 1 + i % 8})
            daemon.sample({**LONG, "timeout_ms": 5}) if i % 20 == 0 else daemon.sample(b"{")
    burst(150)
    before, files = rss(), daemon.metric("process_open_fds")
    burst(400)
    daemon.idle()
    assert rss() - before < 4 << 20 and daemon.metric("process_open_fds") <= files + 1
