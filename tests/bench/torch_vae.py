# SPDX-License-Identifier: MIT
"""A plain PyTorch AutoencoderKL over a dictionary of tensors (diffusers' names): to time beside sitd, and to record cases.

    torch_vae.py time [--size 256] [--threads 2] [--encode]      seconds of the published sizes with random weights
    torch_vae.py gpu BENCH_VAE [--pictures 8] [--csv F]          decoding on a GPU in bfloat16, torch.compile beside BENCH_VAE (the program), A B A B
    torch_vae.py check DIR CASE                                  error against a recorded case
    torch_vae.py record DIR CASE                                 a small model and a case of it, from a fixed seed
"""
import argparse
import csv
import datetime
import fcntl
import json
import math
import os
import re
import resource
import statistics
import struct
import subprocess
import time

import numpy as np
import torch
import torch.nn.functional as F

TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def load(path):
    raw = open(path, "rb").read()
    n = struct.unpack("<Q", raw[:8])[0]
    out = {}
    for name, t in json.loads(raw[8 : 8 + n]).items():
        if name == "__metadata__":
            continue
        begin, end = t["data_offsets"]
        a = np.frombuffer(raw[8 + n + begin : 8 + n + end], TYPES[t["dtype"]]).reshape(t["shape"])
        out[name] = torch.from_numpy(a.copy())
    return out


def save(path, tensors, meta):
    header, at, data = {"__metadata__": meta}, 0, []
    for name, t in tensors.items():
        a = np.ascontiguousarray(t.numpy(), np.float32)
        header[name] = {"dtype": "F32", "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
        data.append(a.tobytes())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    open(path, "wb").write(struct.pack("<Q", len(text)) + text + b"".join(data))


class Vae:
    def __init__(self, weights, widths, layers, groups):
        self.w, self.widths, self.layers, self.groups = weights, widths, layers, groups

    def conv(self, x, name, **how):
        return F.conv2d(x, self.w[name + ".weight"], self.w[name + ".bias"], **how)

    def norm(self, x, name):
        return F.group_norm(x, self.groups, self.w[name + ".weight"], self.w[name + ".bias"], 1e-6)

    def resnet(self, x, name):
        h = self.conv(F.silu(self.norm(x, name + ".norm1")), name + ".conv1", padding=1)
        h = self.conv(F.silu(self.norm(h, name + ".norm2")), name + ".conv2", padding=1)
        if name + ".conv_shortcut.weight" in self.w:
            x = self.conv(x, name + ".conv_shortcut")
        return x + h

    def attention(self, x, name):
        n, c, height, width = x.shape
        t = self.norm(x, name + ".group_norm").reshape(n, c, -1).transpose(1, 2)
        q, k, v = (F.linear(t, self.w[f"{name}.{p}.weight"], self.w[f"{name}.{p}.bias"]) for p in ("to_q", "to_k", "to_v"))
        if t.is_cuda:
            o = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        else:
            o = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(c), -1) @ v
        o = F.linear(o, self.w[name + ".to_out.0.weight"], self.w[name + ".to_out.0.bias"])
        return x + o.transpose(1, 2).reshape(n, c, height, width)

    def middle(self, x, half):
        x = self.resnet(x, half + ".mid_block.resnets.0")
        x = self.attention(x, half + ".mid_block.attentions.0")
        return self.resnet(x, half + ".mid_block.resnets.1")

    def end(self, x, half):
        return self.conv(F.silu(self.norm(x, half + ".conv_norm_out")), half + ".conv_out", padding=1)

    def decode(self, z):
        x = self.conv(self.conv(z, "post_quant_conv"), "decoder.conv_in", padding=1)
        x = self.middle(x, "decoder")
        for up in range(len(self.widths)):
            for i in range(self.layers + 1):
                x = self.resnet(x, f"decoder.up_blocks.{up}.resnets.{i}")
            if up < len(self.widths) - 1:
                x = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"), f"decoder.up_blocks.{up}.upsamplers.0.conv", padding=1)
        return self.end(x, "decoder")

    def encode(self, x):
        """mean and standard deviation of the posterior"""
        x = self.conv(x, "encoder.conv_in", padding=1)
        for level in range(len(self.widths)):
            for i in range(self.layers):
                x = self.resnet(x, f"encoder.down_blocks.{level}.resnets.{i}")
            if level < len(self.widths) - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down_blocks.{level}.downsamplers.0.conv", stride=2)
        mean, logvar = self.conv(self.end(self.middle(x, "encoder"), "encoder"), "quant_conv").chunk(2, 1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))


