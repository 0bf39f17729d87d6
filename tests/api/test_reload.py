# SPDX-License-Identifier: MIT
"""New versions of a model while the daemon serves: each answer's bytes belong to the digest in its header, no request fails, and a publication that is no good
changes nothing. Versions are published by `sitd import`, which writes as the trainer does."""
import hashlib
import json
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest

import tiny
from conftest import BINARY, JSON, SHORT, Daemon, clean_env


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Three versions of the model "tiny" as checkpoints, each in a directory of its own: seed and step n."""
    folder = tmp_path_factory.mktemp("sources")
    for n in (1, 2, 3):
        tiny.write(folder / str(n), seed=n, step=n)
    return folder


def publish(source, folder, name="tiny"):
    step = int(source.name)
    labels = source / "labels.json"
    labels.write_text(json.dumps(tiny.LABELS))
    subprocess.run([BINARY, "import", str(source / f"weights-{step:08d}.safetensors"), "--name", name, "--out", str(folder), "--family", "sit", "--path", "linear",
                    "--prediction", "velocity", "--heads", "2", "--guidance-channels", "all", "--labels", str(labels), "--step", str(step)],
                   check=True, env=clean_env(), stdout=subprocess.DEVNULL)
    return digest_of(folder / name)


def digest_of(directory):
    return hashlib.sha256((directory / "model.json").read_bytes()).hexdigest()


def served(daemon, name="tiny"):
    return {m["id"]: m["digest"] for m in daemon.get("/v1/models").json()["data"]}.get(name)


def index(daemon, name="tiny"):
    return {m["name"]: m for m in daemon.get("/v2/repository/index").json()}.get(name)


def write_json(directory, desc):
    """As an editor that knows no manners would: the file is cut and written again."""
    (directory / "model.json").write_text(desc if isinstance(desc, str) else json.dumps(desc))


REQUEST = {"class": 3, "sampler": SHORT["sampler"]}


def png(daemon, seed):
    reply = daemon.sample({**REQUEST, "seed": seed}, accept="image/png")
    assert reply.status == 200, reply.body
    return reply


def test_versions_go_live_under_load(tmp_path, sources, start):
    folder = tmp_path / "models"
    digests = [publish(sources / "1", folder)]
    daemon = start("--max-rows", "8", models_dir=folder)
    answers, failures, over = [], [], threading.Event()

    def client(number):
        for seed in range(10000 * number, 10000 * (number + 1)):
            if over.is_set():
                return
            reply = daemon.sample({**REQUEST, "seed": seed, "sampler": {"type": "ode", "method": "heun", "steps": 3 + seed % 20}}, accept="image/png")
            if reply.status != 200:
                failures.append((reply.status, reply.body))
                return
            answers.append((seed, reply.headers["X-Model-Digest"], reply.headers["X-Model-Version"], reply.body))

    clients = [threading.Thread(target=client, args=(n,)) for n in range(1, 5)]
    for c in clients:
        c.start()
    for version in ("2", "3"):
        seen = len(answers)
        daemon.wait_until(lambda: failures or len(answers) > seen + 8, 30, "answers of this version")
        digests.append(publish(sources / version, folder))
        daemon.wait_until(lambda: served(daemon) == digests[-1], 20, f"version {version}")
    seen = len(answers)
    daemon.wait_until(lambda: failures or len(answers) > seen + 8, 30, "answers of the last version")
    over.set()
    for c in clients:
        c.join()
    assert not failures
    assert {a[1] for a in answers} == set(digests)
    assert daemon.metric('sitd_model_reloads_total{result="succeeded"}') == 3
    for version, digest in zip("123", digests):  # the same request of a daemon that knows only that version
        alone = tmp_path / version
        assert publish(sources / version, alone) == digest
        mine = [a for a in answers if a[1] == digest]
        judge = start(models_dir=alone)
        for seed, _, said, body in mine[:3] + mine[-3:]:
            assert said == version
            again = judge.sample({**REQUEST, "seed": seed, "sampler": {"type": "ode", "method": "heun", "steps": 3 + seed % 20}}, accept="image/png")
            assert again.body == body and again.headers["X-Model-Digest"] == digest


def test_everything_follows_a_new_version(tmp_path, sources, start):
    first = publish(sources / "1", tmp_path)
    daemon = start(models_dir=tmp_path)
    assert png(daemon, 1).headers["X-Model-Digest"] == first
    second = publish(sources / "2", tmp_path)
    daemon.wait_until(lambda: served(daemon) == second, 20, "the new version")
    assert png(daemon, 1).headers["X-Model-Version"] == "2"
    assert daemon.get("/v1/capabilities").json()["models"][0]["digest"] == second
    infos = [name for name in daemon.metrics() if name.startswith("sitd_model_info")]
    assert infos == [f'sitd_model_info{{model="tiny",version="2",digest="{second}"}}']
    assert index(daemon) == {"name": "tiny", "version": "2", "state": "READY", "reason": "", "digest": second}
    for old in (f"tiny@{first}", f"tiny@{first[:8]}", "tiny@1"):
        reply = daemon.sample({**REQUEST, "model": old})
        assert reply.status == 409 and reply.error["code"] == "state_conflict" and second[:12] in reply.error["message"]
    assert daemon.sample({**REQUEST, "model": "tiny@99"}).status == 404
    assert daemon.sample({**REQUEST, "model": f"tiny@{second}"}).status == 200


def weights_of(directory):
    desc = json.loads((directory / "model.json").read_text())
    return desc, directory / desc["weights"]["file"]


def truncated(directory):
    desc, weights = weights_of(directory)
    cut = weights.read_bytes()[:-100]
    (directory / "cut.safetensors").write_bytes(cut)
    desc["weights"] = {"file": "cut.safetensors", "sha256": hashlib.sha256(cut).hexdigest()}
    write_json(directory, desc)


def wrong_sha(directory):
    desc, _ = weights_of(directory)
    desc["weights"]["sha256"] = "0" * 64
    write_json(directory, desc)


def not_numbers(directory):
    desc, weights = weights_of(directory)
    spoiled = weights.read_bytes()[:-4] + b"\x00\x00\xc0\x7f"
    (directory / "nan.safetensors").write_bytes(spoiled)
    desc["weights"] = {"file": "nan.safetensors", "sha256": hashlib.sha256(spoiled).hexdigest()}
    write_json(directory, desc)


def other_shapes(directory):
    desc, _ = weights_of(directory)
    desc["architecture"]["hidden_size"] = 96
    write_json(directory, desc)


def no_weights(directory):
    desc, _ = weights_of(directory)
    desc["weights"]["file"] = "nowhere.safetensors"
    write_json(directory, desc)


def malformed(directory):
    write_json(directory, '{"format": 1, "family":')


def unknown_field(directory):
    desc, _ = weights_of(directory)
    write_json(directory, {**desc, "colour": "red"})


BAD = {truncated: "cut.safetensors", wrong_sha: "SHA-256", not_numbers: "NaN", other_shapes: "shape", no_weights: "nowhere.safetensors", malformed: "model.json",
       unknown_field: "colour"}


def test_a_bad_version_is_refused_and_the_old_one_serves_on(tmp_path, sources, start):
    first = publish(sources / "1", tmp_path)
    daemon = start(models_dir=tmp_path)
    before, good = png(daemon, 7).body, (tmp_path / "tiny" / "model.json").read_text()
    for spoil, word in BAD.items():
        write_json(tmp_path / "tiny", good)
        spoil(tmp_path / "tiny")
        daemon.wait_until(lambda: word in index(daemon)["reason"], 10, f"a complaint about {spoil.__name__}")
        assert png(daemon, 7).body == before and served(daemon) == first and daemon.get("/readyz").status == 200
    assert daemon.metric('sitd_model_reloads_total{result="failed"}') >= len(BAD)
    assert any(line["msg"] == "model not loaded" and "colour" in line["error"] for line in daemon.log)
    failures = daemon.metric('sitd_model_reloads_total{result="failed"}')
    daemon.wait_until(lambda: daemon.metric('sitd_model_reloads_total{result="failed"}') > failures, 20, "another attempt")
    third = publish(sources / "3", tmp_path)
    daemon.wait_until(lambda: served(daemon) == third, 20, "a good version after bad ones")
    assert index(daemon)["reason"] == ""


def test_weights_that_come_late(tmp_path, sources, start):
    """model.json before its weights, as a copy over a network may bring them: tried again by itself."""
    publish(sources / "1", tmp_path / "served")
    second = publish(sources / "2", tmp_path / "elsewhere")
    daemon = start(models_dir=tmp_path / "served")
    desc, weights = weights_of(tmp_path / "elsewhere" / "tiny")
    shutil.copy(weights.parent / "model.json", tmp_path / "served" / "tiny")
    daemon.wait_until(lambda: weights.name in index(daemon)["reason"], 10, "a complaint about the weights")
    shutil.copy(weights, tmp_path / "served" / "tiny")
    daemon.wait_until(lambda: served(daemon) == second, 20, "the version whose weights came late")


def test_models_come_and_go(tmp_path, sources, start):
    publish(sources / "1", tmp_path)
    daemon = start(models_dir=tmp_path)
    publish(sources / "2", tmp_path, "more")
    daemon.wait_until(lambda: served(daemon, "more"), 20, "the new directory")
    assert daemon.get("/v2/models/more/ready").status == 200
    reply = daemon.sample(REQUEST)
    assert reply.status == 422 and reply.error["param"] == "model"  # two now, none marked
    (tmp_path / "hopeless").mkdir()
    malformed(tmp_path / "hopeless")
    daemon.wait_until(lambda: index(daemon, "hopeless") and index(daemon, "hopeless")["state"] == "UNAVAILABLE", 20, "the hopeless one")
    assert daemon.get("/readyz").status == 200
    assert daemon.sample({**REQUEST, "model": "more"}).status == 200
    shutil.rmtree(tmp_path / "more")
    daemon.wait_until(lambda: not served(daemon, "more"), 20, "the directory's end")
    assert daemon.sample({**REQUEST, "model": "more"}).status == 404
    assert daemon.sample(REQUEST).status == 200  # the only one again


def test_a_name_that_cannot_be_served_is_passed_over(tmp_path, sources, start):
    publish(sources / "1", tmp_path)
    daemon = start(models_dir=tmp_path)
    for name in ("a@2", "b\u00e4r", "n" * 200):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "tiny" / "model.json", tmp_path / name)
    publish(sources / "2", tmp_path, "more")
    daemon.wait_until(lambda: served(daemon, "more"), 20, "the directory beside them")
    daemon.wait_until(lambda: any(line["msg"] == "model directory passed over" for line in daemon.log), 10, "a word about them")
    shutil.rmtree(tmp_path / "more")
    daemon.wait_until(lambda: not served(daemon, "more"), 20, "the directory's end")
    assert len(daemon.get("/v1/models").json()["data"]) == 1


def test_a_folder_that_is_a_model(tmp_path, sources, start):
    publish(sources / "1", tmp_path)
    daemon = start(models_dir=tmp_path / "tiny")
    second = publish(sources / "2", tmp_path)
    daemon.wait_until(lambda: served(daemon) == second, 20, "the new version")


def test_load_is_asked_for(tmp_path, sources, start):
    publish(sources / "1", tmp_path)
    daemon = start(models_dir=tmp_path)
    malformed(tmp_path / "tiny")
    daemon.wait_until(lambda: index(daemon)["reason"], 10, "a complaint")
    for _ in range(3):  # pauses grow; who asks need not wait
        failures = daemon.metric('sitd_model_reloads_total{result="failed"}')
        reply = daemon.request("POST", "/v2/repository/models/tiny/load", body="", headers=JSON)
        assert reply.status == 202 and reply.json() == {"name": "tiny"}
        daemon.wait_until(lambda: daemon.metric('sitd_model_reloads_total{result="failed"}') > failures, 0.9, "an attempt")
    assert daemon.request("POST", "/v2/repository/models/none/load", body="", headers=JSON).status == 404
    assert daemon.request("POST", "/v2/repository/models/tiny/load", body="").status == 415  # no page of another origin can ask


def own_address():
    """An address of this machine that is not loopback, or None. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))
            return s.getsockname()[0]
        except OSError:
            return None


