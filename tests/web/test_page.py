# SPDX-License-Identifier: MIT
"""The playground page in a real browser against the real daemon. Screenshots go to build/web."""
import base64
import json
import pathlib
import re
import shutil
import subprocess
import time

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

ROOT = pathlib.Path(__file__).resolve().parents[2]
WEB = ROOT / "clients/web"
SHOTS = ROOT / "build/web"
FIELDS = {"steps", "atol", "rtol", "max_evaluations", "w_t", "w_t_scale", "last_step", "last_step_size", "denoise"}


class Page:
    def __init__(self, driver, daemon):
        self.driver, self.daemon = driver, daemon
        self.url = f"http://{daemon.host}:{daemon.port}/"

    def open(self, width=1280, height=1000, dark=False):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
        self.driver.get_log("browser")
        self.driver.get(self.url)
        self.wait(lambda: self("go").is_enabled())
        return self

    def __call__(self, name):
        return self.driver.find_element(By.ID, name)

    def wait(self, condition, seconds=60):
        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: condition())

    def js(self, text, *args):
        return self.driver.execute_script(text, *args)

    def type(self, name, text):
        field = self(name)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE, *([str(text)] if str(text) else []))

    def pick(self, name):
        """Chooses these classes and no other."""
        for box in self.driver.find_elements(By.CSS_SELECTOR, "#chips label"):
            on = box.find_element(By.TAG_NAME, "input").is_selected()
            if on != (box.text in name):
                box.click()

    def sampler(self, kind):
        self.driver.find_element(By.CSS_SELECTOR, f"input[name=type][value={kind}]").click()

    def quick(self, classes=("zero",), n=1, steps=4):
        self.pick(list(classes))
        self.type("n", n)
        self.type("steps", steps)
        return self

    def pictures(self):
        return self.driver.find_elements(By.CSS_SELECTOR, "#pictures img")

    def settle(self):
        self.wait(lambda: not self("stop").is_displayed())

    def generate(self):
        before = self.js("return past.length")
        self("go").click()
        self.wait(lambda: self.js("return past.length") > before or self.driver.find_elements(By.CSS_SELECTOR, ".error, .problem:not([hidden])"))
        self.settle()
        errors = [e.text for e in self.driver.find_elements(By.CSS_SELECTOR, ".error, .problem:not([hidden])")]
        assert not errors, errors
        return self

    def refused(self):
        """The text and the field of the error that Generate gives."""
        self("go").click()
        self.wait(lambda: self.driver.find_elements(By.CSS_SELECTOR, ".error, .problem:not([hidden])"))
        self.settle()
        field = self.driver.find_elements(By.CSS_SELECTOR, "[aria-invalid=true]")
        text = self.driver.find_element(By.CSS_SELECTOR, ".error, .problem:not([hidden])").text
        return text, field[0].get_attribute("id") if field else None

    def complaints(self):
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]

    def shot(self, name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SHOTS / f"{name}.png"))

    def request(self):
        return self.js("return build()")


@pytest.fixture(scope="session")
def session(chromium, daemon):
    return Page(chromium, daemon)


@pytest.fixture
def page(session):
    return session.open()


def test_files_need_nothing_from_elsewhere():
    for file in WEB.iterdir():
        text = file.read_text(encoding="utf-8")
        links = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)
        assert set(links) <= {"http://www.w3.org"}, (file.name, links)
    html = (WEB / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)


def test_loads_without_complaints(page, daemon):
    assert page.complaints() == []
    headers = daemon.get("/").headers
    assert headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert "alpha" in page("about").text
    assert page("curl").text.startswith("curl 'http://127.0.0.1")
    page.shot("empty")


def test_every_control_has_a_name(page):
    page.js("document.querySelectorAll('[hidden]').forEach((e) => { e.hidden = false; }); document.querySelector('details').open = true")
    controls = page.driver.find_elements(By.CSS_SELECTOR, "input, select, button, fieldset, [role=group], [role=radiogroup]")
    assert len(controls) > 30
    for control in controls:
        assert control.accessible_name, control.get_attribute("outerHTML")


