# SPDX-License-Identifier: MIT
"""A latent model with a VAE behind the daemon, and `sitd encode`, which makes latents."""
import hashlib
import json
import shutil
import struct
import subprocess
import threading
import zlib

import pytest

import tiny
from conftest import BINARY, ROOT, SCALE, clean_env

VAE = ROOT / "tests" / "golden" / "vae-small"
SIZE = 8  # of the latents; the VAE makes four pixels of one, each way


def add_vae(folder, **change):
    shutil.copytree(VAE, folder / "vae")
    weights = (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    desc = json.loads((folder / "model.json").read_text())
    desc["latent"] = {"vae": {"file": "vae", "sha256": hashlib.sha256(weights).hexdigest()}, "scale": 0.18215, **change}
    if "mean" in change:
        del desc["latent"]["scale"]
    (folder / "model.json").write_text(json.dumps(desc))


@pytest.fixture(scope="module")
def latent_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    tiny.write(folder / "latent", seed=5, size=SIZE, channels=4, default=True)
    add_vae(folder / "latent")
    tiny.write(folder / "normed", seed=5, size=SIZE, channels=4)
    add_vae(folder / "normed", mean=[0.1, 0, 0, 0], std=[5.5, 5, 5, 5])
    tiny.write(folder / "pixels", seed=6)
    return folder


REQUESTS = [
    {"model": "latent", "class": 3, "seed": 8, "sampler": {"type": "ode", "method": "euler", "steps": 4}},
    {"model": "latent", "class": 3, "seed": 9, "guidance": {"scale": 3}, "sampler": {"type": "sde", "method": "euler", "steps": 6}},
    {"model": "normed", "class": 3, "seed": 8, "sampler": {"type": "ode", "method": "euler", "steps": 4}},
    {"model": "pixels", "class": 3, "seed": 8, "sampler": {"type": "ode", "method": "heun", "steps": 30}},
]


def ask_all(d):
    out = []
    for r in REQUESTS:
        answer = d.sample(r, accept="image/png")
        assert answer.status == 200, answer.body
        out.append(answer.body)
    return out


def test_pictures_and_same_bytes(start, latent_models):
    d = start("--max-rows", "4", models_dir=latent_models)
    alone = ask_all(d)
    assert len(set(alone)) == len(alone)
    for png, side in zip(alone, (32, 32, 32, 8)):
        width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
        assert (width, height, depth, kind) == (side, side, 8, 2 if side == 32 else 0)
    together = [None] * 24

    def ask(i):
        together[i] = d.sample(REQUESTS[i % len(REQUESTS)], accept="image/png").body
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(together))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert together == [alone[i % len(alone)] for i in range(len(together))]
    other = start("--max-rows", "16", "--threads", "3", models_dir=latent_models)
    assert ask_all(other) == alone


def test_size_is_that_of_the_pictures(start, latent_models):
    d = start(models_dir=latent_models)
    models = {m["name"]: m for m in d.get("/v1/capabilities").json()["models"]}
    assert models["latent"]["image_size"] == 32 and models["latent"]["channels"] == 3
    assert models["pixels"]["image_size"] == 8 and models["pixels"]["channels"] == 1


# ---- encode


def png(path, pixels, width, height, channels):
    lines = b"".join(b"\0" + bytes(pixels[y * width * channels:(y + 1) * width * channels]) for y in range(height))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def picture(seed, width=16, height=12):
    return [(x * 7 + y * 3 * seed + c * 50 + x * y) % 256 for y in range(height) for x in range(width) for c in range(3)]


def read(path):
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + n])
    meta = header.pop("__metadata__")
    return {k: (t["dtype"], t["shape"], raw[8 + n + t["data_offsets"][0]:8 + n + t["data_offsets"][1]]) for k, t in header.items()}, meta


def encode(*args):
    return subprocess.run([BINARY, "encode", *map(str, args)], capture_output=True, text=True, timeout=60 * SCALE, env=clean_env())


