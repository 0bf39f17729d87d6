#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""Records torch-cpu.bin: what a PyTorch script as short as the authors' draws and samples with the bundled SiT after torch.manual_seed. Five pictures [32, 32] of bytes:
classes 0 to 3, seed 0, Euler in 10 steps, guidance 3, one batch; then class 9, seed 5, Euler-Maruyama (sigma, mean) in 10 steps, guidance 2. Needs python3-torch."""
import math
import pathlib

import torch

from torch_net import Net

ROOT = pathlib.Path(__file__).resolve().parents[2]


def guided(net, z, t, y, scale):
    half = z[:len(z) // 2]
    v = net(torch.cat([half, half]), torch.full((len(z),), t), y)[:, :net.channels]
    c, u = v.chunk(2)
    return torch.cat([u + scale * (c - u)] * 2)


def start(net, seed, classes):
    torch.manual_seed(seed)
    z = torch.randn(len(classes), net.channels, net.side, net.side)
    return torch.cat([z, z]), torch.tensor(classes + [net.null] * len(classes))


def ode(net, seed, classes, steps, scale):
    x, y = start(net, seed, classes)
    for i in range(steps):
        x = x + guided(net, x, i / steps, y, scale) / steps
    return x[:len(classes)]


def sde(net, seed, classes, steps, scale, last=0.04):  # linear path: alpha = t, sigma = 1 - t; D = sigma
    x, y = start(net, seed, classes)
    grid = torch.linspace(0, 1 - last, steps)
    h = (grid[1] - grid[0]).item()

    def drift(t):
        v = guided(net, x, t, y, scale)
        return v + (1 - t) * (t * v - x) / (1 - t)
    for t in grid[:-1].tolist():
        w = torch.randn(x.size())
        x = x + drift(t) * h + math.sqrt(2 * (1 - t) * h) * w
    return (x + drift(1 - last) * last)[:len(classes)]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    fashion = Net(ROOT / "deploy/models/fashion-sit")
    pictures = torch.cat([ode(fashion, 0, [0, 1, 2, 3], 10, 3), sde(fashion, 5, [9], 10, 2)])
    (ROOT / "tests/golden/torch-cpu.bin").write_bytes(bytes((127.5 * pictures + 128).clamp(0, 255).to(torch.uint8).flatten().tolist()))
