# SPDX-License-Identifier: MIT
"""The same training step in stock PyTorch, to time beside bench-step: velocity loss on a linear path, AdamW, one average.

usage: torch_step.py SHAPE ROWS THREADS SECONDS     SHAPE: input,channels,patch,width,depth,heads,classes
"""
import json
import statistics
import sys
import time

import torch
from torch_forward import Net


def step(net, average, optimiser, x1, t, y):
    noise = torch.randn_like(x1)
    mixed = t[:, None, None, None]
    out = net(mixed * x1 + (1 - mixed) * noise, t, y)[:, : x1.shape[1]]
    loss = (out - (x1 - noise)).square().mean()
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    with torch.no_grad():
        torch._foreach_lerp_(average, list(net.parameters()), 1e-4)


def main():
    side, channels, patch, width, depth, heads, classes = map(int, sys.argv[1].split(","))
    rows, seconds = int(sys.argv[2]), float(sys.argv[4])
    torch.set_num_threads(int(sys.argv[3]))
    net = Net(side, channels, patch, width, depth, heads, classes)
    average = [p.detach().clone() for p in net.parameters()]
    best = None
    for fused in (False, True):  # whichever is faster here
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0, fused=fused)
        x1, t, y = torch.randn(rows, channels, side, side), torch.rand(rows), torch.arange(rows) % classes
        wall, processor, start = [], [], time.perf_counter()
        while len(wall) < 4 or time.perf_counter() - start < seconds / 2:
            w, p = time.perf_counter(), time.process_time()
            step(net, average, optimiser, x1, t, y)
            wall.append(1e3 * (time.perf_counter() - w))
            processor.append(1e3 * (time.process_time() - p))
        found = {"who": "torch " + torch.__version__, "rows": rows, "runs": len(wall) - 1, "ms": statistics.median(wall[1:]), "ms_min": min(wall[1:]),
                 "processor_ms": statistics.median(processor[1:]), "fused": fused}
        if best is None or found["ms"] < best["ms"]:
            best = found
    print(json.dumps(best), flush=True)


main()
