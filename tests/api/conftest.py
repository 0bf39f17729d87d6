# SPDX-License-Identifier: MIT
"""Starts the real daemon ($SITD, else build/sitd) on a free port, with tiny random models, and speaks to it with the standard library only.

SITD_SANITIZED=1 says that the binary carries a sanitizer: waits are scaled by TEST_TIME_SCALE (5 then) and tests marked `full` are left out.
"""
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = os.path.abspath(os.environ.get("SITD", ROOT / "build" / "sitd"))
SANITIZED = os.environ.get("SITD_SANITIZED") == "1"
SCALE = float(os.environ.get("TEST_TIME_SCALE", "5" if SANITIZED else "1"))
BACKEND = os.environ.get("SITD_TEST_BACKEND", "auto")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: not under a sanitizer (slow, or about speed)")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if SANITIZED and item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="sanitized build"))


class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json()["error"]


def clean_env(extra=None):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SITD")}
    env.update(extra or {})
    return env


class Daemon:
    """A running daemon. Its log is kept as a list of parsed lines."""

    def __init__(self, models, *args, env=None, ready=True, listen="127.0.0.1:0"):
        self.process = subprocess.Popen([BINARY, "serve", "--models", str(models), "--listen", listen, "--backend", BACKEND, *args],
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="surrogateescape",
                                        env=clean_env(env))
        self.log, self.raw_log = [], []
        self.reader = threading.Thread(target=self._read_log, daemon=True)
        self.reader.start()
        self.first_line = self.process.stdout.readline()
        found = re.fullmatch(r"listening on (?:http://(.+):(\d+)|unix:(.+))\n", self.first_line)
        if not found:
            self.process.wait(10 * SCALE)
            self.reader.join(5)
            raise RuntimeError(f"did not start: {self.first_line!r} {''.join(self.raw_log)}")
        self.host, self.port = (found[1] or "").strip("[]"), int(found[2] or 0)
        if ready:
            self.wait_until(lambda: self.get("/readyz").status == 200, 20)

    def _read_log(self):
        for line in self.process.stderr:
            self.raw_log.append(line)
            try:
                self.log.append(json.loads(line))
            except ValueError:
                pass

    @staticmethod
    def wait_until(condition, seconds=5, what="condition"):
        end = time.monotonic() + seconds * SCALE
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"{what} did not come true in {seconds * SCALE} s")
            time.sleep(0.02)

    def connection(self, timeout=60):
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout * SCALE)

    def socket(self, timeout=20):
        return socket.create_connection((self.host, self.port), timeout=timeout * SCALE)

    def request(self, method, path, body=None, headers=None, timeout=60):
        c = self.connection(timeout)
        try:
            c.request(method, path, body=body, headers=headers or {})
            r = c.getresponse()
            return Reply(r.status, r.headers, r.read())
        finally:
            c.close()

    def get(self, path, **headers):
        return self.request("GET", path, headers=headers)

    def sample(self, request, accept=None, headers=None, timeout=60):
        h = {"Content-Type": "application/json", **({"Accept": accept} if accept else {}), **(headers or {})}
        body = request if isinstance(request, (bytes, str)) else json.dumps(request)
        return self.request("POST", "/v1/samples", body=body, headers=h, timeout=timeout)

    def metrics(self):
        out = {}
        for line in self.get("/metrics").body.decode().splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                out[name] = float(value)
        return out

    def metric(self, name):
        return self.metrics()[name]

    def idle(self, seconds=5):
        """Waits until nothing runs or waits in the engine."""
        self.wait_until(lambda: (lambda m: m["sitd_rows_running"] == 0 and m["sitd_queue_depth"] == 0 and m["sitd_jobs"] == 0)(self.metrics()), seconds,
                        "an idle engine")

    def logged(self, request_id):
        return [line for line in self.log if line.get("msg") == "request" and line.get("id") == request_id]

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, seconds=15):
        code = self.process.wait(seconds * SCALE)
        self.reader.join(5 * SCALE)
        return code

    def stop(self):
        """Ends the daemon and returns its exit code; anything that a sanitizer said is in the log."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                return self.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.wait()
                raise
        return self.wait()

    def check_sanitizers(self):
        text = "".join(self.raw_log)
        assert "Sanitizer" not in text and "runtime error" not in text, text[-8000:]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.write(folder / "tiny")
    return folder


@pytest.fixture(scope="session")
def two_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-models")
    tiny.write(folder / "alpha", seed=2, size=16, channels=3)
    tiny.write(folder / "beta", seed=3, step=2000)
    return folder


@pytest.fixture
def start(models):
    """start(*args, ...) gives a daemon of the test's own; all are stopped at its end."""
    running = []

    def make(*args, models_dir=models, **kw):
        d = Daemon(models_dir, *args, **kw)
        running.append(d)
        return d

    yield make
    for d in running:
        d.stop()
        d.check_sanitizers()


@pytest.fixture(scope="session")
def shared(models):
    """One daemon for all tests that leave it as they found it."""
    d = Daemon(models, "--max-body", "64K", "--max-jobs", "64", "--max-rows", "16")
    yield d
    assert d.stop() == 0, "".join(d.raw_log)[-4000:]
    d.check_sanitizers()


# A request that keeps the tiny network busy for seconds, whatever the back end, and one that is over at once.
LONG = {"class": 1, "seed": 1, "sampler": {"type": "ode", "method": "rk4", "steps": 9000}}
SHORT = {"class": 1, "seed": 1, "sampler": {"type": "ode", "method": "euler", "steps": 3}}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def daemon(shared):
    yield shared
    shared.idle(20)
