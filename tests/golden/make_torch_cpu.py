#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""Records torch-cpu.bin: what a PyTorch script as short as the authors' draws and samples with the bundled SiT after torch.manual_seed. Five pictures [32, 32] of bytes:
classes 0 to 3, seed 0, Euler in 10 steps, guidance 3, one batch; then class 9, seed 5, Euler-Maruyama (sigma, mean) in 10 steps, guidance 2. Needs python3-torch."""
import json
import math
import pathlib
import struct

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEADS, PATCH = 3, 4


def weights(path):
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8:8 + n])
    head.pop("__metadata__", None)
    types = {"F32": torch.float32, "F16": torch.float16}
    return {k: torch.frombuffer(bytearray(raw[8 + n + v["data_offsets"][0]:8 + n + v["data_offsets"][1]]), dtype=types[v["dtype"]]).view(v["shape"]).float()
            for k, v in head.items()}


W = weights(next((ROOT / "deploy/models/fashion-sit").glob("weights*.safetensors")))


def linear(x, name):
    return F.linear(x, W[name + ".weight"], W[name + ".bias"])


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def attention(x, name):
    b, n, d = x.shape
    q, k, v = linear(x, name + ".qkv").view(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
    x = ((q @ k.transpose(-1, -2)) / math.sqrt(d // HEADS)).softmax(-1) @ v
    return linear(x.transpose(1, 2).reshape(b, n, d), name + ".proj")


def net(x, t, y):
    b, c, side, _ = x.shape
    tokens = F.conv2d(x, W["x_embedder.proj.weight"], W["x_embedder.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2) + W["pos_embed"]
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    emb = linear(F.silu(linear(torch.cat([angle.cos(), angle.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    cond = F.silu(emb + W["y_embedder.embedding_table.weight"][y])
    depth = 1 + max(int(k.split(".")[1]) for k in W if k.startswith("blocks."))
    for i in range(depth):
        m = linear(cond, f"blocks.{i}.adaLN_modulation.1").chunk(6, 1)
        tokens = tokens + m[2][:, None] * attention(modulated(tokens, m[0], m[1]), f"blocks.{i}.attn")
        h = F.gelu(linear(modulated(tokens, m[3], m[4]), f"blocks.{i}.mlp.fc1"), approximate="tanh")
        tokens = tokens + m[5][:, None] * linear(h, f"blocks.{i}.mlp.fc2")
    shift, scale = linear(cond, "final_layer.adaLN_modulation.1").chunk(2, 1)
    out = linear(modulated(tokens, shift, scale), "final_layer.linear")
    g = side // PATCH
    out = torch.einsum("nhwpqc->nchpwq", out.view(b, g, g, PATCH, PATCH, -1)).reshape(b, -1, side, side)
    return out[:, :c]


def guided(z, t, y, scale):
    half = z[:len(z) // 2]
    v = net(torch.cat([half, half]), torch.full((len(z),), t), y)
    c, u = v.chunk(2)
    return torch.cat([u + scale * (c - u)] * 2)


def start(seed, classes):
    torch.manual_seed(seed)
    z = torch.randn(len(classes), 1, 32, 32)
    return torch.cat([z, z]), torch.tensor(classes + [10] * len(classes))


def ode(seed, classes, steps, scale):
    x, y = start(seed, classes)
    for i in range(steps):
        x = x + guided(x, i / steps, y, scale) / steps
    return x[:len(classes)]


def sde(seed, classes, steps, scale, last=0.04):  # linear path: alpha = t, sigma = 1 - t; D = sigma
    x, y = start(seed, classes)
    grid = torch.linspace(0, 1 - last, steps)
    h = (grid[1] - grid[0]).item()

    def drift(t):
        v = guided(x, t, y, scale)
        return v + (1 - t) * (t * v - x) / (1 - t)
    for t in grid[:-1].tolist():
        w = torch.randn(x.size())
        x = x + drift(t) * h + math.sqrt(2 * (1 - t) * h) * w
    return (x + drift(1 - last) * last)[:len(classes)]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    pictures = torch.cat([ode(0, [0, 1, 2, 3], 10, 3), sde(5, [9], 10, 2)])
    (ROOT / "tests/golden/torch-cpu.bin").write_bytes(bytes((127.5 * pictures + 128).clamp(0, 255).to(torch.uint8).flatten().tolist()))
