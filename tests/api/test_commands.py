# SPDX-License-Identifier: MIT
"""The other commands of the binary, as a person types them: exit codes, messages, and that `sitd sample` makes the daemon's pictures."""
import base64
import hashlib
import json
import os
import re
import struct
import subprocess
import time
import zlib

import pytest

from conftest import BINARY, ROOT, SCALE, clean_env

COMMANDS = ["serve", "import", "inspect", "sample", "replay", "bench"]
GOLDEN = ROOT / "tests/golden"
TINY = GOLDEN / "sit-tiny.safetensors"


def sitd(*args, seconds=60):
    p = subprocess.run([BINARY, *map(str, args)], capture_output=True, text=True, timeout=seconds * SCALE, env=clean_env(), cwd=ROOT)
    assert "Sanitizer" not in p.stderr and "runtime error" not in p.stderr, p.stderr
    return p


def sample(model, out, *args, backend="cpu"):
    return sitd("sample", "--model", model, "--out", out, "--backend", backend, *args)


def pixels(png):
    """Of a grey PNG whose rows libpng filtered as it liked."""
    at, data = 8, b""
    while at < len(png):
        n, kind = struct.unpack_from(">I4s", png, at)
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack_from(">IIBB", png, at + 8)
            assert depth == 8 and colour == 0
        data += png[at + 8:at + 8 + n] if kind == b"IDAT" else b""
        at += n + 12
    data, rows, above = zlib.decompress(data), [], bytes(width)
    for y in range(height):
        kind, line = data[y * (width + 1)], bytearray(data[y * (width + 1) + 1:(y + 1) * (width + 1)])
        for x in range(width):
            a, b, c = (line[x - 1] if x else 0), above[x], (above[x - 1] if x else 0)
            paeth = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            line[x] = (line[x] + (0, a, b, (a + b) // 2, paeth)[kind]) & 255
        rows.append(above := bytes(line))
    return b"".join(rows)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_and_wrong_usage_is_2(command):
    helped = sitd(command, "--help")
    assert helped.returncode == 0 and helped.stdout.startswith(f"usage: sitd {command}") and not helped.stderr
    wrong = sitd(command, "--no-such-option")
    assert wrong.returncode == 2 and not wrong.stdout and "no-such-option" in wrong.stderr and "sitd " + command in wrong.stderr.splitlines()[0]


def test_commands_are_listed():
    p = sitd("--help")
    assert p.returncode == 0 and all(re.search(f"^  {c} ", p.stdout, re.M) for c in COMMANDS)
    assert re.fullmatch(r"sitd \d+\.\d+\.\d+ \(.+\)\n", sitd("--version").stdout)
    assert sitd().returncode == 2 and sitd("no-such-command").returncode == 2


@pytest.mark.parametrize("request_", [
    {"classes": [1, None, "nine"], "seed": 5, "sampler": {"type": "ode", "method": "heun", "steps": 3}, "guidance": {"scale": 2.5}},
    {"classes": [3], "seed": "18446744073709551615", "seed_index": 7, "interpolant": "vp", "sampler": {"type": "sde", "method": "euler", "steps": 4, "w_t": "linear"}},
    {"classes": [4], "seed": 2, "sampler": {"type": "ode", "method": "dopri5", "rtol": 0.01}, "guidance": {"scale": 3, "interval": [0.2, 0.7]}},
])
def test_sample_makes_the_pictures_of_the_daemon(start, models, tmp_path, request_):
    reply = start("--backend", "cpu").sample(request_)
    assert reply.status == 200
    p = sample(models / "tiny", tmp_path / "%d.png", "--request", json.dumps(request_), "--threads", 1, "--max-rows", 2)
    assert p.returncode == 0, p.stderr
    for i, image in enumerate(reply.json()["data"]):
        ours = pixels((tmp_path / f"{i}.png").read_bytes())
        assert ours == pixels(base64.b64decode(image["b64_json"]))
        assert hashlib.sha256(ours).hexdigest() == image["pixels_sha256"]


def test_sample_finds_a_bad_place_before_the_work(models, tmp_path):
    (tmp_path / "pipe").parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "pipe")
    begun = time.monotonic()
    for out in (tmp_path / "none" / "x.png", tmp_path / "none" / "%d.png", tmp_path, tmp_path / "pipe"):
        p = sample(models / "tiny", out, "--steps", 10000, "--method", "rk4", "--n", 8)
        assert p.returncode not in (0, 2) and str(out) in p.stderr and not p.stdout
    assert time.monotonic() - begun < 20 * SCALE
    assert sorted(f.name for f in tmp_path.iterdir()) == ["pipe"]


@pytest.mark.parametrize("args, word", [
    (["--steps", "0"], "steps"), (["--steps", "1e3"], "steps"), (["--guidance", "nan"], "guidance"), (["--seed", "-1"], "seed"),
    (["--seed", "18446744073709551616"], "seed"), (["--classes", "99"], "classes"), (["--classes", "seven,,one"], "classes"), (["--classes", "sevn"], '"seven"'),
    (["--method", "dopri5", "--steps", "5"], "steps"), (["--type", "ode", "--w-t", "sigma"], "w_t"), (["--request", "[1]"], "request"),
    (["--request", '{"sede": 1}'], '"seed"'), (["--max-rows", "1"], "max-rows"), (["--n", "x"], "--n"), (["stray"], "stray"),
])
def test_sample_refuses_by_name(models, tmp_path, args, word):
    p = sample(models / "tiny", tmp_path / "x.png", *args)
    assert p.returncode == 2 and word in p.stderr and not (tmp_path / "x.png").exists()


def test_replay_says_ok_or_fail_and_exits_by_it(tmp_path):
    case, other = GOLDEN / "sit-tiny.forward.safetensors", tmp_path / "other.safetensors"
    good = sitd("replay", "--model", TINY, case)
    assert good.returncode == 0 and re.fullmatch(r"sit-tiny\.forward rel_l2=[\d.e-]+ max_abs=[\d.e-]+ ok\n", good.stdout)
    strict = sitd("replay", "--model", TINY, "--rtol", "1e-12", case)
    assert strict.returncode == 1 and strict.stdout.endswith(" FAIL\n")
    other.write_bytes(case.read_bytes().replace(b'"kind":"forward"', b'"kind":"bakward"').replace(b'"kind": "forward"', b'"kind": "bakward"'))
    mixed = sitd("replay", "--model", TINY, other, case)
    assert mixed.returncode == 1 and [line.split()[-1] for line in mixed.stdout.splitlines()] == ["FAIL", "ok"] and '"bakward"' in mixed.stdout
    assert sitd("replay", "--model", TINY).returncode == 2
    assert sitd("replay", case).returncode == 2
    assert sitd("replay", "--model", tmp_path / "none", case).returncode == 66
    assert sitd("replay", "--model", TINY, tmp_path / "none").returncode == 1


def test_inspect_and_import_name_what_is_wrong(tmp_path):
    shown = sitd("inspect", TINY)
    assert shown.returncode == 0 and "blocks.1.mlp.fc2.weight" in shown.stdout and "--heads" in shown.stdout
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(TINY.read_bytes()[:-1])
    for command in (["inspect", cut], ["import", cut, "--name", "x", "--out", tmp_path]):
        p = sitd(*command)
        assert p.returncode == 65 and "cut.safetensors" in p.stderr
    told = ["--family", "sit", "--heads", "2", "--path", "linear", "--prediction", "velocity"]
    for name in ("../x", "", ".x", "a/b"):
        assert sitd("import", TINY, "--name", name, "--out", tmp_path / "out", *told).returncode == 2
    assert not (tmp_path / "out").exists()
    assert sitd("import", TINY, "--name", "x", "--out", tmp_path / "out", *told).returncode == 0
    assert sitd("inspect", tmp_path / "out" / "x").returncode == 0
