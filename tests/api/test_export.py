# SPDX-License-Identifier: MIT
"""sitd sample --npz: what the ADM evaluator reads, in one run or in several."""
import ast
import json
import pathlib
import signal
import struct
import subprocess
import time
import zipfile

import pytest

import tiny
from conftest import BACKEND, BINARY, SCALE, clean_env


ENGINE = "cpu" if BACKEND == "auto" else BACKEND


def command(model, npz, num, *more):
    return [BINARY, "sample", "--model", str(model), "--npz", str(npz), "--num", str(num), "--backend", ENGINE, *more]


def run(*args, code=0):
    r = subprocess.run(command(*args), capture_output=True, encoding="utf-8", env=clean_env(), timeout=60 * SCALE)
    assert r.returncode == code, r.stderr
    assert "Sanitizer" not in r.stderr and "runtime error" not in r.stderr, r.stderr
    return r


def load(path):
    """The pictures of an npz, as a list of bytes, and their shape."""
    with zipfile.ZipFile(path) as z:
        assert z.namelist() == ["arr_0.npy"] and z.infolist()[0].compress_type == zipfile.ZIP_STORED
        data = z.read("arr_0.npy")  # checks the CRC
    assert data[:8] == b"\x93NUMPY\x01\x00"
    end = 10 + struct.unpack("<H", data[8:10])[0]
    head = ast.literal_eval(data[10:end].decode())
    assert head["descr"] == "|u1" and head["fortran_order"] is False
    n, h, w, c = head["shape"]
    assert len(data) == end + n * h * w * c and c == 3
    return [data[end + i * h * w * c:end + (i + 1) * h * w * c] for i in range(n)], (h, w)


def pixels(daemon, model, label, seed, index, channels, **request):
    """What the daemon gives for one image alone, grey repeated."""
    png = daemon.sample({"model": model, "class": label, "seed": seed, "seed_index": index, **request}, accept="image/png")
    assert png.status == 200, png.body
    return decode(png.body)


