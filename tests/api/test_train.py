# SPDX-License-Identifier: MIT
"""sitd train as it is typed: runs that are stopped, killed and continued; and a daemon that serves what is being trained."""
import hashlib
import json
import random
import re
import signal
import struct
import subprocess
import threading
import time

import pytest

import toy
from conftest import BINARY, ROOT, SCALE, clean_env
from test_latent import png


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("toy"))


def command(pictures, out, *args):
    return [BINARY, "train", "--data", str(pictures), "--out", str(out), *toy.FLAGS, *map(str, args)]


def train(pictures, out, *args, code=0, env=None):
    done = subprocess.run(command(pictures, out, *args), capture_output=True, text=True, timeout=120 * SCALE, env=clean_env(env))
    assert done.returncode == code, done.stderr
    return done


def newest(out):
    return sorted((out / "checkpoints").glob("step-*.safetensors"))[-1]


def test_a_run_leaves_a_log_pictures_and_a_report(tmp_path, pictures):
    done = train(pictures, tmp_path, "--steps", 20, "--log-every", 5, "--save-every", 10, "--sample-every", 10, "--sample-steps", 3)
    assert "40 examples (IDX), 3 classes" in done.stderr and "20 of 20 steps" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[-1]["loss"] < lines[0]["loss"] and len(lines[0]["loss_by_time"]) == 32
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 5 and page.count("data:image/png;base64,") == 2 and "src=\"http" not in page and "batch = 8" in page
    for png in (tmp_path / "samples").iterdir():
        body = png.read_bytes()
        width, height = struct.unpack(">II", body[16:24])
        assert (width, height) == (3 * 10 + 2, 4 * 10 + 2)
    # the recipe that the run leaves is the run again
    again = tmp_path / "again"
    train(pictures, again, "--steps", 20)
    subprocess.run([BINARY, "train", "--config", tmp_path / "recipe.conf", "--out", tmp_path / "third"], check=True, capture_output=True, env=clean_env())
    assert newest(again).read_bytes() == newest(tmp_path / "third").read_bytes() == newest(tmp_path).read_bytes()


def test_sigterm_saves_and_a_run_that_was_killed_ends_the_same(tmp_path, pictures):
    """Stopped once and killed a few times at moments of chance, then continued: the last checkpoint has the same bytes. tests/bench/kill_train.py does it 50 times."""
    args = ["--steps", 120, "--save-every", 10, "--log-every", 10]
    train(pictures, tmp_path / "whole", *args)
    out, rng, kills = tmp_path / "cut", random.Random(4), 0
    for turn in range(4):
        p = subprocess.Popen(command(pictures, out, *args, "--resume", "auto"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_env())
        p.stderr.readline()
        time.sleep(rng.random() * 0.3 * SCALE)
        p.send_signal(signal.SIGKILL if turn else signal.SIGTERM)
        if turn == 0:
            p.send_signal(signal.SIGTERM)  # as `timeout` does: to the process, then to its group
        said, errors = p.communicate(timeout=60 * SCALE)
        kills += p.returncode == -signal.SIGKILL
        if turn == 0:
            assert p.returncode == 0, errors
            step = int(re.search(r": (\d+) of 120 steps", said)[1])
            assert newest(out).name == f"step-{step:08d}.safetensors"
    train(pictures, out, *args, "--resume", "auto")
    assert newest(out).read_bytes() == newest(tmp_path / "whole").read_bytes()
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 120
    assert not list((out / "checkpoints").glob("*.tmp*"))


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path, pictures):
    """Its checkpoints would count as older than those that are there, and be removed as they are written."""
    train(pictures, tmp_path, "--steps", 40, "--save-every", 10, "--keep", 2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()}
    first = tmp_path / "checkpoints" / "step-00000030.safetensors"
    for more in ([], ["--resume", first], ["--init", first]):
        assert "step-00000040.safetensors is there" in train(pictures, tmp_path, "--steps", 35, "--save-every", 5, *more, code=65).stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()} == before
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 40
    train(pictures, tmp_path / "new", "--steps", 40, "--resume", first)
    assert newest(tmp_path / "new").read_bytes() == before["step-00000040.safetensors"]


