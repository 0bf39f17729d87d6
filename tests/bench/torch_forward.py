# SPDX-License-Identifier: MIT
"""The same network's forward pass in stock PyTorch, to time beside `sitd bench`.

Plain nn.Linear, layer_norm and scaled_dot_product_attention (torch < 2: softmax), as a user would write it. One JSON line a row count.
usage: torch_forward.py SHAPE ROWS[,ROWS...] SECONDS [f32|bf16] [threads]     SHAPE: input,channels,patch,width,depth,heads,classes
"""
import json
import math
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mod = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.act = nn.GELU(approximate="tanh")

    def attention(self, u):
        rows, tokens, width = u.shape
        q, k, v = self.qkv(u).view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if hasattr(F, "scaled_dot_product_attention"):
            o = F.scaled_dot_product_attention(q, k, v)
        else:
            o = ((q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return self.proj(o.transpose(1, 2).reshape(rows, tokens, width))

    def forward(self, x, silu_c):
        a, b, g, d, e, h = self.mod(silu_c).unsqueeze(1).chunk(6, 2)
        x = x + g * self.attention(self.norm(x) * (1 + b) + a)
        return x + h * self.fc2(self.act(self.fc1(self.norm(x) * (1 + e) + d)))


class Net(nn.Module):
    def __init__(self, side, channels, patch, width, depth, heads, classes):
        super().__init__()
        self.patch, self.out = patch, 2 * channels
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.pos = nn.Parameter(torch.randn(1, (side // patch) ** 2, width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mod, self.last = nn.Linear(width, 2 * width), nn.Linear(width, patch * patch * self.out)
        self.register_buffer("freq", torch.exp(-math.log(10000) * torch.arange(128) / 128))

    def forward(self, x, t, y):
        rows, _, side, _ = x.shape
        grid = side // self.patch
        angle = t[:, None] * self.freq
        c = F.silu(self.time(torch.cat([angle.cos(), angle.sin()], 1)) + self.label(y))
        u = self.embed(x).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            u = block(u, c)
        a, b = self.mod(c).unsqueeze(1).chunk(2, 2)
        u = self.last(self.norm(u) * (1 + b) + a)
        u = u.view(rows, grid, grid, self.patch, self.patch, self.out)
        return u.permute(0, 5, 1, 3, 2, 4).reshape(rows, self.out, side, side)


def main():
    side, channels, patch, width, depth, heads, classes = map(int, sys.argv[1].split(","))
    precision = sys.argv[4] if len(sys.argv) > 4 else "f32"
    torch.set_num_threads(int(sys.argv[5]) if len(sys.argv) > 5 else 2)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    net = Net(side, channels, patch, width, depth, heads, classes).eval().to(dtype)
    for rows in map(int, sys.argv[2].split(",")):
        x, t = torch.randn(rows, channels, side, side, dtype=dtype), torch.full((rows,), 0.5, dtype=dtype)
        y = torch.arange(rows) % classes
        times, start = [], time.perf_counter()
        with torch.no_grad():
            while len(times) < 4 or time.perf_counter() - start < float(sys.argv[3]):
                before = time.perf_counter()
                net(x, t, y)
                times.append(1e3 * (time.perf_counter() - before))
        times = times[1:]
        print(json.dumps({"torch": torch.__version__, "precision": precision, "rows": rows, "runs": len(times), "ms": statistics.median(times), "ms_min": min(times)}), flush=True)


if __name__ == "__main__":
    main()
