#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Records tests/golden/designs: small random networks of the DiT paper's four conditioning designs and their outputs, by plain PyTorch.

No public code or weights exist for in-context, cross-attention and adaLN, so this is an independent reading of the paper (sec. 3.2) against which ours
is held: nothing here was taken from the C code but the names of the tensors. adaLN-Zero is recorded as well; it must agree with
what the authors' own code gave (the other cases of this folder), which ties this reading to theirs. Needs torch and safetensors:

    python3 tests/golden/make_designs.py          networks and their outputs
    python3 tests/golden/make_designs.py train    of the networks that are there: losses and gradients; ten steps of AdamW from one of them
"""
import json
import math
import os
import sys

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "designs")
CASES = {  # design: in_channels, input, patch, width, depth, heads, classes, learn_sigma
    "adaln-zero": (3, 12, 2, 24, 2, 3, 7, True),
    "adaln": (4, 8, 2, 32, 2, 2, 10, True),
    "cross-attention": (4, 8, 2, 24, 2, 3, 10, True),
    "in-context": (3, 12, 4, 32, 2, 2, 5, False),
}


def attend(q, k, v):
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v


class Embedders(torch.nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(256, width), torch.nn.SiLU(), torch.nn.Linear(width, width))
        self.table = torch.nn.Embedding(classes + 1, width)

    def forward(self, t, y):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(self.table.weight.dtype)), self.table(y)


class SelfAttention(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(n, t, c))


class CrossAttention(torch.nn.Module):
    """Multi-head attention from every token to a sequence of two, the embeddings of timestep and class."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (torch.nn.Linear(width, width) for _ in range(4))

    def forward(self, x, context):
        def split(u):
            return u.view(u.shape[0], u.shape[1], self.heads, -1).transpose(1, 2)

        o = attend(split(self.q(x)), split(self.k(context)), split(self.v(context)))
        return self.proj(o.transpose(1, 2).reshape(x.shape))


class Mlp(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(torch.nn.Module):
    def __init__(self, design, width, heads):
        super().__init__()
        affine = design in ("cross-attention", "in-context")
        self.design = design
        self.norm1 = torch.nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
        self.norm2 = torch.nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
        self.attn, self.mlp = SelfAttention(width, heads), Mlp(width)
        if design == "cross-attention":
            self.norm_cross, self.cross_attn = torch.nn.LayerNorm(width, eps=1e-6), CrossAttention(width, heads)
        if not affine:
            self.modulation = torch.nn.Linear(width, (6 if design == "adaln-zero" else 4) * width)

    def forward(self, x, c, context):
        if self.design == "adaln-zero":
            shift1, scale1, gate1, shift2, scale2, gate2 = (u[:, None] for u in self.modulation(F.silu(c)).chunk(6, 1))
            x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
            return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        if self.design == "adaln":
            shift1, scale1, shift2, scale2 = (u[:, None] for u in self.modulation(F.silu(c)).chunk(4, 1))
            x = x + self.attn(self.norm1(x) * (1 + scale1) + shift1)
            return x + self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        x = x + self.attn(self.norm1(x))
        if self.design == "cross-attention":
            x = x + self.cross_attn(self.norm_cross(x), context)
        return x + self.mlp(self.norm2(x))


class Network(torch.nn.Module):
    def __init__(self, design, channels, side, patch, width, depth, heads, classes, learn_sigma):
        super().__init__()
        self.design, self.side, self.patch, self.out = design, side, patch, channels * (2 if learn_sigma else 1)
        self.embed = torch.nn.Conv2d(channels, width, patch, patch)
        self.condition = Embedders(width, classes)
        self.blocks = torch.nn.ModuleList(Block(design, width, heads) for _ in range(depth))
        affine = design in ("cross-attention", "in-context")
        self.norm = torch.nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
        self.last = torch.nn.Linear(width, patch * patch * self.out)
        if not affine:
            self.modulation = torch.nn.Linear(width, 2 * width)

    def positions(self, width):
        g, quarter = self.side // self.patch, width // 4
        omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        n = torch.arange(g * g)
        column, row = (n % g)[:, None] * omega, (n // g)[:, None] * omega
        return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1).float()

    def forward(self, x, t, y):
        n, g, p = x.shape[0], self.side // self.patch, self.patch
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.positions(x.shape[2]).to(x.dtype)
        time, label = self.condition(t, y)
        context = torch.stack([time, label], 1)
        if self.design == "in-context":
            x = torch.cat([x, context], 1)
        for block in self.blocks:
            x = block(x, time + label, context)
        if self.design == "in-context":
            x = x[:, :-2]
        x = self.norm(x)
        if hasattr(self, "modulation"):
            shift, scale = (u[:, None] for u in self.modulation(F.silu(time + label)).chunk(2, 1))
            x = x * (1 + scale) + shift
        x = self.last(x).view(n, g, g, p, p, self.out)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, self.out, self.side, self.side)


