"""The demo page in a real browser, opened from disk: its logits beside Python's, its controls, its looks."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vmoe.checkpoints import load_checkpoint
from vmoe.cli.demo_page import main
from vmoe.data.images import eval_crop, eval_transform, load_image
from vmoe.data.samples import PHOTOGRAPHS, load_photograph
from vmoe.serve.demo_page import RUNTIME, RUNTIME_VERSION

By = pytest.importorskip("selenium.webdriver.common.by", reason="needs selenium").By
WebDriverWait = pytest.importorskip("selenium.webdriver.support.wait", reason="needs selenium").WebDriverWait
pytestmark = pytest.mark.browser
SHIPPED = Path(__file__).parents[2] / "assets" / "models" / "cifar100_tiny.safetensors"
BOUND = 1e-3  # of a logit


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two photographs and noise as PNG files, of which all programs read the same pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for side in (20, 64, 101):  # to be enlarged, halved, shrunk
        noise = generator.integers(0, 256, (side, side + 5, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"noise{side}.png")
    for name in PHOTOGRAPHS:
        Image.fromarray(load_photograph(name)).save(folder / Path(name).with_suffix(".png"))
    return folder


@pytest.fixture(scope="module")
def page(chromium, pictures, tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("demo")
    command = ["npm", "pack", f"{RUNTIME}@{RUNTIME_VERSION}"]
    if shutil.which("npm") is None or subprocess.run(command, cwd=folder, capture_output=True).returncode:
        pytest.skip("needs npm and a network, by which it fetches onnxruntime-web")
    out = folder / "page"
    assert main([str(SHIPPED), "--out", str(out), "--runtime", *map(str, folder.glob("*.tgz"))]) == 0
    return Page(chromium, out / "index.html")


class Page:
    def __init__(self, browser, path):
        self.browser = browser
        self.resize(1280, 1000)
        browser.get_log("browser")
        browser.get(path.as_uri())
        self.until_run(0)

    def resize(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def js(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def runs(self):
        return int(self.js("return document.documentElement.dataset.runs ?? 0"))

    def until_run(self, before):
        WebDriverWait(self.browser, 60, poll_frequency=0.05).until(lambda _: self.runs() > before)

    def show(self, path):
        before = self.runs()
        self.one("#file").send_keys(str(path))
        self.until_run(before)

    def press(self, selector):
        before = self.runs()
        self.js("arguments[0].click()", self.one(selector))
        self.until_run(before)

    def set_capacity(self, value):
        before = self.runs()
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.js(script, self.one("#capacity"), value)
        self.until_run(before)

    def logits(self):
        return np.array(self.js("return state.now.logits"))

    def map(self, index):
        return self.js(f"return document.getElementById('map-{index}').toDataURL()")

    def shares(self):
        """The number on each chip of the first layer."""
        return [
            int(chip.text.split(": ")[1]) for chip in self.browser.find_elements(By.CSS_SELECTOR, "#chips-0 button")
        ]


@torch.no_grad()
def test_pixels_and_logits_are_pythons(page, pictures):
    checkpoint = load_checkpoint(SHIPPED)
    transform = eval_transform(checkpoint.image_size, checkpoint.mean, checkpoint.std)
    for path in sorted(pictures.iterdir()):
        page.show(path)
        pixels = page.js("return Array.from(state.picture.pixels)")
        assert np.array_equal(np.reshape(pixels, (32, 32, 3)), eval_crop(load_image(path), 32)), path.name
        expected = checkpoint.model(transform(load_image(path))[None])[0].numpy()
        np.testing.assert_allclose(page.logits(), expected, atol=BOUND, err_msg=path.name)
        assert checkpoint.class_names[expected.argmax()] in page.one("#status").text


def test_an_expert_that_is_off_takes_nothing(page, pictures):
    page.show(pictures / "flower.png")
    logits, shares, drawn = page.logits(), page.shares(), page.map(0)
    assert sum(shares) == 2 * 64  # two choices of each of 8 x 8 patches
    busiest = int(np.argmax(shares))
    page.press(f"#chips-0 button:nth-child({busiest + 1})")
    assert page.shares()[busiest] == 0 and sum(page.shares()) == 2 * 64
    assert np.abs(page.logits() - logits).max() > BOUND and page.map(0) != drawn
    page.press("#reset")
    np.testing.assert_allclose(page.logits(), logits, atol=1e-6)
    assert page.map(0) == drawn


def test_two_experts_stay_on(page):
    for expert in range(6):
        page.press(f"#chips-1 button:nth-child({expert + 1})")
    left = [page.one(f"#chips-1 button:nth-child({expert + 1})").is_enabled() for expert in range(8)]
    assert left == [True] * 6 + [False] * 2
    page.press("#reset")


def test_less_capacity_drops_patches(page, pictures):
    page.show(pictures / "flower.png")
    assert "0.0 %" in page.one("#note-0").text
    logits = page.logits()
    page.set_capacity(10)
    assert "factor 0.40: 7 slots" in page.one("#capacity-text").text
    assert max(page.shares()) <= 7 and "0.0 %" not in page.one("#note-0").text
    assert np.abs(page.logits() - logits).max() > BOUND
    page.press("#reset")


def test_what_is_no_picture_is_told(page, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    page.one("#file").send_keys(str(text))
    WebDriverWait(page.browser, 20).until(lambda _: "text.jpg: cannot be read as a picture" in page.one("#status").text)


@pytest.mark.parametrize(("width", "height"), [(1280, 1000), (390, 844)])
def test_nothing_is_cut_off(page, pictures, width, height):
    page.resize(width, height)
    page.show(pictures / "flower.png")
    assert page.js("return document.documentElement.scrollWidth") <= width
    page.resize(1280, 1000)


def test_console_and_network_are_silent(page):
    assert page.browser.get_log("browser") == []
    fetched = page.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(address.startswith(("file:", "blob:", "data:")) for address in fetched)
