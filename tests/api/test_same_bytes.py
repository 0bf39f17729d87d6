# SPDX-License-Identifier: MIT
"""Same seed, same bytes: alone, beside a crowd, after a restart, with other row limits and thread counts, on a lesser processor."""
import random
import threading

import pytest

from conftest import SANITIZED, Daemon

ONES = [
    {"class": 1, "seed": 11, "sampler": {"type": "ode", "method": "heun", "steps": 12}},
    {"class": "four", "seed": 12, "guidance": {"scale": 3.5}, "sampler": {"type": "ode", "method": "euler", "steps": 17}},
    {"class": 7, "seed": 13, "guidance": {"scale": 2, "interval": [0.2, 0.7]}, "sampler": {"type": "sde", "method": "euler", "steps": 20, "w_t": "sigma"}},
    {"class": 2, "seed": 14, "interpolant": "gvp", "sampler": {"type": "ode", "method": "dopri5", "atol": 1e-3, "rtol": 1e-2}},
    {"classes": [None], "seed": 15, "seed_index": 77, "sampler": {"type": "sde", "method": "heun", "steps": 9, "last_step": "tweedie"}},
]


def crowd_request(rng):
    kind = rng.choice(["ode", "sde"])
    method = rng.choice(["euler", "heun", "midpoint", "rk4"] if kind == "ode" else ["euler", "heun"])
    request = {"classes": [rng.randrange(10) for _ in range(rng.choice([1, 1, 2, 5]))], "seed": rng.randrange(1 << 40),
               "sampler": {"type": kind, "method": method, "steps": rng.randrange(2, 40)}}
    if rng.random() < 0.5:
        request["guidance"] = {"scale": rng.choice([0, 1.5, 4]), "interval": sorted([round(rng.random(), 2), 1.0])}
    if rng.random() < 0.3 and kind == "ode":
        request["interpolant"] = rng.choice(["gvp", "vp"])
    return request


def alone(d):
    out = []
    for request in ONES:
        r = d.sample(request, accept="image/png")
        assert r.status == 200, r.body
        out.append(r.body)
    assert len(set(out)) == len(ONES)
    return out


def crowded(d, others=31):
    """The same requests at once with `others` unlike ones, which are themselves asked twice."""
    rng = random.Random(5)
    crowd = [crowd_request(rng) for _ in range(others)]
    answers, mine = [[], []], [None] * len(ONES)

    def ask(i, turn):
        answers[turn][i] = d.sample(crowd[i], timeout=120).json()["data"]

    def ask_mine(i):
        mine[i] = d.sample(ONES[i], accept="image/png", timeout=120).body
    for turn in range(2):
        answers[turn] = [None] * others
        order = list(range(others))
        rng.shuffle(order)
        threads = [threading.Thread(target=ask, args=(i, turn)) for i in order]
        for at in range(len(ONES)):
            threads.insert(rng.randrange(len(threads)), threading.Thread(target=ask_mine, args=(at,)))
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        yield mine
    assert answers[0] == answers[1]


def check(d, expected):
    assert alone(d) == expected
    for mine in crowded(d):
        assert mine == expected


@pytest.fixture(scope="module")
def expected(models):
    d = Daemon(models, "--max-rows", "2", "--threads", "1")
    try:
        return alone(d)
    finally:
        d.stop()


@pytest.mark.parametrize("rows,threads", [(2, 1), (3, 2), (16, 1), (16, 2), (64, 3)] if not SANITIZED else [(16, 2)])
def test_rows_and_threads(start, expected, rows, threads):
    d = start("--max-rows", str(rows), "--threads", str(threads))
    check(d, expected)
    m = d.metrics()
    most = max(int(k.split('le="')[1].split('"')[0]) for k, v in m.items() if k.startswith("sitd_batch_rows_bucket") and "Inf" not in k and v < m["sitd_batch_rows_count"])
    assert rows < 16 or most >= 4  # rows were really shared


@pytest.mark.full
@pytest.mark.parametrize("isa", ["AVX2", "SSE41"])
def test_lesser_processor(start, isa):
    env = {"ONEDNN_MAX_CPU_ISA": isa}
    d = start("--max-rows", "2", "--threads", "1", env=env)
    expected = alone(d)
    check(start("--max-rows", "16", "--threads", "2", env=env), expected)