@pytest.fixture
def images(tmp_path):
    for name, label in (("b", 1), ("a", 2), ("c", 3)):
        for i in range(2 if name != "c" else 1):
            png(tmp_path / "images" / name / f"{i}.png", picture(10 * label + i), 16, 12, 3)
    (tmp_path / "images" / "a" / "notes.txt").write_text("not a picture")
    return tmp_path / "images"


def test_encode(images, tmp_path):
    out = tmp_path / "out.safetensors"
    done = encode("--vae", VAE, "--images", images, "--out", out, "--threads", 1)
    assert done.returncode == 0, done.stderr
    tensors, meta = read(out)
    assert tensors["mean"][:2] == ("F32", [5, 4, 3, 4]) and tensors["logvar"][:2] == ("F32", [5, 4, 3, 4])
    assert struct.unpack("<5q", tensors["label"][2]) == (0, 0, 1, 1, 2)
    assert json.loads(meta["classes"]) == ["a", "b", "c"] and meta["kind"] == "latents" and float(meta["scaling_factor"]) == 0.18215
    means = struct.unpack("<240f", tensors["mean"][2])
    assert len({means[i * 48:i * 48 + 48] for i in range(5)}) == 5 and max(map(abs, means)) < 100
    # in three shards, with other threads: the same numbers
    done = encode("--vae", VAE, "--images", images, "--out", tmp_path / "s.safetensors", "--shard", 2, "--threads", 3)
    assert done.returncode == 0, done.stderr
    shards = [read(tmp_path / f"s-0000{i}-of-00003.safetensors")[0] for i in (1, 2, 3)]
    for name in ("mean", "logvar", "label"):
        assert b"".join(s[name][2] for s in shards) == tensors[name][2]


