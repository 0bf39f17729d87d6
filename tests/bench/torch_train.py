# SPDX-License-Identifier: MIT
"""A whole training step in stock PyTorch, to time beside bench-train: torch.compile, bfloat16 autocast, fused AdamW, one EMA (foreach). One JSON line a shape.

usage: torch_train.py SHAPE:ROWS[,SHAPE:ROWS...] [STEPS]      for example XL/2:64,B/2:256
The network is torch_forward.py's, with random weights; memory is torch.cuda.max_memory_allocated.
"""
import json
import os
import sys
import time

import torch

here = os.path.dirname(os.path.abspath(__file__))
source = open(os.path.join(here, "torch_forward.py")).read()
module = {"__name__": "torch_forward"}
exec(compile(source.replace("\nmain()\n", "\n"), "torch_forward.py", "exec"), module)
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def step_of(shape, rows):
    width, depth, heads = SIZES[shape.split("/")[0]]
    torch.manual_seed(1)
    net = module["Net"](32, 4, int(shape.split("/")[1]), width, depth, heads, 1000).cuda()
    for p in net.parameters():
        p.data.normal_(0, 0.02)
    params = list(net.parameters())
    ema = [p.detach().clone() for p in params]
    fast = torch.compile(net)
    optimiser = torch.optim.AdamW(params, lr=1e-4, weight_decay=0, fused=True)
    x1, y = torch.randn(rows, 4, 32, 32, device="cuda"), torch.randint(0, 1001, (rows,), device="cuda")

    def step():
        x0, t = torch.randn_like(x1), torch.rand(rows, device="cuda")
        s = t[:, None, None, None]
        with torch.autocast("cuda", torch.bfloat16):
            out = fast(s * x1 + (1 - s) * x0, t, y)
            loss = (out.float()[:, :4] - (x1 - x0)).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1e-4)
    return step


def main():
    torch.set_float32_matmul_precision("high")
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    for item in sys.argv[1].split(","):
        shape, rows = item.split(":")[0], int(item.split(":")[1])
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = step_of(shape, rows)
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - begin) / steps
        print(json.dumps({"torch": torch.__version__, "shape": shape, "rows": rows, "ms": round(ms, 2), "images_per_s": round(1e3 * rows / ms),
                          "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}), flush=True)


main()