def decode(png):
    import zlib
    at, width, height, colour, data = 8, 0, 0, 0, b""
    while at < len(png):
        n, kind = struct.unpack(">I4s", png[at:at + 8])
        body = png[at + 8:at + 8 + n]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert depth == 8
        if kind == b"IDAT":
            data += body
        at += 12 + n
    data, c = zlib.decompress(data), {0: 1, 2: 3}[colour]
    out, before, stride = bytearray(), bytearray(width * c), width * c
    for y in range(height):
        kind, line = data[y * (stride + 1)], bytearray(data[y * (stride + 1) + 1:(y + 1) * (stride + 1)])
        for x in range(stride):
            a, b, d = line[x - c] if x >= c else 0, before[x], before[x - c] if x >= c else 0
            p = a + b - d
            paeth = min((a, b, d), key=lambda v: abs(p - v))
            line[x] = (line[x] + (0, a, b, (a + b) // 2, paeth)[kind]) & 255
        out += line
        before = line
    return bytes(v for v in out for _ in range(3)) if c == 1 else bytes(out)


def test_equals_single_images(start, two_models, models, tmp_path):
    for folder, name, size in ((two_models, "alpha", 16), (models, "tiny", 8)):
        d = start("--backend", ENGINE, models_dir=folder)
        run(folder / name, tmp_path / "x.npz", 23, "--labels", "balanced", "--seed", "9", "--steps", "3", "--guidance", "2", "--max-rows", "4")
        got, shape = load(tmp_path / "x.npz")
        assert shape == (size, size) and len(got) == 23 and not (tmp_path / "x.npz.part").exists()
        for i in (0, 1, 7, 13, 22):
            assert got[i] == pixels(d, name, i % 10, 9, i, 3, sampler={"steps": 3}, guidance={"scale": 2}), i
        assert len(set(got)) == 23


def test_random_labels(start, models, tmp_path):
    """Drawn by the seed alone: found again by asking the daemon for each class."""
    d, counts = start("--backend", ENGINE), [0] * 10
    run(models / "tiny", tmp_path / "x.npz", 60, "--seed", "4", "--steps", "2")
    run(models / "tiny", tmp_path / "fewer.npz", 20, "--seed", "4", "--steps", "2", "--labels", "random", "--max-rows", "3", "--threads", "1")
    run(models / "tiny", tmp_path / "later.npz", 20, "--seed", "4", "--steps", "2", "--request", '{"seed_index": 40}')
    got = load(tmp_path / "x.npz")[0]
    assert load(tmp_path / "fewer.npz")[0] == got[:20] and load(tmp_path / "later.npz")[0] == got[40:]
    for i, picture in enumerate(got):
        found = [c for c in range(10) if pixels(d, "tiny", c, 4, i, 1, sampler={"steps": 2}) == picture]
        assert len(found) == 1, (i, found)
        counts[found[0]] += 1
    assert max(counts) <= 15 and sum(c > 0 for c in counts) >= 8 and counts != [6] * 10, counts  # i.i.d. of 10 classes, not round robin


def test_default_seed_and_model_that_follows(models, tmp_path):
    run(models / "tiny", tmp_path / "a.npz", 3, "--steps", "2")
    run(models / "tiny", tmp_path / "b.npz", 3, "--steps", "2", "--seed", "0")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def interrupted(model, npz, num, *more):
    """Kills an export when its file counts some pictures; returns how many."""
    p = subprocess.Popen(command(model, npz, num, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_env())
    part, end = pathlib.Path(f"{npz}.part"), time.monotonic() + 60 * SCALE
    try:
        while True:
            assert p.poll() is None and time.monotonic() < end, p.stderr.read() if p.poll() is not None else "no progress"
            head = part.read_bytes()[:512] if part.exists() else b""
            done = struct.unpack_from("<Q", head, 43 + 28)[0] if len(head) == 512 else 0
            if done:
                p.send_signal(signal.SIGKILL)
                return done
            time.sleep(0.02)
    finally:
        p.kill()
        p.communicate()


def test_killed_and_continued(models, tmp_path):
    # long enough to be killed: 4 images at a time, each of some tenths of a second
    args, num = ("--seed", "5", "--method", "rk4", "--steps", "150", "--max-rows", "4"), 24
    seconds = []
    for n in (4, 4, 36):  # the first may have to choose products
        start = time.monotonic()
        run(models / "tiny", tmp_path / "whole.npz", n, *args)
        seconds.append(time.monotonic() - start)
    num = max(12, min(2000, int(32 * 6 / max(0.01, seconds[2] - seconds[1]))))  # some six seconds' worth, start-up aside
    npz = tmp_path / "x.npz"
    done = interrupted(models / "tiny", npz, num, *args)
    assert 0 < done < num and not npz.exists()
    for other, message in (((num + 1, *args), f"--num {num}"), ((num, *args, "--guidance", "2"), "another request"), ((num, *args, "--labels", "balanced"), "another request"),
                           ((num, "--seed", "6", *args[2:]), "another request")):
        r = run(models / "tiny", npz, *other, code=65)
        assert "x.npz.part was begun with" in r.stderr and message in r.stderr, r.stderr
    (tmp_path / "other").mkdir()
    tiny.write(tmp_path / "other" / "tiny", seed=8)
    assert "another model" in run(tmp_path / "other" / "tiny", npz, num, *args, code=65).stderr
    r = run(models / "tiny", npz, num, *args)
    assert f"holds {done} of {num} images already" in r.stderr or "images already" in r.stderr
    run(models / "tiny", tmp_path / "whole.npz", num, *args)
    assert npz.read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize("more,code,message", [
    (["--num", "0"], 2, "--num wants 1.."), (["--num", "x"], 2, "--num wants 1.."), (["--labels", "each"], 2, "--labels wants random or balanced"),
    (["--out", "x.png"], 2, "--out does not go with --npz"), (["--classes", "1"], 2, "--classes does not go with --npz"),
    (["--n", "2"], 2, "--n does not go with --npz"), (["--request", json.dumps({"classes": [1]})], 2, "in --request: classes"),
    (["--request", json.dumps({"timeout_ms": 5})], 2, "in --request: timeout_ms"), (["--steps", "0"], 2, "sampler.steps"),
    (["--npz", "/nowhere/x.npz"], 66, "/nowhere/x.npz.part"), (["--npz", "/tmp"], None, "/tmp is not a regular file"),
    (["--request", json.dumps({"seed_index": 4294967290})], None, "seed_index"), (["--model", "/nowhere"], 66, "/nowhere")])
def test_bad(models, tmp_path, more, code, message):
    r = subprocess.run(command(models / "tiny", tmp_path / "x.npz", 10, *more), capture_output=True, encoding="utf-8", env=clean_env(), timeout=60 * SCALE)
    assert r.returncode == code if code else r.returncode > 0, r.stderr
    assert message in r.stderr and r.stdout == "", r.stderr
    assert list(tmp_path.iterdir()) == []


def test_num_needs_npz(models, tmp_path):
    for flag, value in (("--num", "3"), ("--labels", "random")):
        r = subprocess.run([BINARY, "sample", "--model", str(models / "tiny"), "--out", str(tmp_path / "x.png"), flag, value], capture_output=True,
                           encoding="utf-8", env=clean_env())
        assert r.returncode == 2 and f"{flag} goes with --npz only" in r.stderr
    r = subprocess.run(command(models / "tiny", tmp_path / "x.npz", 1)[:6], capture_output=True, encoding="utf-8", env=clean_env())
    assert r.returncode == 2 and "--num is missing" in r.stderr


def test_garbage_in_the_way(models, tmp_path):
    (tmp_path / "x.npz.part").write_bytes(b"a letter to my aunt" * 100)
    assert "move it away" in run(models / "tiny", tmp_path / "x.npz", 3, "--steps", "2", code=65).stderr
    assert (tmp_path / "x.npz.part").read_bytes() == b"a letter to my aunt" * 100
