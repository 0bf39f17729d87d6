#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Trains a tiny net in a run that is killed (SIGKILL) at moments of chance and continued, until it ends, and compares its last checkpoint with that
of a run that was not killed: kill_train.py [KILLS]. The moments are spread over what the whole run takes; $SITD, else build/sitd."""
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "api"))
import toy  # noqa: E402

BINARY = os.path.abspath(os.environ.get("SITD", ROOT / "build" / "sitd"))


def main(kills):
    with tempfile.TemporaryDirectory() as where:
        where = pathlib.Path(where)
        data, rng, done, runs = toy.write(where / "data"), random.Random(1), 0, 0
        args = [BINARY, "train", "--data", str(data), *toy.FLAGS, "--steps", str(80 * kills), "--save-every", "20", "--log-every", "100"]
        subprocess.run([*args, "--out", str(where / "whole")], check=True, capture_output=True)
        last = f"checkpoints/step-{80 * kills:08d}.safetensors"
        while not (where / "cut" / last).exists():
            p = subprocess.Popen([*args, "--out", str(where / "cut"), "--resume", "auto"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            runs += 1
            if done < kills:
                time.sleep(0.02 + rng.random() * 0.5)
                p.send_signal(signal.SIGKILL)
            done += p.wait() == -signal.SIGKILL
        same = (where / "cut" / last).read_bytes() == (where / "whole" / last).read_bytes()
        print(f"{done} kills in {runs} runs: the last checkpoints {'are the same bytes' if same else 'DIFFER'}")
        return not same


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 50))
