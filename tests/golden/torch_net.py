# SPDX-License-Identifier: MIT
"""A DiT or SiT with adaLN-Zero in plain PyTorch, read from the papers: float32, on any device, from safetensors or from a .pt's EMA. The scripts that record cases and
measure losses share it; nothing in it was taken from the C code but the names of the tensors. Needs python3-torch."""
import argparse
import json
import math
import struct

import torch
import torch.nn.functional as F

TYPES = {"F32": torch.float32, "F16": torch.float16}


def read_safetensors(path):
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8:8 + n])
    head.pop("__metadata__", None)
    return {k: torch.frombuffer(bytearray(raw[8 + n + v["data_offsets"][0]:8 + n + v["data_offsets"][1]]), dtype=TYPES[v["dtype"]]).view(v["shape"]).float()
            for k, v in head.items()}


class Net:
    """path: a model directory, or a .pt of the authors' training scripts; its heads tell nothing of themselves."""

    def __init__(self, path, heads=None, device="cpu"):
        if path.is_dir():
            self.desc = json.loads((path / "model.json").read_text())
            w, heads = read_safetensors(path / self.desc["weights"]["file"]), self.desc["architecture"]["num_heads"]
        else:
            if hasattr(torch.serialization, "add_safe_globals"):  # the scripts' args lie in the file too
                torch.serialization.add_safe_globals([argparse.Namespace])
            w = torch.load(path, map_location="cpu")["ema"]
        self.w, self.heads = {k: v.float().to(device) for k, v in w.items()}, heads
        self.depth = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks."))
        width, self.channels, self.patch = w["x_embedder.proj.weight"].shape[:3]
        self.null = len(w["y_embedder.embedding_table.weight"]) - 1
        if "pos_embed" not in w:  # frozen, so not stored by everybody
            self.w["pos_embed"] = positions(self.desc["architecture"]["input_size"] // self.patch, width).to(device)
        self.side = self.patch * math.isqrt(self.w["pos_embed"].shape[1])

    def linear(self, x, name):
        return F.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def attention(self, x, name):
        b, n, d = x.shape
        q, k, v = self.linear(x, name + ".qkv").view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = ((q @ k.transpose(-1, -2)) / math.sqrt(d // self.heads)).softmax(-1) @ v
        return self.linear(x.transpose(1, 2).reshape(b, n, d), name + ".proj")

    def condition(self, t, y):
        angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        emb = self.linear(torch.cat([angle.cos(), angle.sin()], 1), "t_embedder.mlp.0")
        return F.silu(self.linear(F.silu(emb), "t_embedder.mlp.2") + self.w["y_embedder.embedding_table.weight"][y])

    def __call__(self, x, t, y):
        """x [B, C, side, side], t [B] as the network takes it, y [B] -> all output channels."""
        b, side = x.shape[0], x.shape[-1]
        tokens = F.conv2d(x, self.w["x_embedder.proj.weight"], self.w["x_embedder.proj.bias"], stride=self.patch).flatten(2).transpose(1, 2) + self.w["pos_embed"]
        cond = self.condition(t.float(), y)
        for i in range(self.depth):
            m = self.linear(cond, f"blocks.{i}.adaLN_modulation.1").chunk(6, 1)
            tokens = tokens + m[2][:, None] * self.attention(modulated(tokens, m[0], m[1]), f"blocks.{i}.attn")
            h = F.gelu(self.linear(modulated(tokens, m[3], m[4]), f"blocks.{i}.mlp.fc1"), approximate="tanh")
            tokens = tokens + m[5][:, None] * self.linear(h, f"blocks.{i}.mlp.fc2")
        shift, scale = self.linear(cond, "final_layer.adaLN_modulation.1").chunk(2, 1)
        out = self.linear(modulated(tokens, shift, scale), "final_layer.linear")
        g = side // self.patch
        return torch.einsum("nhwpqc->nchpwq", out.view(b, g, g, self.patch, self.patch, -1)).reshape(b, -1, side, side)


def positions(grid, width):
    """Sines and cosines of a token's column, then of its row: [1, grid * grid, width]"""
    at = torch.arange(grid, dtype=torch.float64)
    angle = at[:, None] / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    line = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([line.repeat(grid, 1), line.repeat_interleave(grid, 0)], 1)[None].float()


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def write_safetensors(path, tensors, meta):
    """tensors: float32 or int64; meta: strings."""
    head, at, kinds = {"__metadata__": meta}, 0, {torch.float32: "F32", torch.int64: "I64"}
    for k, v in tensors.items():
        size = v.numel() * v.element_size()
        head[k] = {"dtype": kinds[v.dtype], "shape": list(v.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head, separators=(",", ":"))
    text = (text + " " * (-len(text) % 8)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(v.contiguous().numpy().tobytes() for v in tensors.values()))
