# SPDX-License-Identifier: MIT
"""Writes a model directory with a small network of random weights, so that these tests need no trained model."""
import array
import hashlib
import json
import os
import random
import struct
import sys

LABELS = ["zero", ["one", "first"], ["two", "shared"], ["three", "shared"], "four", "five", "six", "seven", "eight", "nine"]


DECODER = 32  # MaskDiT's second width


def layers(blocks, depth, d, condition):
    for i in range(depth):
        for name, rows, cols in (("attn.qkv", 3 * d, d), ("attn.proj", d, d), ("mlp.fc1", 4 * d, d), ("mlp.fc2", d, 4 * d),
                                 ("adaLN_modulation.1", 6 * d, condition)):
            yield f"{blocks}.{i}.{name}.weight", [rows, cols]
            yield f"{blocks}.{i}.{name}.bias", [rows]


def shapes(size, patch, channels, width, depth, classes, masked=False):
    d, t = width, (size // patch) ** 2
    last = DECODER if masked else d
    out = patch * patch * channels * (1 if masked else 2)
    yield "pos_embed", [1, t, d]
    yield "x_embedder.proj.weight", [d, channels, patch, patch]
    yield "x_embedder.proj.bias", [d]
    yield "t_embedder.mlp.0.weight", [d, 256]
    yield "t_embedder.mlp.0.bias", [d]
    yield "t_embedder.mlp.2.weight", [d, d]
    yield "t_embedder.mlp.2.bias", [d]
    yield "y_embedder.embedding_table.weight", [d, classes] if masked else [classes + 1, d]
    yield from layers("blocks", depth, d, d)
    if masked:
        yield "decoder_layer.linear.weight", [last, d]
        yield "decoder_layer.linear.bias", [last]
        yield "decoder_layer.adaLN_modulation.1.weight", [2 * d, d]
        yield "decoder_layer.adaLN_modulation.1.bias", [2 * d]
        yield from layers("decoder_blocks", 1, last, d)
    yield "final_layer.linear.weight", [out, last]
    yield "final_layer.linear.bias", [out]
    yield "final_layer.adaLN_modulation.1.weight", [2 * last, d]
    yield "final_layer.adaLN_modulation.1.bias", [2 * last]


def write(folder, seed=1, size=8, patch=2, channels=1, width=64, depth=2, heads=2, step=1000, default=False, family="sit"):
    masked = family == "maskdit"
    rng = random.Random(seed)
    header, chunks, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, shape in shapes(size, patch, channels, width, depth, len(LABELS), masked):
        n = 1
        for s in shape:
            n *= s
        floats = array.array("f", (rng.gauss(0, 0.08) for _ in range(n)))
        if sys.byteorder == "big":
            floats.byteswap()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * n]}
        chunks.append(floats.tobytes())
        at += 4 * n
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    weights = struct.pack("<Q", len(head)) + head + b"".join(chunks)
    os.makedirs(folder, exist_ok=True)
    file = f"weights-{step:08d}.safetensors"
    with open(os.path.join(folder, file), "wb") as f:
        f.write(weights)
    desc = {"format": 1, "family": family,
            "architecture": {"input_size": size, "patch_size": patch, "in_channels": channels, "hidden_size": width, "depth": depth,
                             "num_heads": heads, "mlp_ratio": 4, "num_classes": len(LABELS), "class_dropout": True, "learn_sigma": not masked},
            "guidance": {"channels": 3 if family == "dit" else "all"}, "labels": LABELS, "step": step,
            "weights": {"file": file, "sha256": hashlib.sha256(weights).hexdigest()}}
    if family == "sit":
        desc |= {"path": "linear", "prediction": "velocity"}
    if masked:
        desc["architecture"]["decoder"] = {"hidden_size": DECODER, "depth": 1, "num_heads": 2}
    if default:
        desc["default"] = True
    with open(os.path.join(folder, "model.json"), "w", encoding="utf-8") as f:
        json.dump(desc, f, indent=1)
