# SPDX-License-Identifier: MIT
"""Start, stop, signals, exit codes and configuration."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest

import tiny
from conftest import BINARY, BACKEND, ROOT, LONG, SCALE, SHORT, clean_env
from test_clients import raw_request

MEDIUM = {"class": 3, "seed": 9, "sampler": {"type": "ode", "method": "heun", "steps": 150}}


def serve(*args, env=None, timeout=20):
    return subprocess.run([BINARY, "serve", *map(str, args)], capture_output=True, text=True, env=clean_env(env), timeout=timeout * SCALE)


def test_drain_finishes_what_was_taken(start):
    d = start("--max-rows", "4", "--drain-delay", "300ms")
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(d.sample(MEDIUM))) for _ in range(12)]
    for t in threads:
        t.start()
    d.wait_until(lambda: d.metric("sitd_jobs") == 12)
    d.signal(signal.SIGTERM)
    time.sleep(0.1)
    r = d.get("/readyz")
    assert r.status == 503 and r.error["code"] == "draining" and r.headers["Connection"] == "close" and r.headers["Retry-After"]
    assert d.get("/healthz").status == 200 and d.metric("sitd_draining") == 1
    d.sample(SHORT)  # still taken during the delay
    for t in threads:
        t.join(60 * SCALE)
    assert [a.status for a in answers] == [200] * 12
    assert d.wait() == 0
    with pytest.raises(OSError):
        d.get("/healthz")


def test_drain_under_load_loses_no_request(start):
    """Clients that keep asking through a drain get an answer to every request they could send."""
    d = start("--max-rows", "8", "--drain-delay", "500ms", "--max-jobs", "200")
    lost, served, stop = [], [0], threading.Event()

    def client():
        while not stop.is_set():
            try:
                s = socket.create_connection((d.host, d.port), timeout=30 * SCALE)
            except OSError:
                return  # the listener is closed: a balancer would go elsewhere
            try:
                s.sendall(raw_request({**SHORT, "sampler": {"type": "ode", "method": "heun", "steps": 20}}))
                head = s.recv(65536)
                if head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 503")):
                    served[0] += 1
                else:
                    lost.append(head)
            except OSError as e:
                lost.append(e)
            finally:
                s.close()
    threads = [threading.Thread(target=client) for _ in range(12)]
    for t in threads:
        t.start()
    time.sleep(0.7)
    d.signal(signal.SIGTERM)
    code = d.wait()
    stop.set()
    for t in threads:
        t.join(30 * SCALE)
    assert code == 0 and served[0] > 20 / SCALE
    # A connection that the kernel had accepted in the very moment of the close is all that may be lost.
    assert len(lost) <= 1, lost


def test_exit_timeout_cuts_off(start):
    d = start("--exit-timeout", "400ms")
    answers = []
    t = threading.Thread(target=lambda: answers.append(d.sample({**LONG, "n": 8})))
    t.start()
    d.wait_until(lambda: d.metric("sitd_rows_running") > 0)
    d.signal(signal.SIGTERM)
    assert d.wait() == 1
    t.join()
    assert answers[0].status == 503 and answers[0].error["code"] == "stopping" and answers[0].headers["Connection"] == "close"


def test_second_signal_stops_at_once(start):
    d = start("--exit-timeout", "60s")
    answers = []
    t = threading.Thread(target=lambda: answers.append(d.sample({**LONG, "n": 8})))
    t.start()
    d.wait_until(lambda: d.metric("sitd_rows_running") > 0)
    d.signal(signal.SIGTERM)
    time.sleep(0.3)
    assert d.process.poll() is None
    began = time.monotonic()
    d.signal(signal.SIGINT)
    assert d.wait() == 1 and time.monotonic() - began < 3 * SCALE
    t.join()
    assert answers[0].status == 503


def test_a_signal_that_comes_twice_is_one(start):
    d = start("--exit-timeout", "60s")
    answers = []
    t = threading.Thread(target=lambda: answers.append(d.sample({**LONG, "sampler": {**LONG["sampler"], "steps": 900}})))
    t.start()
    d.wait_until(lambda: d.metric("sitd_rows_running") > 0)
    d.signal(signal.SIGTERM)
    d.signal(signal.SIGTERM)
    assert d.wait() == 0
    t.join()
    assert answers[0].status == 200


def test_idle_daemon_stops_at_once(start):
    d = start()
    with d.socket() as s:  # an idle connection holds nothing up
        s.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        s.recv(4096)
        began = time.monotonic()
        d.signal(signal.SIGINT)
        assert d.wait() == 0 and time.monotonic() - began < 1.5 * SCALE


def test_stop_while_clients_dawdle(start):
    d = start("--exit-timeout", "500ms")
    with d.socket() as s:
        s.sendall(raw_request(SHORT)[:-5])
        time.sleep(0.1)
        d.signal(signal.SIGTERM)
        assert d.wait() == 1
        assert s.recv(4096).startswith(b"HTTP/1.1 503 ")


def test_user_signals(start, tmp_path):
    log = tmp_path / "log"
    d = start("--log-file", str(log))
    d.signal(signal.SIGUSR1)
    d.wait_until(lambda: '"msg":"state"' in log.read_text())
    state = next(json.loads(line) for line in log.read_text().splitlines() if '"state"' in line)
    assert state["ready"] == "ready" and state["models"] == 1 and state["running_rows"] == 0
    files = d.metric("process_open_fds")
    for i in range(3):
        log.rename(tmp_path / f"log.{i}")
        d.signal(signal.SIGHUP)
        d.wait_until(lambda: log.exists() and "reopened" in log.read_text())
        d.get("/healthz")
        d.wait_until(lambda: "/healthz" in log.read_text())
    d.wait_until(lambda: d.metric("process_open_fds") <= files)
    held = [os.path.realpath(f"/proc/{d.process.pid}/fd/{n}") for n in os.listdir(f"/proc/{d.process.pid}/fd")]
    assert not any("log." in name for name in held), held  # so that deleting a rotated file frees its space
    d.signal(signal.SIGPIPE)
    assert d.get("/healthz").status == 200


def test_stalled_log_reader_does_not_stall_the_daemon(models):
    """stderr is a pipe that nobody reads: lines are lost, answers are not."""
    p = subprocess.Popen([BINARY, "serve", "--models", models, "--listen", "127.0.0.1:0", "--backend", BACKEND], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, env=clean_env())
    try:
        port = int(p.stdout.readline().rsplit(":", 1)[1])
        import http.client
        c = http.client.HTTPConnection("127.0.0.1", port, timeout=10 * SCALE)
        for _ in range(1500):  # a pipe holds 64 KiB
            c.request("GET", "/healthz")
            assert c.getresponse().read()
    finally:
        p.kill()
        p.wait()
        p.stdout.close()
        p.stderr.close()


def test_survives_restart_with_the_same_bytes(start):
    def one():
        d = start()
        body = d.sample({**MEDIUM, "guidance": {"scale": 2}}, accept="image/png").body
        assert d.stop() == 0
        return body
    assert one() == one()


def test_text_log(start):
    d = start("--log-format", "text", "--log-level", "debug")
    d.get("/healthz")
    d.wait_until(lambda: any('route="/healthz"' in line for line in d.raw_log))


# ---- make run

RUN = ROOT / "tools" / "run.sh"


def run_script(listen):
    return subprocess.Popen([RUN], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=clean_env({"LISTEN": listen}), start_new_session=True)


@pytest.mark.full
@pytest.mark.parametrize("stop", ["terminal", "script"])
def test_run_script(stop):
    p = run_script("127.0.0.1:0")
    assert p.stdout.readline() == "first picture: build/first.png\n" and (ROOT / "build/first.png").read_bytes().startswith(b"\x89PNG")
    assert re.fullmatch(r"the page: +http://127\.0\.0\.1:[1-9]\d*/\n", p.stdout.readline())
    if stop == "terminal":
        os.killpg(p.pid, signal.SIGINT)
    else:
        p.terminate()
    assert p.wait(20) == 0
    p.stdout.close()


@pytest.mark.full
def test_run_script_when_another_daemon_has_the_port(start):
    d = start()
    p = run_script(f"127.0.0.1:{d.port}")
    assert p.communicate(timeout=20)[0] == "" and p.returncode == 1


# ---- Exit codes and configuration

def test_public_address_is_refused(models):
    for address in ("0.0.0.0:0", "[::]:0", ":0"):
        r = serve("--models", models, "--listen", address)
        assert r.returncode == 78 and "--insecure-public" in r.stderr and not r.stdout


def test_public_address_when_meant(start):
    d = start("--insecure-public", listen="0.0.0.0:0", ready=False)
    d.host = "127.0.0.1"
    assert d.first_line.startswith("listening on http://0.0.0.0:") and d.get("/healthz").status == 200


def test_exit_codes(models, tmp_path):
    assert serve("--models", tmp_path / "missing").returncode == 66
    r = serve("--models", models / "tiny" / "model.json")
    assert r.returncode == 66 and "Not a directory" in r.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    assert serve("--models", empty, "--listen", "127.0.0.1:0", "--backend", BACKEND).returncode == 66
    assert serve("--no-such-option").returncode == 2
    assert serve("--max-rows").returncode == 2
    assert serve("--models", models, "--max-rows", "1").returncode == 2
    assert serve("--models", models, env={"SITD_MAX_ROWS": "1"}).returncode == 78
    for choice in (("--log-level", "debug|info"), ("--backend", "auto|cpu"), ("--log-format", ""), ("--insecure-public=1|0",)):
        r = serve("--models", models, "--check-config", *choice)
        assert r.returncode == 2 and choice[0].split("=")[0] in r.stderr, choice
    assert serve("--models", models, "--config", tmp_path / "none").returncode == 66
    for bad in ("0,", "0;1", "-1", "some", "0,0"):
        r = serve("--models", models, "--listen", "127.0.0.1:0", "--backend", BACKEND, "--devices", bad)
        assert r.returncode == 78 and "device" in r.stderr, bad
    for name in ("a@b", "a\nb", "caf\u00e9", "x" * 64):
        shutil.copytree(models / "tiny", tmp_path / "names" / name)
        r = serve("--models", tmp_path / "names", "--listen", "127.0.0.1:0", "--backend", BACKEND)
        assert r.returncode == 78 and "name" in r.stderr, name
        shutil.rmtree(tmp_path / "names")
    for bad in ("nonsense", "127.0.0.1", "127.0.0.1:99999", "::1:80", "unix:", "host.invalid:80"):
        r = serve("--models", models, "--listen", bad)
        assert r.returncode == 78 and "listen" in r.stderr, bad


@pytest.mark.skipif(BACKEND not in ("auto", "cpu"), reason="about the processor's back end")
def test_processor_without_bf16(models):
    r = serve("--models", models, "--listen", "127.0.0.1:0", "--backend", "cpu", "--precision", "bf16", env={"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert r.returncode == 69 and "AVX-512" in r.stderr, r.stderr


def test_address_in_use(models):
    with socket.create_server(("127.0.0.1", 0)) as s:
        r = serve("--models", models, "--listen", f"127.0.0.1:{s.getsockname()[1]}", "--backend", BACKEND)
        assert r.returncode == 1 and "in use" in r.stderr


def test_corrupt_checkpoint(models, tmp_path):
    """Any model that does not load at the start ends the daemon: 65, and the log names the file."""
    shutil.copytree(models, tmp_path / "m")
    shutil.copytree(models / "tiny", tmp_path / "m" / "broken")
    weights = next((tmp_path / "m" / "broken").glob("weights*"))
    weights.write_bytes(weights.read_bytes()[:-100])
    r = serve("--models", tmp_path / "m", "--listen", "127.0.0.1:0", "--backend", BACKEND)
    assert r.returncode == 65 and "broken" in r.stderr, r.stderr


def test_listens_while_loading(tmp_path):
    tiny.write(tmp_path / "m" / "big", width=128, depth=4, heads=4)
    p = subprocess.Popen([BINARY, "serve", "--models", tmp_path / "m", "--listen", "127.0.0.1:0", "--backend", BACKEND], stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, text=True, env=clean_env())
    try:
        port = int(p.stdout.readline().rsplit(":", 1)[1])
        seen = set()
        import http.client
        end = time.monotonic() + 20 * SCALE
        while time.monotonic() < end and 200 not in seen:
            c = http.client.HTTPConnection("127.0.0.1", port, timeout=10 * SCALE)
            c.request("GET", "/readyz")
            r = c.getresponse()
            seen.add(r.status)
            if r.status == 503:
                assert r.headers["Retry-After"] and json.loads(r.read())["error"]["code"] == "loading"
                c.request("POST", "/v1/samples", body=json.dumps(SHORT), headers={"Content-Type": "application/json"})
                early = c.getresponse()
                assert early.status in (200, 503) and (early.status == 200 or early.headers["Retry-After"])
            c.close()
        assert 200 in seen and seen <= {200, 503}
    finally:
        p.terminate()
        assert p.wait(20 * SCALE) == 0
        p.stdout.close()


def test_flag_beats_environment_beats_file(models, tmp_path):
    file = tmp_path / "sitd.conf"
    file.write_text("# comment\nmax-rows = 4\nmax_jobs=5\n\ndefault-timeout = 10s\n")

    def printed(*args, env=None):
        r = serve("--models", models, "--print-config", *args, env=env)
        assert r.returncode == 0, r.stderr
        return dict(line.split(" = ", 1) for line in r.stdout.splitlines() if not line.startswith("#"))
    assert printed()["max-rows"] == "16"
    assert printed("--config", file)["max-rows"] == "4" and printed("--config", file)["max-jobs"] == "5"
    assert printed("--config", file)["default-timeout"] == "10000ms"
    assert printed(env={"SITD_CONFIG": str(file), "SITD_MAX_ROWS": "6"})["max-rows"] == "6"
    assert printed("--config", file, "--max-rows=8", env={"SITD_MAX_ROWS": "6"})["max-rows"] == "8"
    out = tmp_path / "printed.conf"
    out.write_text(serve("--models", models, "--print-config", "--max-rows", "8").stdout)
    assert printed("--config", out)["max-rows"] == "8"  # what is printed can be read
    for text in ("max-rows 4\n", "nonsense = 1\n", "max-rows = many\n", "config = x\n", "max-rows = " + "1" * 2000 + "\n"):
        file.write_text(text)
        r = serve("--models", models, "--config", file, "--check-config")
        assert r.returncode == 78 and "sitd.conf:1" in r.stderr, text


def test_check_config(models):
    r = serve("--models", models, "--check-config")
    assert r.returncode == 0 and not r.stdout
    assert serve("--models", models, "--check-config", "--listen", "0.0.0.0:80").returncode == 78
    assert serve("--models", models, "--check-config", env={"SITD_BACKEND": "gpu"}).returncode == 78
    assert serve("--models", models, "--check-config", env={"SITD_SERVICE_HOST": "10.0.0.1", "SITD_PORT": "tcp://10.0.0.1:80"}).returncode == 0


def test_help_and_version():
    r = serve("--help")
    assert r.returncode == 0 and "--max-rows" in r.stdout and "78" in r.stdout
    r = serve("--version")
    assert r.returncode == 0 and re.match(r"sitd \d+\.\d+\.\d+", r.stdout)
