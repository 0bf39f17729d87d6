# SPDX-License-Identifier: MIT
"""A headless Chromium, and the daemon of tests/api's conftest."""
import importlib.util
import os
import pathlib
import sys

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

ROOT = pathlib.Path(__file__).resolve().parents[2]


def load(name):
    sys.path.insert(0, str(ROOT / "tests/api"))
    spec = importlib.util.spec_from_file_location(f"api_{name}", ROOT / f"tests/api/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


api, tiny = load("conftest"), load("tiny")


@pytest.fixture(scope="session")
def daemon(tmp_path_factory):
    """Two models: alpha has three channels and is the default, beta has one; and one each of the other families. SITD_WEB_MODELS names a folder of other models, for looking at the page."""
    folder = os.environ.get("SITD_WEB_MODELS")
    if not folder:
        folder = tmp_path_factory.mktemp("models")
        tiny.write(folder / "alpha", seed=2, channels=3, default=True)
        tiny.write(folder / "beta", seed=3, step=2000)
        tiny.write(folder / "dit", seed=4, family="dit")
        tiny.write(folder / "maskdit", seed=5, family="maskdit")
    d = api.Daemon(folder)
    yield d
    assert d.stop() == 0
    d.check_sanitizers()


@pytest.fixture(scope="session")
def chromium():
    options = Options()
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(service=Service("/usr/bin/chromedriver"), options=options)
    yield driver
    driver.quit()
