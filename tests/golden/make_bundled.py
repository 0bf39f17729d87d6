#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""Records tests/golden/bundled: evaluations and samples of the models in deploy/models by the network of torch_net.py (float32), in the layout of this folder's other cases.
To be run whenever one of them is trained anew. Needs python3-torch."""
import json
import math
import pathlib

import torch

from torch_net import Net, write_safetensors

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/golden/bundled"
IMAGES, LAST, ABAR = 2, 0.04, torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def record(name, net, case, meta):
    a = net.desc["architecture"]
    config = {k: a[k] for k in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes", "learn_sigma")}
    write_safetensors(OUT / f"{name}.safetensors", case, {"family": net.desc["family"], "config": json.dumps(config), **meta})
    print(name, {k: list(v.shape) for k, v in case.items()})


def noise(net, *head):
    return torch.randn(*head, net.channels, net.side, net.side)


def forward(name, net, times):
    x, t, y = noise(net, len(times)), torch.tensor(times), torch.arange(len(times)) * 3 % net.null
    out, kept = net(x, t, y), 2 * net.channels if net.desc["family"] == "dit" else net.channels
    case = {"x": x, "t": t, "y": y, "out": out[:, :kept]}
    if net.desc["family"] == "sit":
        case["out_null"] = net(x, t, torch.full_like(y, net.null))[:, :kept]
    record(f"{name}.forward", net, case, {"kind": "forward"})


def guided(net, x, t, y, scale):
    at = torch.full((len(x),), float(t))
    v = net(x, at, y)[:, :net.channels]
    if scale == 1:
        return v
    null = net(x, at, torch.full_like(y, net.null))[:, :net.channels]
    return null + scale * (v - null)


def ode(name, net, method, scale, points):
    x0, y, grid = noise(net, IMAGES), torch.tensor([9, 2]), torch.linspace(0, 1, points)
    x = x0
    for t, end in zip(grid[:-1], grid[1:]):
        h, v = end - t, guided(net, x, t, y, scale)
        x = x + h * (v if method == "euler" else (v + guided(net, x + h * v, end, y, scale)) / 2)
    record(f"{name}.ode.{method}.cfg{scale}", net, {"x0": x0, "y": y, "out": x},
           {"kind": "sample", "sampler": "ode", "path": "Linear", "prediction": "velocity", "method": method, "num_steps": str(points), "cfg": str(scale), "atol": "1e-06", "rtol": "0.001"})


def sde(name, net, scale, points):
    """Stochastic Heun with w_t = sigma, its last step the mean: on the linear path alpha = t, sigma = 1 - t."""
    x0, y, grid = noise(net, IMAGES), torch.tensor([5, 8]), torch.linspace(0, 1 - LAST, points)
    draws, x = noise(net, points - 1, IMAGES), x0

    def drift(x, t):
        v = guided(net, x, t, y, scale)
        return v + (t * v - x)  # sigma times the score, (t v - x)/sigma
    h = grid[1] - grid[0]
    for t, w in zip(grid[:-1], draws):
        x = x + torch.sqrt(2 * (1 - t) * h) * w
        k = drift(x, t)
        x = x + h * (k + drift(x + h * k, t + h)) / 2
    x = x + LAST * drift(x, grid[-1])
    record(f"{name}.sde.Heun.sigma.Mean.cfg{scale}", net, {"x0": x0, "y": y, "noise": draws, "out": x},
           {"kind": "sample", "sampler": "sde", "path": "Linear", "prediction": "velocity", "method": "Heun", "diffusion_form": "sigma", "diffusion_norm": "1.0",
            "last_step": "Mean", "last_step_size": str(LAST), "num_steps": str(points), "cfg": str(scale)})


def ddim(name, net, steps):
    x0, y = noise(net, IMAGES), torch.tensor([7, 1])
    x, used = x0, [round(i * 999 / (steps - 1)) for i in range(steps)]
    for i in reversed(range(steps)):
        now, before = float(ABAR[used[i]]), float(ABAR[used[i - 1]]) if i else 1.0
        eps = guided(net, x, used[i], y, 1)
        clean = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        x = math.sqrt(before) * clean + math.sqrt(1 - before) * eps
    record(f"{name}.ddim.{steps}", net, {"x0": x0, "y": y, "out": x},
           {"kind": "sample", "sampler": "ddim", "respacing": str(steps), "eta": "0.0", "cfg": "1.0", "clip": "false"})


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.manual_seed(20)
    OUT.mkdir(exist_ok=True)
    sit, dit, emoji = (Net(ROOT / "deploy/models" / name) for name in ("fashion-sit", "fashion-dit", "emoji-sit"))
    forward("fashion-sit", sit, [0.0, 0.3, 0.8, 1.0])
    ode("fashion-sit", sit, "euler", 4.0, 25)
    ode("fashion-sit", sit, "heun2", 1.0, 25)
    sde("fashion-sit", sit, 4.0, 10)
    forward("fashion-dit", dit, [0, 300, 700, 999])
    ddim("fashion-dit", dit, 10)
    forward("emoji-sit", emoji, [0.1, 0.9])
    ode("emoji-sit", emoji, "heun2", 3.0, 10)