@pytest.mark.skipif(own_address() is None, reason="this machine has only loopback")
def test_only_this_machine_looks_after_models(tmp_path, sources, start):
    publish(sources / "1", tmp_path)
    daemon = start("--insecure-public", models_dir=tmp_path, listen="0.0.0.0:0")
    assert index(daemon)["state"] == "READY"
    daemon.host = own_address()
    assert daemon.get("/readyz").status == 200
    for method, path in (("GET", "/v2/repository/index"), ("POST", "/v2/repository/models/tiny/load")):
        reply = daemon.request(method, path, body="" if method == "POST" else None, headers=JSON)
        assert reply.status == 403 and reply.error["type"] == "permission_error"


def test_hangup_looks_for_models(tmp_path, sources, start):
    publish(sources / "1", tmp_path)
    daemon = start(models_dir=tmp_path)
    second = publish(sources / "2", tmp_path)
    daemon.signal(signal.SIGHUP)
    daemon.wait_until(lambda: served(daemon) == second, 20, "the new version")


def test_stops_while_loading(tmp_path, sources):
    publish(sources / "1", tmp_path)
    for n in (2, 3, 2, 3):
        daemon = Daemon(tmp_path)
        publish(sources / str(n), tmp_path)
        daemon.signal(signal.SIGHUP)
        time.sleep(n / 100)
        assert daemon.stop() == 0
        daemon.check_sanitizers()