def test_one_run_a_folder(tmp_path, pictures):
    """As when a job is requeued before its first process has gone; a killed run leaves no lock behind."""
    model = tmp_path / "models" / "toy"
    p = subprocess.Popen(command(pictures, tmp_path, "--steps", 10000000, "--save-every", 100, "--publish", model), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=clean_env())
    try:
        while "checkpoint" not in p.stderr.readline():
            assert p.poll() is None
        assert "another process trains into" in train(pictures, tmp_path, "--steps", 10000000, "--resume", "auto", code=1).stderr
        assert "another --publish" in train(pictures, tmp_path / "other", "--steps", 5, "--publish", model, code=1).stderr
        assert p.poll() is None
    finally:
        p.kill()
        p.communicate()
    step = int(newest(tmp_path).name[5:13])
    assert f"continued at step {step}" in train(pictures, tmp_path, "--steps", step + 2, "--resume", "auto").stderr


def test_a_run_is_continued_with_its_data(tmp_path, pictures):
    """More or fewer examples have another order: the steps would be neither the old run's nor a new one's."""
    train(pictures, tmp_path, "--steps", 5)
    other = toy.write(tmp_path / "other", n=30)
    assert "examples = 40, this one 30" in train(other, tmp_path, "--steps", 8, "--resume", "auto", code=65).stderr
    train(other, tmp_path / "new", "--steps", 8, "--init", newest(tmp_path))


def test_a_run_from_weights_can_be_started_again_as_it_was(tmp_path, pictures):
    train(pictures, tmp_path / "first", "--steps", 5)
    args = ["--init", newest(tmp_path / "first"), "--resume", "auto"]
    for steps in (8, 12):
        train(pictures, tmp_path / "cut", "--steps", steps, *args)
    train(pictures, tmp_path / "whole", "--steps", 12, *args)
    assert newest(tmp_path / "cut").read_bytes() == newest(tmp_path / "whole").read_bytes()