def test_generate_shows_the_picture(page):
    page.quick().generate()
    (image,) = page.pictures()
    assert page.js("return [arguments[0].complete, arguments[0].naturalWidth]", image) == [True, 8]
    assert image.value_of_css_property("image-rendering") == "pixelated"
    assert image.size["width"] == image.size["height"] >= 400 and image.size["width"] % 8 == 0
    assert "zero" in image.accessible_name
    assert "1 picture" in page("status").text
    facts = page("facts").text
    for word in ("Queue", "Denoise", "Decode", "Encode", "Seed", "Evaluations", "alpha@1000"):
        assert word in facts
    assert page.complaints() == []


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("n", [1, 3])
def test_curl_command_gives_the_same_bytes(page, tmp_path, n):
    page.quick(["zero", "seven"] if n == 3 else ["seven"], n)
    page.sampler("sde")
    page.type("steps", 5)
    page.generate()
    shown = [base64.b64decode(i.get_attribute("src").split(",", 1)[1]) for i in page.pictures()]
    out = subprocess.run(["sh", "-c", page("curl").text], cwd=tmp_path, capture_output=True, check=True).stdout
    got = [(tmp_path / "picture.png").read_bytes()] if n == 1 else [base64.b64decode(i["b64_json"]) for i in json.loads(out)["data"]]
    assert len(shown) == (1 if n == 1 else 6) and got == shown


def test_seeds_that_javascript_cannot_hold(page, tmp_path):
    page.quick().type("seed", "18446744073709551615")
    page.generate()
    assert '"seed": "18446744073709551615"' in page("curl").text
    assert "18446744073709551615" in page("numbers").text


def test_keep_repeats_the_picture(page):
    page.quick().generate()
    first = page.pictures()[0].get_attribute("src")
    page("keep").click()
    assert page("seed").get_attribute("value").isdigit()
    assert page.generate().pictures()[0].get_attribute("src") == first
    page.type("seed", "")
    assert page.generate().pictures()[0].get_attribute("src") != first


def test_knobs_follow_the_sampler(page):
    def visible():
        return {name for name in FIELDS if page(name).is_displayed()}

    assert visible() == {"steps", "denoise"}
    Select(page("method")).select_by_value("dopri5")
    assert visible() == {"atol", "rtol", "max_evaluations", "denoise"}
    assert set(page.request()["sampler"]) == {"type", "method", "atol", "rtol", "max_evaluations", "denoise"}
    Select(page("method")).select_by_value("dpmpp2m")
    assert visible() == {"steps"}
    Select(page("method")).select_by_value("dopri5")
    page.sampler("sde")
    assert visible() == {"steps", "w_t", "w_t_scale", "last_step", "last_step_size"}
    Select(page("last_step")).select_by_value("none")
    assert visible() == {"steps", "w_t", "w_t_scale", "last_step"}
    assert set(page.request()["sampler"]) == {"type", "method", "steps", "w_t", "w_t_scale", "last_step"}
    page.sampler("ode")
    assert visible() == {"atol", "rtol", "max_evaluations", "denoise"}, "what was chosen for the other sampler is kept"
    assert not page("interval").is_displayed() and "guidance" not in page.request()
    page.type("scale", 2.5)
    assert page("interval").is_displayed() and page("channels").is_displayed() and page.request()["guidance"] == {"scale": 2.5}
    Select(page("model")).select_by_value("beta")
    assert not page("channels").is_displayed(), "one channel leaves nothing to choose"


