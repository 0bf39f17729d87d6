#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""Training steps of the bundled model's network beside stock PyTorch on this machine, two threads each, interleaved, medians over rounds.

$TORCH_PYTHON (else /usr/bin/python3): an interpreter with torch. OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE are unset for it. Processor time counts all threads:
trust it, not the clock, beside busy neighbours.
"""
import json
import os
import statistics
import subprocess

HERE = os.path.dirname(__file__)
PYTHON = os.environ.get("TORCH_PYTHON", "/usr/bin/python3").split(":")[0]
ROWS = os.environ.get("ROWS", "64")
ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = os.environ.get("BENCH_SECONDS", "3")


def main():
    clean = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    commands = {"sitd": ["build/release/bench-step", "deploy/models/fashion-sit", ROWS, "2", SECONDS]}
    if subprocess.run([PYTHON, "-c", "import torch"], stderr=subprocess.DEVNULL, env=clean).returncode == 0:
        commands["torch"] = [PYTHON, os.path.join(HERE, "torch_step.py"), "32,1,4,192,8,3,10", ROWS, "2", SECONDS]
    else:
        print(f"{PYTHON} has no torch: sitd alone (set TORCH_PYTHON)")
    found = {who: [] for who in commands}
    for _ in range(ROUNDS):
        for who, command in commands.items():
            found[who].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean, check=True, text=True).stdout))
    best = {who: {key: statistics.median(r[key] for r in runs) for key in ("ms", "processor_ms")} for who, runs in found.items()}
    for who, b in best.items():
        least = min(r["ms_min"] for r in found[who])
        print(f"{found[who][0]['who']:14} {ROWS} images a step: {b['ms']:8.1f} ms (least {least:.1f}), {b['processor_ms']:8.1f} processor ms")
    if "torch" in best:
        print("torch / sitd: " + ", ".join(f"{best['torch'][key] / best['sitd'][key]:.2f} by {name}" for key, name in (("ms", "clock"), ("processor_ms", "processor"))))


main()
