#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""The daemon under load, on this machine: rows/s of 32 mixed clients against the engine's own and against the same requests one after another, what HTTP adds
to a request, /healthz meanwhile, what a second busy process costs, and resident memory over many requests. Prints one line a measurement.

usage: daemon.py [--requests N] [--soak N]    environment: SITD (default build/sitd), MODEL (deploy/models/fashion-sit)
"""
import argparse
import http.client
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time

SITD = os.environ.get("SITD", "build/sitd")
MODEL = os.environ.get("MODEL", "deploy/models/fashion-sit")
SAMPLERS = [
    {"type": "ode", "method": "euler", "steps": 20}, {"type": "ode", "method": "heun", "steps": 10}, {"type": "sde", "steps": 20},
    {"type": "sde", "method": "heun", "steps": 8, "w_t": "linear"}, {"type": "ode", "method": "rk4", "steps": 5}, {"type": "ode", "method": "dopri5"},
    {"type": "sde", "steps": 15, "w_t": "decreasing", "last_step": "tweedie"}, {"type": "ode", "method": "midpoint", "steps": 12},
]
PATHS = ["linear", "gvp", "vp"]


def request_body(i):
    body = {"class": i % 10, "seed": i, "sampler": SAMPLERS[i % len(SAMPLERS)], "guidance": {"scale": [1, 2, 4][i % 3]}, "timeout_ms": 600000}
    if body["sampler"].get("method") != "dopri5" and i % 5 == 0:
        body["interpolant"] = PATHS[i % 3]
    return json.dumps(body)


class Daemon:
    def __init__(self, *extra):
        self.log = tempfile.NamedTemporaryFile("r", suffix=".log")
        command = [SITD, "serve", "--models", MODEL, "--listen", "127.0.0.1:0", "--log-file", self.log.name, *extra]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(re.search(r":(\d+)$", self.process.stdout.readline().strip()).group(1))
        while self.get("/readyz")[0] != 200:
            time.sleep(0.05)

    def get(self, path):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        c.request("GET", path)
        r = c.getresponse()
        return r.status, r.read().decode()

    def evaluations(self):
        return sum(float(l.split()[-1]) for l in self.get("/metrics")[1].splitlines() if l.startswith("sitd_model_evaluations_total"))

    def rss_mb(self):
        return int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{self.process.pid}/status").read()).group(1)) / 1024

    def requests(self):
        return [e for e in map(json.loads, self.log.read().splitlines()) if e.get("route") == "/v1/samples"]

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


def client(port, numbers, failures):
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    c.connect()
    for i in numbers:
        body = request_body(i)  # one write: http.client sends head and body apart, and a thread may wait milliseconds for Python's lock in between
        c.sock.sendall(f"POST /v1/samples HTTP/1.1\r\nHost: sitd\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        r = http.client.HTTPResponse(c.sock, method="POST")
        r.begin()
        r.read()
        if r.status != 200:
            failures.append((i, r.status))


def run(daemon, n, clients):
    failures, before, start = [], daemon.evaluations(), time.monotonic()
    threads = [threading.Thread(target=client, args=(daemon.port, range(k, n, clients), failures)) for k in range(clients)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    seconds = time.monotonic() - start
    assert not failures, failures[:5]
    return seconds, (daemon.evaluations() - before) / seconds


def watch_health(port, stop, out):
    times, c = [], http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while not stop.is_set():
        start = time.monotonic()
        c.request("GET", "/healthz")
        c.getresponse().read()
        times.append(1e3 * (time.monotonic() - start))
        time.sleep(0.01)
    out.put(times)


def burn(stop, out):
    turns = 0
    while not stop.is_set():
        for _ in range(10000):
            turns += 1
    out.put(turns)


def beside(function, *args):  # a process of its own, so that Python's lock is not measured
    stop, out = multiprocessing.Event(), multiprocessing.Queue()
    p = multiprocessing.Process(target=function, args=(*args, stop, out))
    p.start()

    def finish():
        stop.set()
        result = out.get()
        p.join()
        return result
    return finish


def percentile(values, p):
    return sorted(values)[min(len(values) - 1, int(p / 100 * len(values)))]


def engine_rows():
    line = subprocess.run([SITD, "bench", "--model", MODEL, "--rows", "16", "--seconds", "4"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    return 16e3 / json.loads(line)["ms"]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--requests", type=int, default=192)
    p.add_argument("--soak", type=int, default=0)
    a = p.parse_args()
    own = engine_rows()
    d = Daemon("--max-rows", "16", "--max-jobs", "64", *os.environ.get("SITD_OPTIONS", "").split())
    run(d, 8, 8)
    d.requests()
    health = beside(watch_health, d.port)
    seconds, rows = run(d, a.requests, 32)
    latencies = health()
    log = d.requests()
    added = [e["total_ms"] - e["queue_ms"] - e["denoise_ms"] - e["decode_ms"] for e in log]
    parts = {"receive": [e["receive_ms"] for e in log], "encode": [e["encode_ms"] for e in log],
             "hand over and send": [a - e["receive_ms"] - e["encode_ms"] for a, e in zip(added, log)]}
    own = statistics.mean([own, engine_rows()])
    print(f"engine alone at 16 rows: {own:.0f} rows/s")
    print(f"32 clients, {a.requests} mixed requests: {seconds:.1f} s, {rows:.0f} rows/s = {rows / own:.2f} of the engine's own")
    print(f"request less queue and engine time: p50 {percentile(added, 50):.2f}, p99 {percentile(added, 99):.2f} ms (n={len(added)}); p99 of its parts: "
          + ", ".join(f"{name} {percentile(v, 99):.2f}" for name, v in parts.items()))
    print(f"/healthz meanwhile: p50 {percentile(latencies, 50):.2f}, p99 {percentile(latencies, 99):.2f} ms (n={len(latencies)})")
    alone_seconds, alone_rows = run(d, a.requests, 1)
    print(f"the same requests one after another: {alone_seconds:.1f} s, {alone_rows:.0f} rows/s; together {alone_seconds / seconds:.2f} times as fast")
    stop = beside(burn)
    time.sleep(3)
    turns_alone = stop() / 3
    stop = beside(burn)
    busy_seconds, busy_rows = run(d, a.requests, 32)
    turns = stop() / busy_seconds
    print(f"beside a busy process: {busy_rows:.0f} rows/s = {busy_rows / rows:.2f} of before; the other process keeps {turns / turns_alone:.2f} of its speed")
    if a.soak:
        sizes = [d.rss_mb()]
        for _ in range(10):
            run_short(d, a.soak // 10)
            sizes.append(d.rss_mb())
        print(f"resident memory over {a.soak} requests: " + ", ".join(f"{s:.1f}" for s in sizes) + " MB")
    d.stop()


def run_short(d, n):
    def one(numbers):
        c = http.client.HTTPConnection("127.0.0.1", d.port, timeout=600)
        for i in numbers:
            c.request("POST", "/v1/samples", json.dumps({"class": i % 10, "seed": i, "sampler": {"method": "euler", "steps": 1}}), {"Content-Type": "application/json"})
            assert c.getresponse().read()
    threads = [threading.Thread(target=one, args=(range(k, n, 8),)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


if __name__ == "__main__":
    sys.exit(main())
