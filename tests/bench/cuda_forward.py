# SPDX-License-Identifier: MIT
"""Forward passes of sitd beside torch.compile (CUDA graphs) on one GPU, in turns A B A B. Prints a table; with a path, appends it there as CSV.

usage: cuda_forward.py [results.csv]
environment: SITD (build/sitd), SHAPES ("XL/2:2,16,64 XL/2@64:16 B/2:2,64 S/2:64"; @64: latents of 64 x 64), SECONDS, ROUNDS, PRECISION (of sitd, bf16),
  LOCK (a file that is locked while timing, so that several of these may compile at once)
The torch side is torch_forward.py's network, all bfloat16: what a user runs.
"""
import csv
import datetime
import fcntl
import json
import os
import statistics
import subprocess
import sys

import torch

here = os.path.dirname(os.path.abspath(__file__))
SITD = os.environ.get("SITD", "build/sitd")
SECONDS = float(os.environ.get("SECONDS", "2"))
ROUNDS = int(os.environ.get("ROUNDS", "2"))
SHAPES = os.environ.get("SHAPES", "XL/2:2,16,64 XL/2@64:16 B/2:2,64 S/2:64")
PRECISION = os.environ.get("PRECISION", "bf16")
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
HEAD = ["date", "card", "commit", "precision", "shape", "rows", "torch.compile ms", "sitd ms", "sitd TFLOP/s", "times faster", "SM clock MHz", "power W"]

source = open(os.path.join(here, "torch_forward.py")).read()
module = {"__name__": "torch_forward"}
exec(compile(source.replace("\nmain()\n", "\n"), "torch_forward.py", "exec"), module)


def torch_ms(run, seconds):
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    times = []
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    total = 0.0
    while total < 1e3 * seconds or len(times) < 5:
        start.record()
        for _ in range(8):
            run()
        end.record()
        end.synchronize()
        total += start.elapsed_time(end)
        times.append(start.elapsed_time(end) / 8)
    return statistics.median(times)


def card_state():
    """SM clock and power right after a load: what the power limit leaves."""
    out = subprocess.run(["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"], stdout=subprocess.PIPE, text=True).stdout
    return [round(float(v)) for v in out.splitlines()[0].split(",")] if out else [0, 0]


def torch_model(size, patch, side):
    width, depth, heads = SIZES[size]
    torch.manual_seed(1)
    net = module["Net"](side, 4, patch, width, depth, heads, 1001)
    for p in net.parameters():
        p.data.normal_(0, 0.02)
    return net.cuda().eval().to(torch.bfloat16).requires_grad_(False)


def compiled(net, rows, side):
    x, t = torch.randn(rows, 4, side, side, device="cuda", dtype=torch.bfloat16), torch.full((rows,), 0.5, device="cuda", dtype=torch.bfloat16)
    y = torch.arange(rows, device="cuda") % 1000
    fast = torch.compile(net, mode="reduce-overhead", dynamic=False)

    def run():
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return fast(x, t, y)
    for _ in range(3):
        run()
    return run


def sitd_ms(shape, side, rows, seconds):
    command = [SITD, "bench", "--shape", shape, "--side", str(side), "--rows", ",".join(map(str, rows)), "--seconds", str(seconds), "--backend", "cuda",
               "--precision", PRECISION]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return {json.loads(line)["rows"]: (json.loads(line)["ms"], json.loads(line)["gflops"]) for line in out.splitlines()}


def measure(shape, side, rows, runs):
    ours, theirs, states = {}, {}, {}
    for _ in range(ROUNDS):
        for r in rows:
            theirs.setdefault(r, []).append(torch_ms(runs[r], SECONDS))
            states[r] = card_state()
        for r, ms in sitd_ms(shape, side, rows, SECONDS).items():
            ours.setdefault(r, []).append(ms)
    for r in rows:
        a, b = statistics.median(m for m, _ in ours[r]), statistics.median(theirs[r])
        tflops = statistics.median(g * m for m, g in ours[r]) / a / 1e3
        print(shape, side, r, "torch", [round(m, 3) for m in theirs[r]], "sitd", [round(m, 3) for m, _ in ours[r]], flush=True)
        yield [f"{shape}@{side}", r, round(b, 3), round(a, 3), round(tflops, 1), round(b / a, 3), *states[r]]


def main():
    work = []
    for item in SHAPES.split():
        name, rows = item.split(":")[0], [int(r) for r in item.split(":")[1].split(",")]
        shape, side = name.split("@")[0], int(name.split("@")[1]) if "@" in name else 32
        net = torch_model(shape.split("/")[0], int(shape.split("/")[1]), side)
        work.append((shape, side, rows, {r: compiled(net, r, side) for r in rows}))
        torch._dynamo.reset()
    print("compiled", flush=True)
    version = subprocess.run([SITD, "--version"], stdout=subprocess.PIPE, text=True).stdout.split()
    about = [datetime.date.today().isoformat(), torch.cuda.get_device_name(), os.environ.get("COMMIT", version[-1].strip("()")), PRECISION]
    lock = open(os.environ.get("LOCK", os.devnull), "w")
    if "LOCK" in os.environ:
        fcntl.flock(lock, fcntl.LOCK_EX)
    table = [[*about, *line] for shape, side, rows, runs in work for line in measure(shape, side, rows, runs)]
    for line in [HEAD[3:], *(t[3:] for t in table)]:
        print("  ".join(str(v).ljust(12) for v in line))
    if len(sys.argv) > 1:
        new = not os.path.exists(sys.argv[1])
        with open(sys.argv[1], "a", newline="") as f:
            csv.writer(f).writerows(([HEAD] if new else []) + table)


main()
