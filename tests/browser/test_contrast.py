"""Text on every page contrasts with what is behind it by WCAG 2 AA, in light and dark."""

import subprocess
import sys
from pathlib import Path

import pytest
from browser.explorer_page import TABS, Page
from support.synthetic_report import make_report

from vmoe.explain.page import write_page

pytestmark = pytest.mark.browser
REPOSITORY = Path(__file__).parents[2]

# Each text on the page with less contrast than AA asks for. Text in pictures (its ink is vmoe.palette.ink_on's, which
# has a test), what is not seen and controls that are off do not count.
TOO_FAINT = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
  return [red, green, blue, alpha / 255];
}
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
function behind(element) {
  const layers = [];
  for (let each = element; each; each = each.parentElement) layers.push(rgba(getComputedStyle(each).backgroundColor));
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
}
function luminance(colour) {
  const [red, green, blue] = colour.map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}
function opacity(element) {
  let product = 1;
  for (let each = element; each; each = each.parentElement) product *= Number(getComputedStyle(each).opacity);
  return product;
}
const found = [];
let seen = 0;
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement, style = getComputedStyle(element);
  if (!texts.currentNode.data.trim() || !element.checkVisibility({visibilityProperty: true, opacityProperty: true}))
    continue;
  if (element.closest("svg, option, noscript, .unseen, :disabled, :disabled + *")) continue;
  const ground = behind(element), colour = rgba(style.color);
  const ink = luminance(over([...colour.slice(0, 3), colour[3] * opacity(element)], ground)), paper = luminance(ground);
  const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  seen += 1;
  if (contrast < (large ? 3 : 4.5))
    found.push(`${element.tagName}.${element.className} ${contrast.toFixed(2)}: ${texts.currentNode.data.trim()}`);
}
return [seen, [...new Set(found)]];
"""


def too_faint(browser):
    """What is too faint on the page that is open, which has some text at least."""
    seen, found = browser.execute_script(TOO_FAINT)
    assert seen > 10
    return found


def set_scheme(browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_page(*make_report(), path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_explorers_page(chromium, explorer, scheme):
    set_scheme(chromium, scheme)
    page = Page(chromium, explorer)
    for tab in TABS:
        page.open(tab)
        assert too_faint(chromium) == [], tab


def test_a_faint_text_is_found(chromium, explorer):
    set_scheme(chromium, "light")
    Page(chromium, explorer)
    chromium.execute_script("document.querySelector('h1').style.color = '#999'")
    assert [each[:3] for each in too_faint(chromium)] == ["H1."]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_of_the_demo(chromium, tmp_path, scheme):
    """The page as it is before its model has come, with its own words in every place."""
    from vmoe.palette import page_colours

    source = REPOSITORY / "vmoe" / "serve" / "page"
    (tmp_path / "page.css").write_text(page_colours() + (source / "page.css").read_text())
    (tmp_path / "index.html").write_text((source / "index.html").read_text())
    set_scheme(chromium, scheme)
    chromium.get((tmp_path / "index.html").as_uri())
    assert too_faint(chromium) == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return folder


@pytest.mark.parametrize("scheme", ["default", "slate"])
def test_documentation(chromium, site, scheme):
    """On a phone: text contrasts, no page is wider than the window, no picture is missing."""
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    wide = "return document.documentElement.scrollWidth > 390 ? ['wider than 390 pixels'] : []"
    broken = "return [...document.images].filter((each) => each.complete && !each.naturalWidth).map((each) => each.src)"
    turn = """  // at once rather than by a transition
      document.head.insertAdjacentHTML("beforeend", "<style>* { transition: none !important }</style>");
      document.body.dataset.mdColorScheme = arguments[0];
    """
    found = {}
    for path in sorted(site.rglob("*.html")):
        chromium.get(path.as_uri())
        chromium.execute_script(turn, scheme)
        found[path.name] = too_faint(chromium) + chromium.execute_script(wide) + chromium.execute_script(broken)
    assert {name: each for name, each in found.items() if each} == {}