def test_each_family_has_its_own_samplers(page):
    def types():
        return [e.text for e in page.driver.find_elements(By.CSS_SELECTOR, ".segments label") if e.is_displayed()]

    def sampler(**more):
        page.quick(steps=5)
        for name, value in more.items():
            if page(name).tag_name == "select":
                Select(page(name)).select_by_value(value)
            else:
                page.type(name, value)
        assert len(page.generate().pictures()) == 1
        return page.request()["sampler"]

    assert types() == ["ODE", "SDE", "DDIM", "EDM"]
    page.sampler("sde")
    Select(page("w_t")).select_by_value("knots")
    assert sampler(knots="0 2, 1 0.5")["w_t"] == [[0, 2], [1, 0.5]]
    Select(page("model")).select_by_value("dit")
    assert types() == ["ODE", "SDE", "DDPM", "DDIM", "EDM"] and not page("interpolant").is_displayed() and not page("method").is_displayed()
    page("clip").click()
    assert sampler(spacing="trailing") == {"type": "ddpm", "steps": 5, "spacing": "trailing", "clip": True}
    page.shot("ddpm")
    page.sampler("ddim")
    assert sampler(eta=0.5) == {"type": "ddim", "steps": 5, "spacing": "openai", "eta": 0.5, "clip": False}
    Select(page("model")).select_by_value("maskdit")
    assert sampler(churn=3, s_max=20) == {"type": "edm", "method": "heun", "steps": 5, "churn": 3, "s_min": 0, "s_max": 20, "s_noise": 1, "rho": 7,
                                          "sigma_min": 0.002, "sigma_max": 80}
    page.shot("edm")
    page.type("s_max", "")
    assert "s_max" not in page.request()["sampler"]
    Select(page("model")).select_by_value("alpha")
    assert page.request()["sampler"]["type"] == "ode" and page("interpolant").is_displayed()


def test_every_knob_is_taken(page):
    """The whole form at once: each field reaches the daemon, which refuses what it does not know."""
    page.pick(["zero", "unconditional"])
    page.js("document.querySelector('details').open = true")
    page.sampler("sde")
    for name, value in {"n": 2, "seed": 5, "steps": 6, "w_t_scale": 0.5, "last_step_size": 0.1, "scale": 2, "from": 0.1, "to": 0.9, "seed_index": 3,
                        "compression": 9, "timeout_ms": 60000, "priority": 1}.items():
        page.type(name, value)
    for name, value in {"interpolant": "gvp", "method": "heun", "w_t": "decreasing", "last_step": "tweedie", "channels": "2"}.items():
        Select(page(name)).select_by_value(value)
    assert page.request() == {
        "model": "alpha", "classes": [0, 0, None, None], "seed": 5, "seed_index": 3, "interpolant": "gvp",
        "sampler": {"type": "sde", "method": "heun", "steps": 6, "w_t": "decreasing", "w_t_scale": 0.5, "last_step": "tweedie", "last_step_size": 0.1},
        "guidance": {"scale": 2, "interval": [0.1, 0.9], "channels": 2}, "output": {"format": "png", "compression": 9}, "timeout_ms": 60000, "priority": 1}
    assert len(page.generate().pictures()) == 4
    page.shot("every-knob")


def test_a_thousand_labels_are_searched(page):
    page.js("model.labels = Array.from({ length: 1000 }, (_, i) => [`bird ${i}`, `synonym ${i}`]); model.classes = 1000; fillModel()")

    def labels():
        return [e.text for e in page.driver.find_elements(By.CSS_SELECTOR, "#chips label")]

    assert page("filter").is_displayed() and len(labels()) == 61, "60 and the unconditional one"
    page("filter").send_keys("SYNONYM 77")
    assert labels() == ["bird 0", "bird 77", *(f"bird {i}" for i in range(770, 780)), "unconditional"]
    page.driver.find_elements(By.CSS_SELECTOR, "#chips label")[1].click()
    page.type("filter", "")
    assert labels()[:3] == ["bird 0", "bird 77", "bird 1"] and page.request()["classes"] == [0] * 4 + [77] * 4
    page.js("model.labels = []; fillModel()")
    page("ids").send_keys("3, 7,x")
    page.type("n", 1)
    assert page.request()["classes"] == [3, 7, "x"]


@pytest.mark.parametrize("field, value, words", [("steps", "0", "from 1 to 10000"), ("steps", "2.5", "must be an integer"), ("seed", "abc", "decimal digits"),
                                                  ("n", "0", "from 1 to"), ("scale", "-1", "from 0 to 1000")])