def random_weights(widths, layers, latent, spread, generator):
    w = {}

    def add(name, *shape):
        fan = math.prod(shape[1:]) if len(shape) > 1 else 1
        scale = (spread or fan**-0.5) if len(shape) > 1 else 0.1
        w[name + ".weight"] = torch.randn(shape, generator=generator) * scale + (1 if len(shape) == 1 else 0)
        w[name + ".bias"] = torch.randn(shape[0], generator=generator) * 0.1

    def resnet(name, cin, cout):
        add(name + ".norm1", cin)
        add(name + ".conv1", cout, cin, 3, 3)
        add(name + ".norm2", cout)
        add(name + ".conv2", cout, cout, 3, 3)
        if cin != cout:
            add(name + ".conv_shortcut", cout, cin, 1, 1)

    def middle(half):
        c = widths[-1]
        resnet(half + ".mid_block.resnets.0", c, c)
        add(half + ".mid_block.attentions.0.group_norm", c)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            add(half + ".mid_block.attentions.0." + part, c, c)
        resnet(half + ".mid_block.resnets.1", c, c)

    add("encoder.conv_in", widths[0], 3, 3, 3)
    c = widths[0]
    for level, width in enumerate(widths):
        for i in range(layers):
            resnet(f"encoder.down_blocks.{level}.resnets.{i}", c, width)
            c = width
        if level < len(widths) - 1:
            add(f"encoder.down_blocks.{level}.downsamplers.0.conv", c, c, 3, 3)
    middle("encoder")
    add("encoder.conv_norm_out", c)
    add("encoder.conv_out", 2 * latent, c, 3, 3)
    add("quant_conv", 2 * latent, 2 * latent, 1, 1)
    add("post_quant_conv", latent, latent, 1, 1)
    add("decoder.conv_in", c, latent, 3, 3)
    middle("decoder")
    for up, width in enumerate(reversed(widths)):
        for i in range(layers + 1):
            resnet(f"decoder.up_blocks.{up}.resnets.{i}", c, width)
            c = width
        if up < len(widths) - 1:
            add(f"decoder.up_blocks.{up}.upsamplers.0.conv", c, c, 3, 3)
    add("decoder.conv_norm_out", c)
    add("decoder.conv_out", 3, c, 3, 3)
    return w


def open_model(folder):
    config = json.load(open(os.path.join(folder, "config.json")))
    weights = load(os.path.join(folder, "diffusion_pytorch_model.safetensors"))
    return Vae(weights, config["block_out_channels"], config["layers_per_block"], config["norm_num_groups"]), config


def check(folder, case):
    model, config = open_model(folder)
    t = load(case)
    mean, std = model.encode(t["x"])
    dec = model.decode(t["z"] / config["scaling_factor"])
    for name, ours in (("mean", mean), ("std", std), ("dec", dec)):
        print(f"{name} rel_l2={float((ours - t[name]).norm() / t[name].norm()):.3g}")


def record(folder, case):
    widths, layers, groups, latent = [16, 24, 32], 1, 8, 4
    g = torch.Generator().manual_seed(20)
    os.makedirs(folder, exist_ok=True)
    weights = random_weights(widths, layers, latent, 0.08, g)
    save(os.path.join(folder, "diffusion_pytorch_model.safetensors"), weights, {"format": "pt"})
    config = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": widths, "in_channels": 3, "latent_channels": latent,
              "layers_per_block": layers, "norm_num_groups": groups, "out_channels": 3, "sample_size": 40, "scaling_factor": 0.18215}
    json.dump(config, open(os.path.join(folder, "config.json"), "w"), indent=2)
    model = Vae(weights, widths, layers, groups)
    x = torch.rand(2, 3, 40, 28, generator=g) * 2 - 1
    z = torch.randn(2, latent, 10, 7, generator=g)
    mean, std = model.encode(x)
    tensors = {"x": x, "z": z, "mean": mean, "std": std, "dec": model.decode(z / config["scaling_factor"])}
    save(case, tensors, {"kind": "vae", "family": "vae", "note": "dec = decode(z/0.18215); mean, std of the posterior, unscaled"})