def test_a_limit_on_files_is_told(tmp_path, pictures):
    args = command(pictures, tmp_path, "--steps", 20, "--save-every", 10)
    done = subprocess.run(["prlimit", "--fsize=40000", *args], capture_output=True, text=True, timeout=60 * SCALE, env=clean_env())
    assert done.returncode == 1 and done.stderr.count("the checkpoint could not be written: ") == 2 and "too large" in done.stderr, done.stderr
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_picture_that_cannot_be_read_costs_no_step(tmp_path):
    """The run ends and names it; the steps before it are kept, and go on when it has been mended."""
    for n in range(40):
        png(tmp_path / "data" / "ab"[n % 2] / f"{n}.png", [(5 * n + 7 * i) % 256 for i in range(64)], 8, 8, 1)
    args = ["--steps", 10, "--size", 8, "--channels", 1, "--batch", 4, "--microbatch", 2]
    train(tmp_path / "data", tmp_path / "whole", *args)
    spoiled = tmp_path / "data" / "a" / "10.png"
    good = spoiled.read_bytes()
    spoiled.write_bytes(good[:-30])
    assert str(spoiled) in train(tmp_path / "data", tmp_path / "cut", *args, code=65).stderr
    step = int(newest(tmp_path / "cut").name[5:13])
    assert 0 < step < 10
    spoiled.write_bytes(good)
    train(tmp_path / "data", tmp_path / "cut", *args, "--resume", "auto")
    assert newest(tmp_path / "cut").read_bytes() == newest(tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("args, code, text", [
    ((), 2, "--data"), (("--data", "{d}"), 2, "--out"), (("--data", "/none", "--out", "{o}"), 66, "/none"), (("--data", "{d}", "--out", "{o}", "--lr", "fast"), 2, "lr is 'fast'"),
    (("--data", "{d}", "--out", "{o}", "--model", "DiT-M/2"), 78, "DiT-M/2"), (("--data", "{d}", "--out", "{o}", "--model", "SiT-S/3"), 78, "patch_size"),
    (("--data", "{d}", "--out", "{o}", "--batch", "10", "--microbatch", "4"), 78, "microbatch"), (("--data", "{d}", "--out", "{o}", "--frobnicate"), 2, "--frobnicate"),
    (("--data", "{d}", "--out", "{o}", "--ema", "0.9,x"), 78, "ema is '0.9,x'"), (("--data", "{d}", "--out", "{o}", "--weighting", "velocity"), 78, "weighted"),
    (("--data", "{d}", "--out", "{o}", "--model", "custom"), 78, "family"), (("--data", "{d}", "--out", "{o}", "--classes", "2"), 78, "labels up to 2"),
    (("--data", "{d}", "--out", "{o}", "--init", "/none.pt"), 66, "/none.pt"), (("--data", "{d}", "--out", "{d}/train-images-idx3-ubyte.gz"), 1, "train-images"),
    (("--data", "{d}", "--out", "{o}", "--model", "DiT-S/2", "--path", "vp"), 78, "path"), (("--data", "{d}", "--out", "{o}", "--model", "DiT-S/2", "--prediction", "score"), 78, "prediction"),
    (("--data", "{d}", "--out", "{o}", "--publish", "{d}/train-images-idx3-ubyte.gz"), 1, "train-images"),
    (("--data", "{d}", "--out", "{o}", "--size", "6"), 65, "more than the 6"),
    (("--data", "{d}", "--out", "{o}", "--publish", "{o}/m/my@model/"), 78, "m/my@model/ would not be served: a model's name, which is its directory's, is at most 63 bytes of printable ASCII without '@'"),
    (("--data", "{d}", "--out", "{o}", "--publish", "{o}/m/" + 64 * "n"), 78, "63 bytes"), (("--data", "{d}", "--out", "{o}", "--publish", "{o}/m/caf\u00e9"), 78, "printable ASCII"),
    (("--data", "{d}", "--out", "{o}", "--publish", "{o}/m/.new"), 78, "begin with a dot"), (("--data", "{d}", "--out", "{o}", "--publish", "/"), 78, "would not be served"),
])
def test_what_is_wrong_is_named(tmp_path, pictures, args, code, text):
    args = [a.format(d=pictures, o=tmp_path / "o") for a in args]
    small = ["--width", "16", "--depth", "1", "--heads", "2", "--steps", "1", "--backend", "cpu"] if "--out" in args else []
    done = subprocess.run([BINARY, "train", *args, *small], capture_output=True, text=True, timeout=60 * SCALE, env=clean_env())
    assert text in done.stderr and done.stderr.startswith("sitd train: "), done.stderr
    assert done.returncode == code, done.stderr


def test_messages_say_what_would_help(tmp_path, pictures):
    out = tmp_path / "o"
    (tmp_path / "p" / "a").mkdir(parents=True)
    (tmp_path / "p" / "a" / "0.png").write_bytes(b"hello")
    assert "--size" in train(tmp_path / "p", out, code=78).stderr
    said = train(tmp_path / "p", out, "--size", 8, code=65).stderr
    assert re.search(r"step 1: .*a/0.png: .*The last good checkpoint: none was written", said), said
    assert "--classes 3 holds them" in train(pictures, out, "--classes", 2, code=78).stderr
    train(pictures, out, "--steps", 6)
    said = train(pictures, out, "--steps", 8, "--resume", "auto", "--batch", 6, code=65).stderr
    assert "batch = 8, this one 6" in said and "--init" in said
    said = train(pictures, out, "--steps", 5, "--resume", "auto", code=65).stderr
    assert "step-00000006.safetensors is of step 6, --steps asks for a run of 5" in said
    assert "6 of 6 steps" in train(pictures, out, "--steps", 6, "--resume", "auto").stdout


@pytest.mark.full
def test_a_batch_that_does_not_fit_names_one_that_does(tmp_path, pictures):
    args = command(pictures, tmp_path / "o", "--backend", "ref", "--width", 64, "--batch", 131072, "--steps", 1, "--warmup", 0)
    done = subprocess.run(["prlimit", f"--as={1 << 29}", *args], capture_output=True, text=True, timeout=60 * SCALE, env=clean_env())
    fit = re.search(r"131072 images at a time do not fit .*: --microbatch (\d+) makes the same step", done.stderr)
    assert done.returncode == 1 and fit and 1024 <= int(fit[1]) < 131072, done.stderr


def test_recipes_are_good_and_variables_count(tmp_path, pictures):
    recipes = sorted((ROOT / "deploy" / "recipes").glob("*.conf"))
    assert len(recipes) >= 4
    for recipe in recipes:
        text = subprocess.run([BINARY, "train", "--config", recipe, "--print-config"], check=True, capture_output=True, text=True, env=clean_env({"SITD_TRAIN_LR": "0.5"})).stdout
        assert "# environment\nlr = 0.5\n" in text and "# file\nmodel = " in text
    assert "--t-density" in subprocess.run([BINARY, "train", "--help"], check=True, capture_output=True, text=True).stdout
    for words, said in (("--learn-sigma false", "false"), ("--learn-sigma=no", "false"), ("--learn-sigma", "true"), ("--learn-sigma yes", "true")):
        text = subprocess.run([BINARY, "train", *words.split(), "--lr", "1", "--print-config"], check=True, capture_output=True, text=True, env=clean_env()).stdout
        assert f"# flag\nlearn-sigma = {said}\n" in text and "# flag\nlr = 1\n" in text
    done = train(pictures, tmp_path, "--check-config")
    assert "40 examples" in done.stdout and not (tmp_path / "checkpoints").exists()


def published(directory):
    """model.json, and the weights file's tensors by name: dtype and bytes."""
    desc = json.loads((directory / "model.json").read_text())
    raw = (directory / desc["weights"]["file"]).read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    head = {k: v for k, v in json.loads(raw[8:8 + n]).items() if k != "__metadata__"}
    return desc, {k: (v["dtype"], v["shape"], raw[8 + n:][slice(*v["data_offsets"])]) for k, v in head.items()}


def test_a_checkpoint_is_a_model_for_import(tmp_path, pictures):
    train(pictures, tmp_path / "run", "--steps", 6, "--path", "gvp", "--publish", tmp_path / "published" / "toy")
    done = subprocess.run([BINARY, "import", newest(tmp_path / "run"), "--name", "toy", "--out", tmp_path / "imported"], capture_output=True, text=True, env=clean_env())
    assert done.returncode == 0, done.stderr
    mine, theirs = (json.loads((tmp_path / where / "toy" / "model.json").read_text()) for where in ("imported", "published"))
    assert mine["weights"]["sha256"] == theirs["weights"]["sha256"] and mine["architecture"] == theirs["architecture"]
    assert (mine["family"], mine["path"], mine["prediction"]) == (theirs["family"], "gvp", theirs["prediction"])


def test_published_weights_are_stored_as_asked(tmp_path, pictures):
    for storage, more in (("f32", []), ("f16", ["--publish-default"])):
        train(pictures, tmp_path / storage, "--steps", 3, "--warmup", 0, "--publish", tmp_path / "models" / storage, "--publish-storage", storage, *more)
    (wide, whole), (narrow, stored) = published(tmp_path / "models" / "f32"), published(tmp_path / "models" / "f16")
    assert "default" not in wide and narrow["default"] is True
    assert whole.keys() == stored.keys() and {v[0] for v in whole.values()} == {"F32"}
    for name, (dtype, shape, data) in stored.items():
        assert dtype == ("F16" if len(shape) > 1 else "F32"), name
        kind = "e" if dtype == "F16" else "f"
        assert data == struct.pack(f"<{len(data) // struct.calcsize(kind)}{kind}", *struct.unpack(f"<{len(whole[name][2]) // 4}f", whole[name][2])), name
    assert "publish-storage" in train(pictures, tmp_path, "--publish-storage", "f8", code=2).stderr


def test_a_model_is_published_where_it_is_served(tmp_path, pictures, start):
    """Names of 63 bytes are; the folder of models itself is no model's directory."""
    name, models = "n" * 62 + " ", tmp_path / "models"
    train(pictures, tmp_path / "a", "--steps", 3, "--warmup", 0, "--publish", models / name)
    said = train(pictures, tmp_path / "b", "--steps", 3, "--warmup", 0, "--publish", models, code=65).stderr
    assert f"{models} is a folder of models: name the model's own directory, as {models}/NAME" in said and not (models / "model.json").exists()
    train(pictures, tmp_path / "c", "--steps", 4, "--warmup", 0, "--publish", f"{models / name}/.")
    daemon = start(models_dir=models)
    served = daemon.get("/v1/models").json()
    assert name in str(served), served


class Versions(threading.Thread):
    """Keeps a copy of each model.json that was there, by its digest."""

    def __init__(self, directory):
        super().__init__(daemon=True)
        self.file, self.seen, self.over = directory / "model.json", {}, threading.Event()

    def run(self):
        while not self.over.wait(0.002):
            text = self.file.read_bytes()
            self.seen[hashlib.sha256(text).hexdigest()] = text


def pixels_of(daemon, seed):
    return daemon.sample({"class": 1, "seed": seed, "sampler": {"type": "ode", "method": "euler", "steps": 2 + seed % 7}}, accept="image/png")


def test_versions_that_are_trained_go_live_under_load(tmp_path, pictures, start):
    folder, out, answers, failures, over = tmp_path / "models", tmp_path / "run", [], [], threading.Event()
    live = folder / "toy"
    train(pictures, out, "--steps", 1, "--warmup", 0, "--publish", live, "--publish-every", 1)
    daemon = start("--max-rows", "8", models_dir=folder)
    versions = Versions(live)
    versions.start()

    def client(number):
        for seed in range(10000 * number, 10000 * (number + 1)):
            if over.is_set():
                return
            reply = pixels_of(daemon, seed)
            if reply.status != 200:
                failures.append((reply.status, reply.body))
                return
            answers.append((seed, reply.headers["X-Model-Digest"], reply.body))

    clients = [threading.Thread(target=client, args=(n,)) for n in range(1, 4)]
    for c in clients:
        c.start()
    said = (tmp_path / "said").open("w")
    trainer = subprocess.Popen(command(pictures, tmp_path / "run2", "--steps", 1000000, "--publish", live, "--publish-every", 200), stdout=subprocess.DEVNULL, stderr=said, env=clean_env())
    try:
        daemon.wait_until(lambda: failures or len({a[1] for a in answers}) >= 4, 60, "three versions more")
    finally:
        trainer.send_signal(signal.SIGTERM)
        assert trainer.wait(60 * SCALE) == 0, (tmp_path / "said").read_text()[-2000:]
    digest = hashlib.sha256((live / "model.json").read_bytes()).hexdigest()
    daemon.wait_until(lambda: failures or pixels_of(daemon, 1).headers["X-Model-Digest"] == digest, 30, "the last version")
    # a publication that is broken changes nothing
    desc = json.loads((live / "model.json").read_text())
    desc["weights"]["sha256"] = "0" * 64
    refused = daemon.metric('sitd_model_reloads_total{result="failed"}')
    (live / "model.json").write_text(json.dumps(desc))
    daemon.wait_until(lambda: daemon.metric('sitd_model_reloads_total{result="failed"}') > (refused or 0), 30, "the broken version refused")
    assert pixels_of(daemon, 2).headers["X-Model-Digest"] == digest
    over.set()
    versions.over.set()
    for c in clients:
        c.join()
    assert not failures
    known = [d for d in dict.fromkeys(a[1] for a in answers) if d in versions.seen]  # a version may have come and gone between two looks
    assert len(known) >= 3
    for n, digest in enumerate(known[:4]):  # the same requests of daemons that know one version only
        alone = tmp_path / f"alone{n}" / "toy"
        alone.mkdir(parents=True)
        name = json.loads(versions.seen[digest])["weights"]["file"]
        (alone / name).write_bytes((live / name).read_bytes())
        (alone / "model.json").write_bytes(versions.seen[digest])
        judge = start(models_dir=alone.parent)
        mine = [a for a in answers if a[1] == digest]
        for seed, _, body in mine[:2] + mine[-2:]:
            assert pixels_of(judge, seed).body == body


def test_a_process_for_each_of_several_devices(tmp_path, pictures):
    assert "names GPUs" in train(pictures, tmp_path, "--steps", 5, "--backend", "cpu", "--devices", "0,1", code=65).stderr
    assert "asks for GPU 63" in train(pictures, tmp_path, "--steps", 5, "--backend", "auto", "--devices", "63", code=69).stderr
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert "5 of 5 steps" in train(pictures, tmp_path, "--steps", 5, "--backend", "cpu", env=alone).stdout
    assert "devices" in train(pictures, tmp_path, "--steps", 5, "--devices", "0,0", code=65).stderr
    assert "RANK" in train(pictures, tmp_path, "--steps", 5, code=78, env={**alone, "RANK": "1"}).stderr
