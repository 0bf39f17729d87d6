# SPDX-License-Identifier: MIT
"""A build with the CUDA back end where no GPU can be used: none there, hidden, a driver that is too old. Says so, with the right exit code; with auto the CPU serves."""
import os
import shutil
import subprocess

import pytest

from conftest import BINARY, SCALE, clean_env

LIBRARY = os.path.join(os.path.dirname(os.path.realpath(BINARY)), "libsitd_cuda.so")
pytestmark = pytest.mark.skipif(not os.path.exists(LIBRARY), reason="built without CUDA")
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}  # where there is no driver: none
OLD_DRIVER = """
int cuInit(unsigned flags) { (void)flags; return 0; }
int cuDriverGetVersion(int *v) { *v = 11000; return 0; }
"""


def serve(models, *args, env):
    return subprocess.run([BINARY, "serve", "--models", models, "--listen", "127.0.0.1:0", *args], capture_output=True, text=True, timeout=30 * SCALE, env=clean_env(env))


@pytest.fixture(scope="module")
def old_driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cuda.c").write_text(OLD_DRIVER)
    if not shutil.which("cc"):
        pytest.skip("no compiler to make a driver with")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", folder / "cuda.c"], check=True)
    return {"LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}


@pytest.fixture(params=["hidden", "old"])
def without(request):
    return HIDDEN if request.param == "hidden" else request.getfixturevalue("old_driver")


def test_cuda_without_a_gpu_is_69(models, without):
    for devices in "0", "all", "1":
        r = serve(models, "--backend", "cuda", "--devices", devices, env=without)
        assert r.returncode == 69 and "no usable NVIDIA GPU" in r.stderr, r
        assert without is HIDDEN or "the driver is for CUDA 11.0" in r.stderr, r.stderr


def test_sample_without_a_gpu_is_69(models, tmp_path, without):
    r = subprocess.run([BINARY, "sample", "--model", models / "tiny", "--out", tmp_path / "x.png", "--backend", "cuda"], capture_output=True, text=True,
                       timeout=30 * SCALE, env=clean_env(without))
    assert r.returncode == 69 and "no usable NVIDIA GPU" in r.stderr and not (tmp_path / "x.png").exists(), r


def test_auto_without_a_gpu_serves_on_the_cpu_and_says_so(start, without):
    d = start("--backend", "auto", env=without)
    assert d.sample({"class": 1, "sampler": {"method": "euler", "steps": 2}}).status == 200
    said = [line for line in d.log if line["msg"].startswith("no GPU to use")]
    assert len(said) == 1 and "no usable NVIDIA GPU" in said[0]["why"]