def timing(size, encode):
    model = Vae(random_weights([128, 256, 512, 512], 2, 4, None, torch.Generator().manual_seed(0)), [128, 256, 512, 512], 2, 32)
    for layout, fmt in (("channels first", torch.contiguous_format), ("channels last", torch.channels_last)):
        weights = {k: (v.contiguous(memory_format=fmt) if v.dim() == 4 else v) for k, v in model.w.items()}
        m = Vae(weights, model.widths, model.layers, model.groups)
        x = torch.randn(1, 3, size, size) if encode else torch.randn(1, 4, size // 8, size // 8)
        x = x.contiguous(memory_format=fmt)
        run = m.encode if encode else m.decode
        run(x)
        times, cpu = [], []
        for _ in range(3):
            t, c = time.perf_counter(), time.process_time()
            run(x)
            times.append(time.perf_counter() - t)
            cpu.append(time.process_time() - c)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"torch {torch.__version__} {'encode' if encode else 'decode'} {size} px, {layout}: {min(times):.3f} s, "
              f"of processors {min(cpu):.3f} s; peak {peak:.0f} MiB")


def compiled_decoder(size, pictures):
    """torch.compile with CUDA graphs, channels last, bfloat16: a function that gives the best milliseconds of some decodes"""
    model = Vae(random_weights([128, 256, 512, 512], 2, 4, None, torch.Generator().manual_seed(0)), [128, 256, 512, 512], 2, 32)
    for name, t in model.w.items():
        t = t.cuda().to(torch.bfloat16)
        model.w[name] = t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        torch._dynamo.mark_static_address(model.w[name])
    z = torch.randn(pictures, 4, size // 8, size // 8, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    run = torch.compile(model.decode, mode="reduce-overhead", dynamic=False)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def ms(times):
        out = []
        for _ in range(times):
            torch.compiler.cudagraph_mark_step_begin()
            start.record()
            run(z)
            end.record()
            end.synchronize()
            out.append(start.elapsed_time(end))
        return min(out)  # as bench-vae reports

    ms(5)
    return ms


def gpu(program, size, pictures, path):
    decode = compiled_decoder(size, pictures)
    lock = open(os.environ.get("LOCK", os.devnull), "w")
    fcntl.flock(lock, fcntl.LOCK_EX) if "LOCK" in os.environ else None
    ours, theirs = [], []
    for _ in range(2):
        theirs.append(decode(60))
        out = subprocess.run([program, "--backend", "cuda", "--precision", "bf16", "--pictures", str(pictures), "--size", str(size), "--runs", "60"],
                             stdout=subprocess.PIPE, check=True, text=True).stdout
        ours.append(1e3 * float(re.search(r"\(([0-9.]+) before", out).group(1)))
    line = [datetime.date.today().isoformat(), torch.cuda.get_device_name(), os.environ.get("COMMIT", ""), "bf16", f"VAE decode {size}", pictures,
            round(statistics.median(theirs), 3), round(statistics.median(ours), 3), "", round(statistics.median(theirs) / statistics.median(ours), 3), "", ""]
    print(line, "torch", theirs, "sitd", ours, out.strip(), flush=True)
    if path:
        csv.writer(open(path, "a", newline="")).writerow(line)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=["time", "gpu", "check", "record"])
    p.add_argument("paths", nargs="*")
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--encode", action="store_true")
    p.add_argument("--pictures", type=int, default=8)
    p.add_argument("--csv")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    with torch.no_grad():
        if a.what == "time":
            timing(a.size, a.encode)
        elif a.what == "gpu":
            gpu(a.paths[0], a.size, a.pictures, a.csv)
        else:
            (check if a.what == "check" else record)(*a.paths)


main()
