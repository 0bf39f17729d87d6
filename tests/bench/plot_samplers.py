#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""Draws the CSV of bench-samplers: plot_samplers.py IN.csv OUT.svg. The standard library alone."""
import csv
import math
import sys

PANELS = {  # name in the CSV: title, what is measured, lowest decade
    "deterministic": ("Deterministic", "mixture of two Gaussians", -8),
    "noise euler": ("With noise, Euler steps", "one Gaussian", -4),
    "noise heun": ("With noise, Heun steps", "one Gaussian", -4),
}
COLOURS = ["#0b6fa4", "#d55e00", "#00875f", "#a4468b", "#b8860b", "#3f3f3f", "#4aa3df", "#c0392b", "#7a6ea8", "#6b8e23", "#8c6d5a", "#111111"]
LEFT, TOP, WIDE, HIGH, GAP, ROW = 64, 92, 320, 380, 68, 17
FIRST, LAST = 3, 8  # log2 of the evaluations, ticks
EDGE = 2.75  # log2 of the left edge: some samplers make 7 of 8 allowed
INK, DIM, GRID = "#23211d", "#6d675d", "#e7e3da"


def read(path):
    curves = {name: {} for name in PANELS}
    with open(path, newline="") as f:
        for r in csv.DictReader(f):
            curves[r["panel"]].setdefault(r["sampler"], []).append((int(r["evaluations"]), float(r["error"])))
    return curves


def text(x, y, s, size=12, fill=INK, **more):
    extra = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in more.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{extra}>{s}</text>'


def line(x1, y1, x2, y2, stroke, width=1.0, dash=""):
    d = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" stroke-width="{width}"{d}/>'


def marker(kind, x, y, colour):
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>'
    if kind == 1:
        return f'<rect x="{x - 2.9:.1f}" y="{y - 2.9:.1f}" width="5.8" height="5.8" fill="{colour}"/>'
    if kind == 2:
        return f'<path d="M{x:.1f} {y - 3.9:.1f}l3.7 6.6h-7.4z" fill="{colour}"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.9" fill="#fff" stroke="{colour}" stroke-width="1.5"/>'


def across(x0, evaluations):
    return x0 + WIDE * (math.log2(evaluations) - EDGE) / (LAST - EDGE)


def style(i, name, noisy):
    """Colour, dash and marker. Curves that lie on one another (exponential on euler, linear on sigma) stay visible as dashes."""
    if noisy and name.startswith("ode "):
        return DIM, "2 3", 3  # the deterministic one for comparison
    dash = "5 4" if name == "ode exponential" or name.endswith((" linear", "tweedie")) else ""
    return COLOURS[i % len(COLOURS)], dash, i % 4


def axes(x0, low, index):
    out = [f'<rect x="{x0}" y="{TOP}" width="{WIDE}" height="{HIGH}" fill="#fff"/>']
    for e in range(low, 1):
        y = TOP + HIGH * e / low
        out.append(line(x0, y, x0 + WIDE, y, GRID))
        out.append(text(x0 - 7, y + 4, f'10<tspan dy="-5" font-size="9">{e if e >= 0 else "−" + str(-e)}</tspan>', 12, DIM, text_anchor="end"))
    for e in range(FIRST, LAST + 1):
        x = across(x0, 2**e)
        out.append(line(x, TOP, x, TOP + HIGH, GRID))
        out.append(text(x, TOP + HIGH + 17, str(2**e), 12, DIM, text_anchor="middle"))
    out.append(f'<rect x="{x0}" y="{TOP}" width="{WIDE}" height="{HIGH}" fill="none" stroke="#b9b2a4"/>')
    out.append(text(x0 + WIDE / 2, TOP + HIGH + 36, "network evaluations", 12, INK, text_anchor="middle"))
    if index == 0:
        out.append(text(17, TOP + HIGH / 2, "error (Wasserstein-2)", 12, INK, text_anchor="middle", transform=f"rotate(-90 17 {TOP + HIGH / 2})"))
    return out


def label(sampler, noisy):
    if noisy and sampler.startswith("ode "):
        return sampler + " (no noise, for comparison)"
    return sampler.replace(" last ", ", last step ")


def panel(index, name, curves):
    title, data, low = PANELS[name]
    x0 = LEFT + index * (WIDE + GAP)
    out = [text(x0, TOP - 26, title, 15, font_weight=600), text(x0, TOP - 9, "data: " + data, 12, DIM)]
    out += axes(x0, low, index)
    legend = TOP + HIGH + 64
    pad = WIDE * 0.02
    out.append(f'<clipPath id="c{index}"><rect x="{x0 - 5}" y="{TOP}" width="{WIDE + 10}" height="{HIGH + 4}"/></clipPath>')
    for i, (sampler, points) in enumerate(curves.items()):
        colour, dash, kind = style(i, sampler, index > 0)
        at = [(across(x0, n), TOP + HIGH * math.log10(e) / low) for n, e in points if e > 0]
        d = f' stroke-dasharray="{dash}"' if dash else ""
        route = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        out.append(f'<g clip-path="url(#c{index})"><polyline points="{route}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"{d}/>')
        out += [marker(kind, x, y, colour) for x, y in at]
        out.append("</g>")
        y = legend + i * ROW
        out.append(line(x0 + pad, y - 4, x0 + pad + 34, y - 4, colour, 1.8, dash))
        out.append(marker(kind, x0 + pad + 17, y - 4, colour))
        out.append(text(x0 + pad + 44, y, label(sampler, index > 0), 12.5))
    return out


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: plot_samplers.py IN.csv OUT.svg")
    curves = read(sys.argv[1])
    rows = max(len(c) for c in curves.values())
    width, height = LEFT + 3 * WIDE + 2 * GAP + 22, TOP + HIGH + 64 + rows * ROW + 4
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
           'font-family="system-ui, -apple-system, Segoe UI, Roboto, Noto Sans, DejaVu Sans, sans-serif">',
           f'<rect width="{width}" height="{height}" fill="#fbfaf7"/>',
           text(LEFT, 34, "Samplers on a problem with a known answer", 19, font_weight=600)]
    for index, name in enumerate(PANELS):
        out += panel(index, name, curves[name])
    with open(sys.argv[2], "w") as f:
        f.write("\n".join(out) + "\n</svg>\n")


main()
