#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""usage: curves.py NAME=log.jsonl... > curves.svg

The losses of training runs by step, of their logs, on logarithmic axes: docs/bundled.svg. Each run's own report.html has more."""
import json
import math
import sys

W, H, LEFT, TOP, BOTTOM = 720, 300, 50, 12, 34
COLOURS = ["#1b6ca8", "#c2571a", "#2e7d32", "#7b1fa2"]


def main():
    if len(sys.argv) < 2 or not all("=" in a for a in sys.argv[1:]):
        sys.exit(__doc__)
    runs = [(a.split("=", 1)[0], [json.loads(line) for line in open(a.split("=", 1)[1])]) for a in sys.argv[1:]]
    points = [(name, [(line["step"], line["mse"]) for line in lines]) for name, lines in runs]
    xs, ys = ([math.log10(p[k]) for _, line in points for p in line] for k in (0, 1))
    low, high, first, last = math.floor(min(ys) * 2) / 2, math.ceil(max(ys) * 2) / 2, min(xs), max(xs)

    def at(step, loss):
        return LEFT + (math.log10(step) - first) / (last - first) * (W - LEFT - 12), TOP + (high - math.log10(loss)) / (high - low) * (H - TOP - BOTTOM)
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" font-family="sans-serif" font-size="11"><rect width="{W}" height="{H}" fill="#fff"/>')
    for loss in (v * 10 ** e for e in range(-4, 3) for v in (1, 2, 5)):
        if low <= math.log10(loss) <= high:
            y = at(10 ** first, loss)[1]
            print(f'<path d="M{LEFT} {y:.1f}H{W - 12}" stroke="#ddd"/><text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>')
    for step in (v * 10 ** e for e in range(2, 7) for v in (1, 2, 5)):
        if first <= math.log10(step) <= last:
            x = at(step, 10 ** low)[0]
            print(f'<path d="M{x:.1f} {TOP}V{H - BOTTOM}" stroke="#ddd"/><text x="{x:.1f}" y="{H - BOTTOM + 14}" text-anchor="middle">{step}</text>')
    for i, (name, line) in enumerate(points):
        path = " ".join("{:.1f},{:.1f}".format(*at(*p)) for p in line)
        print(f'<polyline points="{path}" fill="none" stroke="{COLOURS[i % 4]}" stroke-width="1.5"/>'
              f'<text x="{W - 150}" y="{TOP + 16 + 15 * i}" fill="{COLOURS[i % 4]}">{name}</text>')
    print(f'<text x="{(LEFT + W) / 2:.0f}" y="{H - 5}" text-anchor="middle">step</text></svg>')


if __name__ == "__main__":
    main()