def test_an_error_shows_at_its_field(page, field, value, words):
    page.quick().type(field, value)
    text, where = page.refused()
    assert where == field and words in text
    assert page.driver.switch_to.active_element.get_attribute("id") == field
    assert page(field).get_attribute("aria-describedby") == "field-error"
    if field == "steps":
        page.shot("error")
    page.type(field, {"seed": "1", "n": "1", "scale": "1"}.get(field, "4"))
    page.generate()
    assert not page.driver.find_elements(By.CSS_SELECTOR, "[aria-invalid]")


def test_errors_of_groups(page):
    page.quick([])
    assert page.refused()[1] == "classes"
    page.quick().type("scale", 2)
    page.type("from", 0.8)
    page.type("to", 0.2)
    assert page.refused()[1] == "interval"
    page.type("to", 1)
    page.js("document.querySelector('details').open = true")
    page.type("timeout_ms", 0)
    page.js("document.querySelector('details').open = false")
    text, where = page.refused()
    assert where == "timeout_ms" and page("timeout_ms").is_displayed(), "the details open for it"


def test_history_brings_back_picture_and_settings(page):
    page.quick(["three"], 1, 3).generate()
    first = page.pictures()[0].get_attribute("src")
    page.quick(["four", "five"], 2, 5)
    page.sampler("sde")
    page.type("steps", 7)
    page.generate()
    assert len(page.pictures()) == 4
    page.driver.find_elements(By.CSS_SELECTOR, "#history button")[1].click()
    assert page.pictures()[0].get_attribute("src") == first
    assert page("steps").get_attribute("value") == "3" and page.request()["class"] == 3 and page.request()["sampler"]["type"] == "ode"
    assert page.generate().pictures()[0].get_attribute("src") == first, "its seed came back too"


def test_keyboard_alone(page):
    page.type("n", 1)
    page("steps").send_keys(Keys.CONTROL, "a")
    page("steps").send_keys("4", Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: len(page.pictures()) == 1)
    page.settle()
    page("seed").send_keys("9", Keys.ENTER)
    page.wait(lambda: "Seed\n9" in page("numbers").text)


def test_cancel_stops_the_work(page, daemon):
    page.quick(["zero"], 1, 10000)
    page("go").click()
    page.wait(lambda: page("stop").is_displayed())
    time.sleep(0.3)
    page("stop").click()
    page.wait(lambda: page("status").text == "Cancelled")
    daemon.idle(10)
    assert page("go").is_enabled()


@pytest.mark.parametrize("width", [320, 375, 768])
def test_no_sideways_scroll(session, width):
    page = session.open(width, 800)
    page.sampler("sde")
    page.pick(["zero", "one", "seven"])
    page.type("n", 8)
    page.type("steps", 4)
    page.type("scale", 2)
    page.js("document.querySelector('details').open = true")
    page.generate()
    page.generate()
    assert page.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    wide = page.js("return [...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 && e.offsetParent).map((e) => e.outerHTML.slice(0, 80))")
    assert wide == []
    page.js("scrollTo(0, 0)")
    page.shot(f"width-{width}")
    page.js("document.getElementById('status').scrollIntoView()")
    page.shot(f"width-{width}-result")


def luminance(page, selector, prop):
    rgb = [int(v) / 255 for v in re.findall(r"\d+", page.driver.find_element(By.CSS_SELECTOR, selector).value_of_css_property(prop))[:3]]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_are_legible(session, dark):
    page = session.open(dark=dark)
    page.quick(["zero", "one"], 4).generate()
    ground = luminance(page, "html", "background-color")
    assert (ground < 0.05) == dark
    for selector in ("h1", ".about", ".row > label", "#status", "#numbers dt", ".top a", "legend"):
        ink = luminance(page, selector, "color")
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5, selector
    page.shot("dark" if dark else "light")
    page("theme").click()
    page("theme").click()
    assert page("theme").text == "Theme: dark" and luminance(page, "html", "background-color") < 0.05
    page("theme").click()
