#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""usage: model_loss.py DATA MODEL... [--images N] [--device cuda] [--out FILE.json]

Losses of trained models on pictures that they have not seen, by an independent network in PyTorch (tests/golden/torch_net.py, float32): the mean over 16 times spread evenly, noise
fixed by seed, with the labels and with the null class. DATA is a folder of IDX files (the t10k ones are read, padded to the network's size) or of one folder of PNGs a class.
A MODEL is a model directory, or a .pt of the authors' scripts as FAMILY:HEADS:FILE (sit:3:../shared/models/fashion-sit.pt).
SiT: velocity on the linear path. DiT: the noise's squared error, and the variational bound's term in bits a dimension. Needs torch, numpy; pillow for PNGs."""
import argparse
import gzip
import json
import math
import pathlib
import sys

import numpy
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "golden"))
from torch_net import Net  # noqa: E402

TIMES, CHUNK, STEPS = 16, 500, 1000


def idx(path, head):
    return torch.from_numpy(numpy.frombuffer(gzip.open(path).read()[head:], numpy.uint8).copy())


def pictures(folder, side):
    """x [N, C, side, side] in [-1, 1], labels [N]"""
    images = folder / "t10k-images-idx3-ubyte.gz"
    if images.exists():
        x = idx(images, 16).view(-1, 1, 28, 28).float() / 127.5 - 1
        pad = (side - 28) // 2
        return torch.nn.functional.pad(x, [pad] * 4, value=-1.0), idx(folder / "t10k-labels-idx1-ubyte.gz", 8).long()
    from PIL import Image
    files = [(label, f) for label, kind in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())) for f in sorted(kind.glob("*.png"))]
    x = numpy.stack([numpy.asarray(Image.open(f).convert("RGB")) for _, f in files])
    assert x.shape[1:3] == (side, side), f"the pictures are {x.shape[1:3]}, the network's {side}"
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor([label for label, _ in files])


def velocity(net, x1, x0, at, y):
    """Each picture's loss at time `at` of (0, 1)."""
    out = net(at * x1 + (1 - at) * x0, torch.full((len(x1),), at, device=x1.device), y)[:, :net.channels]
    return {"velocity": ((out - (x1 - x0)) ** 2).mean((1, 2, 3))}


class Diffusion:
    """DDPM's linear schedule, and what Nichol and Dhariwal's learned range makes of it."""

    def __init__(self):
        self.beta = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
        self.bar = torch.cumprod(1 - self.beta, 0)
        self.before = torch.cat([torch.ones(1, dtype=torch.float64), self.bar[:-1]])
        self.posterior = self.beta * (1 - self.before) / (1 - self.bar)

    def hybrid(self, net, x1, x0, at, y):
        s = int(at * STEPS)  # never step 0, whose term is another: 16 times begin at 1/32
        beta, bar, before, posterior = (float(v[s]) for v in (self.beta, self.bar, self.before, self.posterior))
        x = math.sqrt(bar) * x1 + math.sqrt(1 - bar) * x0
        eps, v = net(x, torch.full((len(x1),), s, device=x1.device), y).chunk(2, 1)
        log_var = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(posterior)
        # of the means only the clean picture's estimate differs: their difference is beta sqrt(before) / (1 - bar) times that of the estimates
        off = beta * math.sqrt(before) / (1 - bar) * math.sqrt((1 - bar) / bar) * (eps - x0)
        kl = 0.5 * (log_var - math.log(posterior) + torch.exp(math.log(posterior) - log_var) - 1 + off ** 2 * torch.exp(-log_var))
        return {"noise": ((eps - x0) ** 2).mean((1, 2, 3)), "bound": kl.mean((1, 2, 3)) / math.log(2)}


def measure(net, family, x, y):
    sums, device, loss = {}, x.device, Diffusion().hybrid if family == "dit" else velocity
    noise = torch.Generator().manual_seed(7)
    for i in range(0, len(x), CHUNK):
        x1, labels = x[i:i + CHUNK], y[i:i + CHUNK]
        for k in range(TIMES):
            x0 = torch.randn(x1.shape, generator=noise).to(device)
            for what, of in (("labels", labels), ("null", torch.full_like(labels, net.null))):
                for name, each in loss(net, x1, x0, (k + 0.5) / TIMES, of).items():
                    at = sums.setdefault(f"{name}/{what}", [0.0] * TIMES)
                    at[k] += each.sum().item() / len(x)
    return sums


def main():
    args = argparse.ArgumentParser(usage=__doc__)
    args.add_argument("data", type=pathlib.Path)
    args.add_argument("models", nargs="+")
    args.add_argument("--images", type=int)
    args.add_argument("--device", default="cpu")
    args.add_argument("--out", type=pathlib.Path)
    args = args.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False
    result = {}
    for name in args.models:
        family, heads, path = name.split(":") if name.endswith(".pt") else (None, None, name)
        net = Net(pathlib.Path(path), heads and int(heads), args.device)
        x, y = (v[:args.images].to(args.device) for v in pictures(args.data, net.side))
        sums = measure(net, family or net.desc["family"], x, y)
        result[name] = {"images": len(x), "mean": {k: sum(v) / TIMES for k, v in sums.items()}, "by_time": sums}
        print(f"{name}: {len(x)} pictures", *(f"{k} {v:.6f}" for k, v in result[name]["mean"].items()), sep="  ", flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