def pair(module, name):
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


def tensors(net):
    """The network's weights under sitd's names (core/io/arch.c)."""
    t = {**pair(net.embed, "x_embedder.proj"), **pair(net.condition.mlp[0], "t_embedder.mlp.0"), **pair(net.condition.mlp[2], "t_embedder.mlp.2"),
         "y_embedder.embedding_table.weight": net.condition.table.weight, **pair(net.last, "final_layer.linear"),
         "pos_embed": net.positions(net.embed.weight.shape[0])[None]}
    t.update(pair(net.modulation, "final_layer.adaLN_modulation.1") if hasattr(net, "modulation") else pair(net.norm, "final_layer.norm_final"))
    for i, b in enumerate(net.blocks):
        at = f"blocks.{i}."
        t.update({**pair(b.attn.qkv, at + "attn.qkv"), **pair(b.attn.proj, at + "attn.proj"), **pair(b.mlp.fc1, at + "mlp.fc1"), **pair(b.mlp.fc2, at + "mlp.fc2")})
        if hasattr(b, "modulation"):
            t.update(pair(b.modulation, at + "adaLN_modulation.1"))
        else:
            t.update({**pair(b.norm1, at + "norm1"), **pair(b.norm2, at + "norm2")})
        if hasattr(b, "cross_attn"):
            c = b.cross_attn
            t.update({**pair(b.norm_cross, at + "norm_cross"), **pair(c.q, at + "cross_attn.q"), **pair(c.proj, at + "cross_attn.proj"),
                      at + "cross_attn.kv.weight": torch.cat([c.k.weight, c.v.weight]), at + "cross_attn.kv.bias": torch.cat([c.k.bias, c.v.bias])})
    return {k: v.detach().contiguous() for k, v in t.items()}


def record(design, channels, side, patch, width, depth, heads, classes, learn_sigma):
    torch.manual_seed(list(CASES).index(design) + 1)
    net = Network(design, channels, side, patch, width, depth, heads, classes, learn_sigma)
    for name, p in net.named_parameters():  # wide enough that a wrong sign, order or norm shows
        torch.nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    config = json.dumps({"input_size": side, "patch_size": patch, "in_channels": channels, "hidden_size": width, "depth": depth, "num_heads": heads,
                         "num_classes": classes, "learn_sigma": learn_sigma, "block": design})
    n = 5
    x, t, y = torch.randn(n, channels, side, side), torch.tensor([0.0, 0.3, 1.0, 250.0, 999.0]), torch.tensor([0, 1, classes, classes - 1, 2])
    with torch.no_grad():
        out = net(x, t, y)
    assert out.std() > 0.1
    save_file(tensors(net), f"{HERE}/{design}.safetensors", {"kind": "weights", "family": "dit", "config": config})
    save_file({"x": x, "t": t, "y": y, "out": out}, f"{HERE}/{design}.forward.safetensors", {"kind": "forward", "family": "dit", "config": config})


def named(net, of):
    """What `of` gives for each parameter, under sitd's names: a view of tensors() on a copy whose parameters are those."""
    shadow = Network(*net.sizes)
    with torch.no_grad():
        for to, p in zip(shadow.parameters(), net.parameters()):
            to.copy_(of(p))
    return {k: v for k, v in tensors(shadow).items() if k != "pos_embed"}


