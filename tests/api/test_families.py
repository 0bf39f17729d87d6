# SPDX-License-Identifier: MIT
"""SiT, DiT and MaskDiT side by side over HTTP: each by its own samplers, and the same bytes alone as among the others."""
import json
import pathlib
import threading

import pytest

import tiny
from conftest import Daemon
from test_contract import check
from test_openapi import EXAMPLES, SPEC

REAL = pathlib.Path(__file__).resolve().parents[2] / "deploy/models/fashion-dit"
ASKED = [
    {"model": "dit", "class": 3, "seed": 1, "sampler": {"steps": 12}},
    {"model": "dit", "class": "four", "seed": 2, "sampler": {"type": "ddpm", "steps": 10, "spacing": "trailing", "clip": True}, "guidance": {"scale": 3}},
    {"model": "dit", "classes": [1, None], "seed": 3, "sampler": {"type": "ddim", "steps": 10, "spacing": "ddim"}},
    {"model": "dit", "class": 5, "seed": 4, "sampler": {"type": "ddim", "steps": 9, "eta": 0.7}, "guidance": {"scale": 2, "channels": 1}},
    {"model": "dit", "class": 5, "seed": 5, "sampler": {"type": "ode", "method": "dpmpp2m", "steps": 6}},
    {"model": "dit", "class": 5, "seed": 6, "sampler": {"type": "sde", "steps": 8, "w_t": [[0, 1], [1, 0.2]]}, "interpolant": "linear"},
    {"model": "maskdit", "class": 2, "seed": 7, "sampler": {"steps": 6}},
    {"model": "maskdit", "class": 2, "seed": 8, "sampler": {"type": "edm", "method": "euler", "steps": 7, "churn": 20}, "guidance": {"scale": 1.5}},
    {"model": "maskdit", "class": 2, "seed": 9, "sampler": {"type": "ddim", "steps": 5}},
    {"model": "sit", "class": 1, "seed": 10, "sampler": {"steps": 5}},
    {"model": "sit", "class": 1, "seed": 11, "sampler": {"type": "edm", "steps": 5, "churn": 3}},
    {"model": "sit", "class": 1, "seed": 12, "sampler": {"type": "ddim", "steps": 6, "eta": 1, "clip": True}},
    {"model": "sit", "classes": [1, 2, 3], "seed": 13, "sampler": {"type": "sde", "steps": 6, "w_t": "kl"}, "guidance": {"scale": 2}},
    {"model": "sit", "class": 1, "seed": 14, "sampler": {"method": "exponential", "steps": 6}},
]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    tiny.write(folder / "sit", seed=1, default=True)
    tiny.write(folder / "dit", seed=2, family="dit")
    tiny.write(folder / "maskdit", seed=3, family="maskdit", channels=3)
    return folder


@pytest.fixture(scope="module")
def both(families):
    d = Daemon(families)
    yield d
    d.stop()


def pixels(d, request):
    reply = d.sample(request, timeout=120)
    assert reply.status == 200, reply.body
    return [(image["pixels_sha256"], image["b64_json"]) for image in reply.json()["data"]]


def test_same_bytes_alone_and_in_a_mixed_load(families, both):
    d = Daemon(families, "--max-rows", "2", "--threads", "1")
    try:
        alone = [pixels(d, request) for request in ASKED]
    finally:
        d.stop()
    assert len({sha for images in alone for sha, _ in images}) == sum(map(len, alone))
    for turn in range(2):
        got = [None] * len(ASKED)

        def ask(i):
            got[i] = pixels(both, ASKED[i])
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(ASKED))]
        for t in threads[::-1] if turn else threads:
            t.start()
        for t in threads:
            t.join()
        assert got == alone
    steps = both.metrics()
    assert all(steps[f'sitd_steps_total{{sampler="{name}"}}'] > 0 for name in ("ode", "sde", "ddpm", "ddim", "edm"))


def test_defaults_of_a_family(both):
    """What a request leaves out is what capabilities say, and asking for it by name gives the same pictures."""
    for model in both.get("/v1/capabilities").json()["models"]:
        assert model["sampler"] == {"sit": "ode", "dit": "ddpm", "maskdit": "edm"}[model["name"]]
        assert set(model["samplers"]) == {"ode", "sde", "ddim", "edm"} | ({"ddpm"} if model["name"] == "dit" else set())
        defaults = {k: v for k, v in model["samplers"][model["sampler"]]["defaults"].items() if k not in ("atol", "rtol", "max_evaluations")}
        plain = pixels(both, {"model": model["name"], "class": 1, "seed": 5})
        assert plain == pixels(both, {"model": model["name"], "class": 1, "seed": 5, "sampler": {"type": model["sampler"], **defaults}})
    dit, = (m for m in both.get("/v1/capabilities").json()["models"] if m["name"] == "dit")
    assert dit["channels"] == 1 and dit["guidance_channels"] == dit["max_guidance_channels"] == 2 and dit["prediction"] == "noise"


@pytest.mark.parametrize("request_, param", [
    ({"model": "sit", "sampler": {"type": "ddpm"}}, "sampler.type"),
    ({"model": "maskdit", "sampler": {"type": "ddpm"}}, "sampler.type"),
    ({"model": "dit", "sampler": {"method": "heun"}}, "sampler.method"),
    ({"model": "dit", "sampler": {"eta": 0}}, "sampler.eta"),
    ({"model": "dit", "interpolant": "gvp"}, "interpolant"),
    ({"model": "dit", "sampler": {"steps": 1001}}, "sampler.steps"),
    ({"model": "sit", "sampler": {"type": "sde", "w_t": "kl-eta"}}, "sampler.w_t"),
    ({"model": "maskdit", "sampler": {"type": "ddim", "spacing": "openai"}}, "sampler.spacing"),
    ({"model": "maskdit", "guidance": {"scale": 2, "channels": 4}}, "guidance.channels")])
def test_what_a_family_cannot_do(both, request_, param):
    reply = both.sample({"class": 1, **request_})
    assert reply.status == 422 and reply.error["param"] == param and len(reply.error["message"]) > 20


@pytest.mark.parametrize("path", [p for p in EXAMPLES if "dit-" in p.stem], ids=lambda p: p.stem)
def test_examples_of_other_families(both, path):
    request = json.loads(path.read_text(encoding="utf-8"))
    reply = both.sample({**request, "model": path.stem.split("-")[0]})
    assert reply.status == 200, reply.body
    check(SPEC["paths"]["/v1/samples"]["post"], reply)


@pytest.mark.skipif(not REAL.exists(), reason="no such model in this tree")
def test_the_bundled_dit():
    d = Daemon(REAL)
    try:
        for kind in ("ddpm", "ddim"):
            request = {"class": 1, "seed": 1, "sampler": {"type": kind, "steps": 10}}
            assert pixels(d, request) == pixels(d, request)
    finally:
        d.stop()
