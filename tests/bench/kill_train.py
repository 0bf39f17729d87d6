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

STEPS = 400  # for each kill
BINARY = os.path.abspath(os.environ.get("SITD", ROOT / "build" / "sitd"))


def main(kills):
    with tempfile.TemporaryDirectory() as where:
        where = pathlib.Path(where)
        data, rng, done, runs = toy.write(where / "data"), random.Random(1), 0, 0
        args = [BINARY, "train", "--data", str(data), *toy.FLAGS, "--steps", str(STEPS * kills), "--save-every", "20", "--log-every", "100"]
        began = time.monotonic()
        subprocess.run([*args, "--out", str(where / "whole")], check=True, capture_output=True)
        longest = 1.5 * (time.monotonic() - began) / kills  # a life; together they are shorter than the whole run
        last = f"checkpoints/step-{STEPS * kills:08d}.safetensors"
        while not (where / "cut" / last).exists():
            p = subprocess.Popen([*args, "--out", str(where / "cut"), "--resume", "auto"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            runs += 1
            if done < kills:
                time.sleep(rng.random() * longest)
                p.send_signal(signal.SIGKILL)
            done += p.wait() == -signal.SIGKILL
        same = (where / "cut" / last).read_bytes() == (where / "whole" / last).read_bytes()
        print(f"{done} kills in {runs} runs: the last checkpoints {'are the same bytes' if same else 'DIFFER'}")
        return not same or done < kills


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 50))