def recorded(design):
    """The network of designs/, and its config."""
    path = f"{HERE}/{design}.safetensors"
    net = Network(design, *CASES[design])
    net.sizes = (design, *CASES[design])
    weights, of = load_file(path), tensors(net)
    with torch.no_grad():
        for k, v in of.items():
            if k.endswith("cross_attn.kv.weight") or k.endswith("cross_attn.kv.bias"):
                block, kind = net.blocks[int(k.split(".")[1])].cross_attn, k.rsplit(".", 1)[1]
                for part, half in zip((block.k, block.v), weights[k].chunk(2)):
                    getattr(part, kind).copy_(half)
            elif k != "pos_embed":
                v.copy_(weights[k])  # tensors() lends the parameters' memory
    assert all(torch.equal(v, weights[k]) for k, v in tensors(net).items() if k != "pos_embed")
    with safe_open(path, "pt") as f:
        return net, f.metadata()["config"]


def some(named_tensors):
    """Of the large ones block 0's only: the folder is to stay small, and what reaches block 0 has come through the others."""
    return {k: v for k, v in named_tensors.items() if v.numel() <= 1024 or k.startswith("blocks.0.")}


def losses(net, x1, x0, t, y):
    """SiT's velocity loss on the linear path, each image's; t = 1 is data."""
    at = t[:, None, None, None].to(x1.dtype)
    out = net(at * x1 + (1 - at) * x0, t, y)[:, : x1.shape[1]]
    return ((out - (x1 - x0)) ** 2).mean((1, 2, 3))


def record_train(design):
    net, config = recorded(design)
    channels, side, classes = CASES[design][0], CASES[design][1], CASES[design][6]
    torch.manual_seed(50 + list(CASES).index(design))
    n = 4
    x1, x0 = torch.randn(n, channels, side, side), torch.randn(n, channels, side, side)
    t, y, drop = torch.tensor([0.1, 0.4, 0.75, 0.95]), torch.tensor([0, 1, classes - 1, 2]), torch.tensor([0, 0, 1, 0], dtype=torch.int32)
    net.double()
    loss = losses(net, x1.double(), x0.double(), t, torch.where(drop > 0, classes, y))
    loss.mean().backward()
    case = {f"grad.{k}": v.float() for k, v in some(named(net, lambda p: p.grad)).items()}
    case.update(x1=x1, x0=x0, t=t, y=y, drop=drop, loss=loss.detach().float())
    meta = {"kind": "train", "family": "sit", "path": "Linear", "prediction": "velocity", "loss_weight": "None", "config": config}
    save_file(case, f"{HERE}/{design}.train.safetensors", meta)


STEPS, LR, DECAY, EMA = 10, 1e-3, 0.01, 0.99


def record_steps(design):
    """Ten optimiser steps as the authors' train.py makes them, in float32, with weight decay so that it shows."""
    net, config = recorded(design)
    channels, side, classes = CASES[design][0], CASES[design][1], CASES[design][6]
    torch.manual_seed(60)
    n = 2
    x1, x0 = torch.randn(STEPS, n, channels, side, side), torch.randn(STEPS, n, channels, side, side)
    t, y = torch.rand(STEPS, n), torch.randint(classes + 1, (STEPS, n))
    ema = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=DECAY)
    for i in range(STEPS):
        optimizer.zero_grad()
        losses(net, x1[i], x0[i], t[i], y[i]).mean().backward()
        optimizer.step()
        for e, p in zip(ema, net.parameters()):
            e.mul_(EMA).add_(p.detach(), alpha=1 - EMA)
    of = dict(zip(net.parameters(), ema))
    case = {"x1": x1, "x0": x0, "t": t, "y": y}
    for kind, what in (("weights", lambda p: p), ("ema", lambda p: of[p]), ("m", lambda p: optimizer.state[p]["exp_avg"]),
                       ("v", lambda p: optimizer.state[p]["exp_avg_sq"])):
        found = named(net, what)
        case.update({f"{kind}.{k}": v for k, v in (found if kind in ("weights", "ema") else some(found)).items()})
    meta = {"kind": "steps", "config": config, "lr": str(LR), "weight_decay": str(DECAY), "ema": str(EMA)}
    save_file(case, f"{HERE}/{design}.steps.safetensors", meta)


if __name__ == "__main__":
    os.makedirs(HERE, exist_ok=True)
    for name, sizes in CASES.items():
        if sys.argv[1:] == ["train"]:
            record_train(name)
        else:
            record(name, *sizes)
    if sys.argv[1:] == ["train"]:
        record_steps("cross-attention")
