#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""The daemon on GPUs, over HTTP, beside what its parts allow. Python's standard library only. Prints a table; with --csv, appends there.

usage: cuda_daemon.py [--csv FILE] load|rate|devices MODEL
  load     from the start of `sitd serve` to the first sample: nothing remembered, choices of products on disk, and a second version of the model
           loaded beside the first; the same request must give the same picture each time
  rate     --requests N at once (default 256), one image each, guidance, --steps N (50), every second one ODE Euler, SDE Euler else; the time that the network
           rows and pictures alone would take comes from `sitd bench` and `bench-vae`
  devices  the same requests on one GPU, then on all
MODEL: a model directory (make-model MODEL XL/2 vae). Environment: SITD (build/release/sitd), PRECISION (bf16), ROWS (64)
"""
import argparse
import csv
import datetime
import hashlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

SITD = os.environ.get("SITD", "build/release/sitd")
PRECISION = os.environ.get("PRECISION", "bf16")
ROWS = int(os.environ.get("ROWS", "64"))
HEAD = ["date", "card", "commit", "precision", "what", "value", "unit"]


class Daemon:
    def __init__(self, model, *args, cache="none"):
        self.log = tempfile.NamedTemporaryFile("r", suffix=".log")
        self.began = time.monotonic()
        self.process = subprocess.Popen([SITD, "serve", "--models", model, "--listen", "127.0.0.1:0", "--backend", "cuda", "--precision", PRECISION, "--max-rows",
                                         str(ROWS), "--max-jobs", "4096", "--max-images", "4096", "--max-connections", "1024", "--log-level", "debug", "--cache", cache,
                                         "--log-file", self.log.name, *args], stdout=subprocess.PIPE, text=True)
        found = re.search(r":(\d+)$", self.process.stdout.readline().strip())
        if not found:
            sys.exit(f"the daemon did not start (exit {self.process.wait()})\n{self.log.read()}")
        self.port = int(found[1])

    def ask(self, method, path, body=None, headers=None):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        c.request(method, path, body=body, headers=headers or {})
        r = c.getresponse()
        return r.status, r.read()

    def wait_ready(self):
        while self.ask("GET", "/readyz")[0] != 200:
            if self.process.poll() is not None:
                sys.exit(f"the daemon left with {self.process.returncode}\n{self.log.read()}")
            time.sleep(0.005)
        return time.monotonic() - self.began

    def sample(self, body):
        status, png = self.ask("POST", "/v1/samples", json.dumps(body), {"Content-Type": "application/json", "Accept": "image/png"})
        if status != 200:
            sys.exit(f"status {status}: {png[:300]}")
        return png

    def parts(self):
        """Milliseconds of each part of the loads so far"""
        return [(line["part"], line["ms"]) for line in map(json.loads, self.log) if line["msg"] == "load"]

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


def request(i, steps):
    kind = {"type": "sde", "method": "euler", "steps": steps} if i % 2 else {"type": "ode", "method": "euler", "steps": steps}
    return {"class": i * 7 % 1000, "seed": i, "guidance": {"scale": 4}, "sampler": kind, "timeout_ms": 600000}


def pixels_digest(png):
    return re.search(rb"sitd-pixels-sha256\0+([0-9a-f]{64})", png)[1].decode()


def first_sample(model, cache):
    d = Daemon(model, cache=cache)
    ready = d.wait_ready()
    digest = pixels_digest(d.sample(request(0, 50)))
    return d, ready, time.monotonic() - d.began, digest


def touch(model):
    """A new version with the same weights"""
    path = os.path.join(model, "model.json")
    desc = json.load(open(path))
    desc["step"] += 1
    with open(path + ".new", "w") as f:
        json.dump(desc, f)
    os.rename(path + ".new", path)
    return desc["step"]


def again(d, model):
    """Seconds until another version serves, while the first does"""
    begun, step = time.monotonic(), touch(model)
    d.process.send_signal(1)
    while f'"version":{step}' not in d.ask("GET", "/v1/models")[1].decode().replace(" ", ""):
        if time.monotonic() - begun > 60:
            sys.exit("the new version is not served")
        time.sleep(0.01)
    return time.monotonic() - begun


def load(a):
    folder = tempfile.mkdtemp()
    digests = set()
    for what, cache in (("nothing remembered, nothing kept", "none"), ("nothing remembered", folder), ("choices on disk", folder), ("choices on disk, again", folder)):
        d, ready, first, digest = first_sample(a.model, cache)
        print(f"  {what}: " + ", ".join(f"{part} {ms}" for part, ms in d.parts()) + " ms", flush=True)
        digests.add(digest)
        yield f"start to ready, {what}", round(ready, 2), "s"
        yield f"start to first sample, {what}", round(first, 2), "s"
        if cache == folder:
            yield f"another version beside it, {what}", round(again(d, a.model), 2), "s"
            digests.add(pixels_digest(d.sample(request(0, 50))))
        d.stop()
    shutil.rmtree(folder)
    if len(digests) != 1:
        sys.exit(f"the same request gave {len(digests)} pictures")


def crowd(d, n, steps, first=0):
    """Seconds for n requests at once, and the digests of their pictures"""
    out, start = [None] * n, threading.Barrier(n + 1)

    def one(i):
        c = http.client.HTTPConnection("127.0.0.1", d.port, timeout=600)
        body = json.dumps(request(first + i, steps))
        c.connect()
        start.wait()
        c.sock.sendall(f"POST /v1/samples HTTP/1.1\r\nHost: sitd\r\nAccept: image/png\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        r = http.client.HTTPResponse(c.sock, method="POST")
        r.begin()
        png = r.read()
        out[i] = hashlib.sha256(png).hexdigest() if r.status == 200 else f"{r.status} {png[:200]}"
    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    start.wait()
    begun = time.monotonic()
    for t in threads:
        t.join()
    seconds = time.monotonic() - begun
    bad = [o for o in out if len(o) != 64]
    if bad:
        sys.exit(f"{len(bad)} requests failed: {bad[0]}")
    return seconds, out


def allowed(a):
    """Milliseconds of a network row in a full batch, and of a picture among as many as the VAE takes"""
    line = subprocess.run([SITD, "bench", "--model", a.model, "--rows", str(ROWS), "--seconds", "4", "--backend", "cuda", "--precision", PRECISION], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True, check=True).stdout
    vae = subprocess.run([os.path.join(os.path.dirname(SITD), "bench-vae"), "--backend", "cuda", "--precision", PRECISION, "--pictures", "8", "--runs", "10"],
                         stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds = float(re.search(r"\(([0-9.]+) before the pictures are read\)", vae)[1])
    pictures = int(re.search(r"(\d+) together", vae)[1])
    return json.loads(line)["ms"] / ROWS, 1e3 * seconds / pictures


def evaluations(d):
    return sum(float(line.split()[-1]) for line in d.ask("GET", "/metrics")[1].decode().splitlines() if line.startswith("sitd_model_evaluations_total"))


def rate(a):
    row_ms, picture_ms = allowed(a)
    d = Daemon(a.model)
    d.wait_ready()
    crowd(d, 64, 10)
    before = evaluations(d)
    seconds, _ = crowd(d, a.requests, a.steps)
    rows = evaluations(d) - before
    d.stop()
    row_ms_after, picture_ms_after = allowed(a)
    row_ms, picture_ms = (row_ms + row_ms_after) / 2, (picture_ms + picture_ms_after) / 2
    least = (rows * row_ms + a.requests * picture_ms) / 1e3
    yield f"network row in a batch of {ROWS}", round(row_ms, 4), "ms"
    yield "picture of eight", round(picture_ms, 3), "ms"
    yield f"{a.requests} requests, {rows:.0f} rows, least", round(least, 3), "s"
    yield f"{a.requests} requests over HTTP", round(seconds, 3), "s"
    yield "images a second", round(a.requests / seconds, 2), "1/s"
    yield "of the allowed rate", round(100 * least / seconds, 1), "%"


def devices(a):
    took, made = {}, {}
    for which in ("0", "all"):
        d = Daemon(a.model, "--devices", which)
        d.wait_ready()
        crowd(d, 128, 10)
        took[which], made[which] = crowd(d, a.requests, a.steps)
        d.stop()
        yield f"{a.requests} requests, devices {which}", round(took[which], 3), "s"
    yield "times as fast", round(took["0"] / took["all"], 3), ""
    if made["0"] != made["all"]:
        sys.exit("the pictures differ")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=["load", "rate", "devices"])
    p.add_argument("model")
    p.add_argument("--csv")
    p.add_argument("--requests", type=int, default=256)
    p.add_argument("--steps", type=int, default=50)
    a = p.parse_args()
    found = shutil.which("nvidia-smi")
    smi = subprocess.run([found, "--query-gpu=name", "--format=csv,noheader"], stdout=subprocess.PIPE, text=True).stdout.splitlines() if found else []
    version = subprocess.run([SITD, "--version"], stdout=subprocess.PIPE, text=True).stdout.split()
    about = [datetime.date.today().isoformat(), smi[0] if smi else "?", os.environ.get("COMMIT", version[-1].strip("()")), PRECISION]
    new = a.csv and not os.path.exists(a.csv)
    for line in {"load": load, "rate": rate, "devices": devices}[a.what](a):
        print("  ".join(map(str, line)), flush=True)
        if a.csv:
            with open(a.csv, "a", newline="") as f:
                csv.writer(f).writerows(([HEAD] if new else []) + [[*about, *line]])
            new = False


main()
