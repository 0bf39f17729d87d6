# SPDX-License-Identifier: MIT
"""rng torch-cpu: the pictures that a PyTorch script makes of the same seed (tests/golden/make_torch_cpu.py), alone and among others; what it cannot give is refused."""
import json
import threading

import pytest

from conftest import ROOT, Daemon
from test_samples import pixels, texts

RECORDED = (ROOT / "tests/golden/torch-cpu.bin").read_bytes()
ODE = {"seed": 0, "rng": "torch-cpu", "sampler": {"type": "ode", "method": "euler", "steps": 10}, "guidance": {"scale": 3}}
SDE = {"class": 9, "seed": 5, "rng": "torch-cpu", "sampler": {"type": "sde", "method": "euler", "steps": 10}, "guidance": {"scale": 2}}


@pytest.fixture(scope="module")
def fashion():
    d = Daemon(ROOT / "deploy/models/fashion-sit")
    yield d
    d.stop()
    d.check_sanitizers()


def picture(i):
    return RECORDED[1024 * i:1024 * (i + 1)]


def ask(d, request):
    r = d.sample(request, accept="image/png", timeout=120)
    assert r.status == 200, r.body
    return r.body


def distance(png, recorded):
    return max(abs(a - b) for a, b in zip(pixels(png), recorded, strict=True))


def test_pictures_of_torch_among_native_ones(fashion):
    requests = [{**ODE, "class": i, "seed_index": i} for i in range(4)] + [SDE] + [{"class": i, "seed": i, "sampler": {"type": "sde", "steps": 9}} for i in range(3)]
    pngs = [None] * len(requests)

    def one(i):
        pngs[i] = ask(fashion, requests[i])
    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(requests))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [distance(pngs[i], picture(i)) <= 1 for i in range(5)] == [True] * 5
    assert distance(ask(fashion, {**ODE, "class": 0, "rng": "native"}), picture(0)) > 50
    assert [ask(fashion, requests[i]) for i in (2, 4, 6)] == [pngs[i] for i in (2, 4, 6)]  # alone: the same bytes


def test_a_batch_is_its_images_and_the_text_makes_one_again(fashion):
    batch = fashion.sample({**ODE, "classes": [0, 1, 2, 3]}, timeout=120).json()["data"]
    one = ask(fashion, {**ODE, "class": 2, "seed_index": 2})
    said = texts(one)
    assert said["sitd-pixels-sha256"] == batch[2]["pixels_sha256"]
    assert json.loads(said["sitd-request"])["rng"] == "torch-cpu"
    assert ask(fashion, json.loads(said["sitd-request"])) == one


@pytest.mark.parametrize("request_, param", [({**SDE, "n": 2}, "rng"), ({**SDE, "seed_index": 1}, "rng"), ({**ODE, "class": 1, "seed_index": 1024}, "seed_index"),
                                             ({**ODE, "class": 1, "rng": "torch-cuda"}, "rng"), ({**ODE, "class": 1, "rng": None}, "rng")])
def test_refused(fashion, request_, param):
    r = fashion.sample(request_)
    assert (r.status, r.error["param"]) == (422, param), r.body
    assert param in r.error["message"]
