# SPDX-License-Identifier: MIT
"""Forward passes of sitd beside torch.compile (CUDA graphs) on one GPU, in turns A B A B. Prints a table; with a path, writes it there as CSV.

usage: bench_torch.py [results.csv]    environment: SITD (build/sitd), SHAPES ("XL/2:2,16,64 B/2:2,64 S/2:64"), SECONDS, ROUNDS
The torch side is tests/bench/torch_forward.py's network, all bfloat16: what a user runs.
"""
import csv
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
SHAPES = os.environ.get("SHAPES", "XL/2:2,16,64 B/2:2,64 S/2:64")
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

source = open(os.path.join(here, "..", "bench", "torch_forward.py")).read()
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


def torch_model(shape):
    width, depth, heads = SIZES[shape.split("/")[0]]
    torch.manual_seed(1)
    net = module["Net"](32, 4, int(shape.split("/")[1]), width, depth, heads, 1001)
    for p in net.parameters():
        p.data.normal_(0, 0.02)
    return net.cuda().eval().to(torch.bfloat16).requires_grad_(False)


def compiled(net, rows):
    x, t, y = torch.randn(rows, 4, 32, 32, device="cuda", dtype=torch.bfloat16), torch.full((rows,), 0.5, device="cuda", dtype=torch.bfloat16), torch.arange(rows, device="cuda") % 1000
    fast = torch.compile(net, mode="reduce-overhead", dynamic=False)

    def run():
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return fast(x, t, y)
    for _ in range(3):
        run()
    return run


def sitd_ms(shape, rows, seconds):
    command = [SITD, "bench", "--shape", shape, "--rows", ",".join(map(str, rows)), "--seconds", str(seconds), "--backend", "cuda", "--precision", "bf16"]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return {json.loads(line)["rows"]: (json.loads(line)["ms"], json.loads(line)["gflops"]) for line in out.splitlines()}


def main():
    table = []
    for item in SHAPES.split():
        shape, rows = item.split(":")[0], [int(r) for r in item.split(":")[1].split(",")]
        ours, theirs = {}, {}
        net = torch_model(shape)
        runs = {r: compiled(net, r) for r in rows}
        for _ in range(ROUNDS):
            for r in rows:
                theirs.setdefault(r, []).append(torch_ms(runs[r], SECONDS))
            for r, ms in sitd_ms(shape, rows, SECONDS).items():
                ours.setdefault(r, []).append(ms)
        for r in rows:
            a, b = statistics.median(m for m, _ in ours[r]), statistics.median(theirs[r])
            tflops = statistics.median(g * m for m, g in ours[r]) / a / 1e3
            table.append([shape, r, round(b, 3), round(a, 3), round(tflops, 1), round(b / a, 3)])
            print(*table[-1], " torch", [round(m, 3) for m in theirs[r]], "sitd", [round(m, 3) for m, _ in ours[r]], flush=True)
        del net, runs
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    head = ["shape", "rows", "torch.compile ms", "sitd ms", "sitd TFLOP/s", "times faster"]
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for line in [head, *table]:
        print("  ".join(str(v).ljust(16) for v in line))
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", newline="") as f:
            csv.writer(f).writerows([head, *table])


main()