def test_encode_grey_is_grey_in_colours(tmp_path):
    grey = [(x * 11 + y * 5) % 256 for y in range(8) for x in range(8)]
    png(tmp_path / "i" / "x" / "0.png", grey, 8, 8, 1)
    png(tmp_path / "i" / "x" / "1.png", [v for v in grey for _ in range(3)], 8, 8, 3)
    assert encode("--vae", VAE, "--images", tmp_path / "i", "--out", tmp_path / "o.safetensors").returncode == 0
    mean = read(tmp_path / "o.safetensors")[0]["mean"][2]
    assert mean[:len(mean) // 2] == mean[len(mean) // 2:]


def test_encode_cuts_pictures_of_any_size(tmp_path):
    """PNG or JPEG, whatever they are called: the square that is cut is encoded as a picture of that size is."""
    jpeg = bytes(int(v, 0) for v in (ROOT / "tests" / "unit" / "tiny_jpeg.inc").read_text().replace("\n", "").split(",") if v.strip())
    images = tmp_path / "i"
    png(images / "a" / "0.png", picture(3, 8, 8), 8, 8, 3)
    png(images / "a" / "1.PNG", picture(4, 31, 17), 31, 17, 3)
    (images / "b").mkdir()
    for name in ("0.JPEG", "1.jpg", "2.png"):  # a grey square of 8
        (images / "b" / name).write_bytes(jpeg)
    args = ["--vae", VAE, "--images", images, "--out"]
    refused = encode(*args, tmp_path / "no.safetensors")
    assert refused.returncode == 65 and "1.PNG is 31 x 17" in refused.stderr and "--size" in refused.stderr
    done = encode(*args, tmp_path / "new" / "folder" / "all.safetensors", "--size", 8)
    assert done.returncode == 0, done.stderr
    tensors, meta = read(tmp_path / "new" / "folder" / "all.safetensors")
    assert tensors["mean"][1] == [5, 4, 2, 2] and struct.unpack("<5q", tensors["label"][2]) == (0, 0, 1, 1, 1) and meta["size"] == "8x8"
    means = [tensors["mean"][2][i * 64:i * 64 + 64] for i in range(5)]
    assert means[2] == means[3] == means[4] and len(set(means)) == 3
    (images / "a" / "1.PNG").unlink()
    assert encode(*args, tmp_path / "one.safetensors").returncode == 0
    assert read(tmp_path / "one.safetensors")[0]["mean"][2][:64] == means[0]
    assert encode(*args, tmp_path / "no.safetensors", "--size", 6).returncode == 65  # the VAE needs multiples of 4
    assert encode(*args, tmp_path / "no.safetensors", "--size", 0).returncode == 2


def test_encode_flip_adds_mirror_images(tmp_path):
    there = picture(3, 8, 8)
    back = [there[(y * 8 + 7 - x) * 3 + c] for y in range(8) for x in range(8) for c in range(3)]
    for folder, pixels in (("a", there), ("b", back)):
        png(tmp_path / folder / "x" / "0.png", pixels, 8, 8, 3)
    assert encode("--vae", VAE, "--images", tmp_path / "a", "--out", tmp_path / "both.safetensors", "--flip").returncode == 0
    for folder in "ab":
        assert encode("--vae", VAE, "--images", tmp_path / folder, "--out", tmp_path / f"{folder}.safetensors").returncode == 0
    both, a, b = (read(tmp_path / f"{n}.safetensors")[0] for n in ("both", "a", "b"))
    assert both["label"][1] == [2] and a["mean"][2] != b["mean"][2]
    assert all(both[name][2] == a[name][2] + b[name][2] for name in ("mean", "logvar"))


# ---- train on latents, publish, serve


TRAIN = ["--model", "custom", "--family", "sit", "--width", 16, "--depth", 1, "--heads", 2, "--patch", 2, "--mlp-ratio", 2, "--batch", 4, "--warmup", 0, "--guidance-channels", "all",
         "--threads", 1, "--backend", "cpu", "--sample-steps", 2]


def test_latents_are_trained_on_published_and_served(tmp_path, start):
    """From pictures to a daemon's pictures; the VAE has a shift, which the model directory must bring along. Then a VAE that overflows is refused."""
    vae, live = tmp_path / "vae", tmp_path / "models" / "made"
    shutil.copytree(VAE, vae)
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.25, "shift_factor": 0.5}))
    for label in range(3):
        for i in range(2):
            png(tmp_path / "images" / f"c{label}" / f"{i}.png", picture(10 * label + i, 16, 16), 16, 16, 3)
    assert encode("--vae", vae, "--images", tmp_path / "images", "--out", tmp_path / "l.safetensors", "--flip").returncode == 0

    def train(*args):
        return run("train", "--data", tmp_path / "l.safetensors", *TRAIN, "--publish", live, *args)
    refused = train("--out", tmp_path / "r", "--steps", 1, "--flip")
    assert refused.returncode == 78 and "sitd encode --flip" in refused.stderr, refused.stderr
    done = train("--out", tmp_path / "r", "--steps", 4, "--sample-every", 4)
    assert done.returncode == 0 and "12 examples (latents), 3 classes" in done.stderr, done.stderr
    grid = (tmp_path / "r/samples/step-00000004.png").read_bytes()
    assert struct.unpack(">II", grid[16:24]) == (3 * 18 + 2, 4 * 18 + 2), done.stderr  # pictures of the VAE, not latents
    desc = json.loads((live / "model.json").read_text())
    assert (desc["latent"]["mean"], desc["latent"]["std"]) == ([0.5] * 4, [4] * 4) and desc["labels"] == ["c0", "c1", "c2"]
    assert json.loads((live / desc["latent"]["vae"]["file"] / "config.json").read_text())["norm_num_groups"] == 8
    d = start(models_dir=live.parent)

    def ask():
        return d.sample({"class": "c1", "seed": 3, "sampler": {"type": "ode", "method": "euler", "steps": 2}}, accept="image/png")
    first = ask()
    assert first.status == 200 and struct.unpack(">II", first.body[16:24]) == (16, 16)
    assert train("--out", tmp_path / "r2", "--steps", 6).returncode == 0
    digest = hashlib.sha256((live / "model.json").read_bytes()).hexdigest()
    d.wait_until(lambda: ask().headers["X-Model-Digest"] == digest, 30, "the version of six steps")
    good = ask().body
    assert good != first.body
    # finite weights, a picture that is not
    desc = json.loads((live / "model.json").read_text())
    shutil.copytree(live / desc["latent"]["vae"]["file"], live / "vae-bad")
    path = live / "vae-bad/diffusion_pytorch_model.safetensors"
    raw = bytearray(path.read_bytes())
    (n,) = struct.unpack("<Q", raw[:8])
    at, end = (8 + n + o for o in json.loads(raw[8:8 + n])["decoder.conv_out.weight"]["data_offsets"])
    raw[at:end] = struct.pack("<f", 3e38) * ((end - at) // 4)
    path.write_bytes(raw)
    desc["latent"]["vae"] = {"file": "vae-bad", "sha256": hashlib.sha256(raw).hexdigest()}
    (live / "model.json").write_text(json.dumps(desc))
    d.wait_until(lambda: any(m["name"] == "made" and "trial picture" in m.get("reason", "") for m in d.get("/v2/repository/index").json()), 30, "the VAE refused")
    answer = ask()
    assert answer.body == good and answer.headers["X-Model-Digest"] == digest


@pytest.mark.parametrize("spoil, words", [
    (lambda d: png(d / "a" / "9.png", picture(1, 12, 12), 12, 12, 3), ["9.png", "12 x 12", "one size"]),
    (lambda d: png(d / "a" / "0.png", picture(1, 15, 12), 15, 12, 3), ["0.png", "multiples of 4"]),
    (lambda d: (d / "b" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish"), ["b/0.png"]),
    (lambda d: [shutil.rmtree(d / n) for n in "abc"], ["CLASS"]),
    (lambda d: (d / "z").mkdir(), ["z: the class has no PNG or JPEG"]), (lambda d: shutil.rmtree(d), ["No such file"]),
])
def test_encode_refuses(images, tmp_path, spoil, words):
    spoil(images)
    done = encode("--vae", VAE, "--images", images, "--out", tmp_path / "out.safetensors")
    assert done.returncode not in (0, 2) and all(w in done.stderr for w in words), done.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_encode_within_a_limit_on_files(images, tmp_path):
    done = subprocess.run(["prlimit", "--fsize=1000", BINARY, "encode", "--vae", VAE, "--images", images, "--out", tmp_path / "l" / "x.safetensors"],
                          capture_output=True, text=True, timeout=60 * SCALE, env=clean_env())
    assert done.returncode == 1 and "too large" in done.stderr and not list((tmp_path / "l").iterdir())


def test_encode_usage(images, tmp_path):
    done = encode("--vae", VAE, "--images", images, "--out", images / "a" / "0.png" / "x.safetensors")
    assert done.returncode == 1 and "is not a directory" in done.stderr
    assert encode("--images", images, "--out", "x").returncode == 2
    assert encode("--vae", VAE, "--images", images, "--out", "x", "--shard", "0").returncode == 2
    done = encode("--vae", ROOT / "tests" / "golden" / "sit-tiny.safetensors", "--images", images, "--out", tmp_path / "x")
    assert done.returncode != 0 and "AutoencoderKL" in done.stderr
    assert encode("--help").returncode == 0


IMPORT = ["import", ROOT / "tests/golden/sit-tiny.pt", "--family", "sit", "--heads", "2", "--path", "linear", "--prediction", "velocity"]


def run(*args):
    return subprocess.run([BINARY, *map(str, args)], capture_output=True, text=True, timeout=60 * SCALE, env=clean_env(), cwd=ROOT)


def sampled(model, out):
    done = run("sample", "--model", model, "--classes", "3", "--seed", "8", "--steps", "4", "--out", out)
    assert done.returncode == 0, done.stderr
    return out.read_bytes()


def test_import_brings_the_vae(tmp_path):
    done = run(*IMPORT, "--name", "made", "--out", tmp_path, "--vae", VAE)
    assert done.returncode == 0 and "the VAE's config" in done.stdout, done.stderr
    assert run(*IMPORT, "--name", "by-hand", "--out", tmp_path).returncode == 0
    add_vae(tmp_path / "by-hand")
    made, by_hand = (sampled(tmp_path / n, tmp_path / f"{n}.png") for n in ("made", "by-hand"))
    assert zlib.decompress(made[made.index(b"IDAT") + 4:]) == zlib.decompress(by_hand[by_hand.index(b"IDAT") + 4:])
    # the same once more changes nothing; statistics, from flags and of a VAE with a shift
    (folder,) = (tmp_path / "made").glob("vae-*")
    assert run(*IMPORT, "--name", "made", "--out", tmp_path, "--vae", VAE, "--latent-mean", "0,0.5,-1,0", "--latent-std", "5,5,5,5").returncode == 0
    assert json.loads((tmp_path / "made/model.json").read_text())["latent"] == {
        "vae": {"file": folder.name, "sha256": hashlib.sha256((folder / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()},
        "mean": [0, 0.5, -1, 0], "std": [5, 5, 5, 5]}
    shutil.copytree(VAE, tmp_path / "shifted")
    config = json.loads((VAE / "config.json").read_text())
    (tmp_path / "shifted/config.json").write_text(json.dumps({**config, "scaling_factor": 0.25, "shift_factor": 0.5}))
    assert run(*IMPORT, "--name", "shifted-model", "--out", tmp_path, "--vae", tmp_path / "shifted").returncode == 0
    latent = json.loads((tmp_path / "shifted-model/model.json").read_text())["latent"]
    assert (latent["mean"], latent["std"]) == ([0.5] * 4, [4] * 4)
    assert sampled(tmp_path / "shifted-model", tmp_path / "shifted.png") != made


@pytest.mark.parametrize("flags, code, words", [
    (["--latent-scale", "0"], 2, "--latent-scale"), (["--latent-std", "1,1,1,0"], 2, "--latent-std"), (["--latent-mean", "1,2", "--latent-std", "1,1,1,1"], 65, "--latent-mean"),
    (["--latent-mean", "1,2,3,4"], 65, "--latent-std"), (["--latent-mean", "1,2,3,4", "--latent-std", "1,1,1,1", "--latent-scale", "2"], 65, "--latent-scale"),
    (["--vae", "/nowhere"], 66, "/nowhere"), (["--vae", "tests/golden/sit-tiny.pt"], 65, "AutoencoderKL")])
def test_import_refuses_latents(tmp_path, flags, code, words):
    done = run(*IMPORT, "--name", "no", "--out", tmp_path, *flags)
    assert done.returncode == code and words in done.stderr, done.stderr
    assert not (tmp_path / "no").exists()


def test_import_refuses_a_vae_of_other_channels(tmp_path):
    (weights,) = (ROOT / "deploy/models/fashion-sit").glob("weights*")
    done = run("import", weights, "--name", "no", "--out", tmp_path, "--family", "sit", "--heads", 3, "--input-size", 32, "--path", "linear", "--prediction", "velocity", "--vae", VAE)
    assert done.returncode == 65 and "4 channels, the network 1" in done.stderr, done.stderr
    assert not (tmp_path / "no").exists()


def test_import_of_latents_without_a_vae_says_what_serving_needs(tmp_path):
    done = run(*IMPORT, "--name", "latents", "--out", tmp_path)
    assert done.returncode == 0 and "4 channels" in done.stderr and "--vae" in done.stderr, done.stderr
    assert "--vae" not in run(*IMPORT, "--name", "pictures", "--out", tmp_path, "--vae", VAE).stderr
