#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""Forward passes of sitd beside stock PyTorch on this machine, interleaved, medians over rounds. Prints a table, writes build/bench-forward.csv.

Torch interpreters: $TORCH_PYTHON (a list separated by colons), else /usr/bin/python3 when it has torch. OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE are unset
for them. The faster of the interpreters' medians is the one compared with.
"""
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys

SITD = os.environ.get("SITD", "build/sitd")
ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = os.environ.get("BENCH_SECONDS", "1.5")
CASES = [  # name, arguments of sitd bench, torch shape, rows
    ("fashion-sit", ["--model", "deploy/models/fashion-sit"], "32,1,4,192,8,3,10", [2, 16]),
    ("SiT-B/2", ["--shape", "B/2"], "32,4,2,768,12,12,1000", [2, 16]),
]


def lines(command, env=None):
    return [json.loads(l) for l in subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, check=True, text=True).stdout.splitlines()]


def torches():
    clean = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    found = []
    for python in os.environ.get("TORCH_PYTHON", "/usr/bin/python3").split(":"):
        if subprocess.run([python, "-c", "import torch"], stderr=subprocess.DEVNULL, env=clean).returncode == 0:
            found.append(python)
    return found, clean


def main():
    pythons, clean = torches()
    if not pythons:
        print("no interpreter with torch found: sitd alone (set TORCH_PYTHON)", file=sys.stderr)
    rows_out = []
    for name, arguments, shape, rows in CASES:
        text = ",".join(map(str, rows))
        times = {}
        for _ in range(ROUNDS):
            for precision in ("f32", "bf16"):
                try:
                    for l in lines([SITD, "bench", *arguments, "--rows", text, "--seconds", SECONDS, "--threads", "2", "--precision", precision]):
                        times.setdefault(("sitd", precision, l["rows"]), []).append(l["ms"])
                        gflop = l["ms"] * l["gflops"] / 1e3 / l["rows"]
                except subprocess.CalledProcessError:
                    pass  # this processor has no bf16 products
            for python in pythons:
                for l in lines([python, os.path.join(os.path.dirname(__file__), "torch_forward.py"), shape, text, SECONDS, "f32", "2"], clean):
                    times.setdefault(("torch " + l["torch"], "f32", l["rows"]), []).append(l["ms"])
        medians = {k: statistics.median(v) for k, v in times.items()}
        for n in rows:
            best = min((v for k, v in medians.items() if k[0].startswith("torch") and k[2] == n), default=None)
            for (who, precision, r), ms in sorted(medians.items()):
                if r == n:
                    rows_out.append([name, n, who, precision, round(ms, 3), round(gflop * n / ms * 1e3, 1), round(best / ms, 2) if best else ""])
    head = ["model", "rows", "who", "precision", "ms (median)", "GFLOP/s", "x best torch f32"]
    widths = [max(len(str(r[i])) for r in rows_out + [head]) for i in range(len(head))]
    for r in [head, *rows_out]:
        print("  ".join(str(v).ljust(w) for v, w in zip(r, widths)))
    os.makedirs("build", exist_ok=True)
    with open("build/bench-forward.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["date", "machine", "commit", *head])
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], stdout=subprocess.PIPE, text=True).stdout.strip()
        for r in rows_out:
            out.writerow([datetime.date.today(), platform.processor() or platform.machine(), commit, *r])


main()
