# SPDX-License-Identifier: MIT
"""A data set and a recipe small enough to train for seconds on any CPU."""
import gzip
import random
import struct

FLAGS = ["--model", "custom", "--family", "sit", "--width", "16", "--depth", "1", "--heads", "2", "--patch", "4", "--mlp-ratio", "2", "--batch", "8", "--lr", "1e-2", "--warmup", "5",
         "--ema", "0.9,0.99", "--guidance-channels", "all", "--sample-every", "0", "--threads", "1", "--backend", "cpu", "--flip"]


def write(folder, n=40, side=8, classes=3, seed=1):
    """IDX files as MNIST's, gzipped: bright squares whose place tells the class."""
    rng = random.Random(seed)
    labels = [i % classes for i in range(n)]
    pixels = bytearray()
    for label in labels:
        image = [[rng.randrange(40) for _ in range(side)] for _ in range(side)]
        for i in range(2, 5):
            for j in range(2 * label, 2 * label + 3):
                image[i][j] = 255
        pixels += bytes(v for row in image for v in row)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(struct.pack(">BBBBIII", 0, 0, 8, 3, n, side, side) + bytes(pixels)))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, n) + bytes(labels)))
    return folder
