"""The explorer's page in a real browser: what is seen, pointed at, toggled and typed."""

import numpy as np
import pytest
from browser.explorer_page import TABS, Page
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from support.synthetic_report import make_report

from vmoe.explain.page import write_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    report, images = make_report()
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_page(report, images, path)
    return path, report, images


@pytest.fixture
def page(chromium, written):
    opened = Page(chromium, written[0])
    yield opened
    assert opened.errors() == []


@pytest.mark.parametrize("tab", TABS)
def test_every_tab_opens_and_draws(page, tab):
    page.open(tab)
    shown = [panel for panel in page.all("[role=tabpanel]") if panel.is_displayed()]
    assert [panel.get_attribute("id") for panel in shown] == [f"panel-{tab.lower()}"]
    assert page.one("[role=tab][aria-selected=true]").text == tab
    assert len(shown[0].find_elements(By.CSS_SELECTOR, "canvas, svg")) >= 2
    assert "undefined" not in shown[0].text and "NaN" not in shown[0].text and "[object" not in shown[0].text
    said = shown[0].text.replace("\u00a0", " ")
    assert ("n = 1,200 images" if tab == "Causes" else "5,000") in said
    assert "n = 700 images" in said or tab != "Structure"


def test_nothing_comes_from_elsewhere(page):
    names = page.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in names if not name.startswith("data:")] == []
    blocked = page.js(
        "const element = document.createElement('script'); element.textContent = 'window.hacked = 1';"
        "document.body.append(element); return window.hacked === undefined"
    )
    assert blocked  # the policy lets no other script run
    page.browser.get_log("browser")  # that refusal is reported as an error


def test_pointing_at_a_patch_tells_its_experts(page, written):
    _, report, images = written
    for layer, row, column in ((0, 1, 2), (2, 5, 0)):
        page.point_at(layer, row, column)
        token = report["layers"][layer]["prefix"] + row * 6 + column
        first = images["layers"][layer]["chosen"][0, token, 0]
        gate = float(images["layers"][layer]["gates"][0, token, first])
        tip = page.text("#tip").split("\n")
        assert tip[0] == report["layers"][layer]["name"]
        assert tip[1].startswith(f"expert {first}: gate ")
        assert float(tip[1].split("gate ")[1].split(",")[0]) == pytest.approx(gate, abs=0.008)
        page.until(
            lambda row=row, column=column: f"row {row + 1} of 6, column {column + 1} of 6" in page.text(".inspector")
        )
        route = page.all(".inspector .route .chips")
        assert [chips.text.split()[0] for chips in route] == [
            str(maps["chosen"][0, token, 0]) for maps in images["layers"]
        ]
    assert len(page.all(".similar .tile")) == 8


def test_most_similar_patches_are_those_of_the_slow_count(page, written):
    _, _, images = written
    page.point_at(0, 2, 3)
    token = 1 + 2 * 6 + 3
    shared = np.zeros((40, 36))
    for maps in images["layers"]:
        gates = maps["gates"].astype(float)
        shared += np.minimum(gates[:, 1:], gates[0, token]).sum(-1) / len(images["layers"])
    best = np.sort(shared[1:].max(1))[::-1][:8]
    page.until(lambda: "row 3 of 6, column 4 of 6" in page.text(".inspector"))
    shown = [float(tile.text.split(" %")[0]) for tile in page.all(".similar .tile")]
    assert shown == pytest.approx(100 * best, abs=1)


def test_toggles_change_the_maps(page):
    seen = {"first": page.picture_of(1)}
    legends = {page.text("#mode-legend")}
    for mode in ("second", "one", "entropy", "dropped"):
        page.pick_mode(mode)
        seen[mode] = page.picture_of(1)
        legends.add(page.text("#mode-legend"))
    assert len(set(seen.values())) == 5 and len(legends) == 5
    page.pick_mode("first")
    assert page.picture_of(1) == seen["first"]
    for index in range(2):  # opacity, numbers
        page.all(".bar input[type=checkbox]")[index].click()
        seen[index] = page.picture_of(1)
    assert len(set(seen.values())) == 7
    assert page.js("return document.activeElement.matches('.bar input[type=checkbox]')")  # the keyboard stays there


def test_one_expert_shows_its_gate_and_a_dead_one_nothing(page):
    page.pick_mode("one")
    pictures = {}
    for expert in (1, 2):
        page.js(
            "const select = [...document.querySelectorAll('select')].at(-1); select.selectedIndex = arguments[0];"
            "select.dispatchEvent(new Event('change'))",
            expert,
        )
        pictures[expert] = page.js(
            "const {width, height} = document.querySelector('.panel[data-layer=\"0\"] canvas');"
            "return [...document.querySelector('.panel[data-layer=\"0\"] canvas').getContext('2d')"
            ".getImageData(0, 0, width, height).data].filter((_, i) => i % 4 < 3)"
        )
    colours = {expert: np.array(values).reshape(-1, 3) for expert, values in pictures.items()}
    assert np.ptp(colours[2], axis=1).max() <= 3  # expert 2 is dead: only the grey ground is left
    assert np.ptp(colours[1], axis=1).max() > 50


def test_class_token_stands_apart_and_is_told(page, written):
    _, _, images = written
    token = page.one(".panel[data-layer='1'] .prefix button")
    assert token.text == str(images["layers"][1]["chosen"][0, 0, 0])
    ActionChains(page.browser, duration=0).move_to_element(token).perform()
    page.until(lambda: "The class token" in page.text(".inspector"))


def test_keyboard_walks_tabs_images_and_patches(page):
    page.one("#tab-images").send_keys(Keys.ARROW_RIGHT)
    assert page.one("[role=tab][aria-selected=true]").text == "Experts"
    assert page.js("return document.activeElement.id") == "tab-experts"
    page.press(Keys.ARROW_LEFT)

    page.one(".strip [role=option][tabindex='0']").click()
    before = page.text(".verdict")
    page.js("document.querySelector('.strip [role=option][tabindex=\"0\"]').focus()")
    page.press(Keys.ARROW_RIGHT)
    assert page.one(".strip [aria-selected=true]") == page.all(".strip [role=option]")[1]
    assert page.text(".verdict") != before and page.text(".verdict").startswith("Image 1 ")

    page.js("arguments[0].focus()", page.map(0))
    place = page.js("return placeName(state.spot)")
    page.press(Keys.ARROW_LEFT)
    assert page.js("return placeName(state.spot)") != place
    assert "blocks.1.mlp. expert" in page.js("return document.getElementById('announcer').textContent")
    page.press(Keys.ENTER)
    page.until(lambda: "Pinned" in page.text(".inspector"))
    page.point_at(1, 0, 0)
    assert "row 1 of" not in page.text(".inspector")
    page.js("arguments[0].focus()", page.map(0))
    page.press(Keys.ESCAPE)
    page.until(lambda: "Pinned" not in page.text(".inspector"))


def test_focus_is_visible(page):
    page.js("document.getElementById('tab-images').focus()")
    page.press(Keys.TAB)
    style = page.js("const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]")
    assert style == ["solid", "3px"]


def test_plots_and_matrices_are_read_with_arrow_keys(page, written):
    _, report, _ = written
    page.open("Load")
    page.js("document.querySelector('#panel-load svg[tabindex]').focus()")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.text("#tip").startswith(f"Expert 1\n{report['layers'][0]['load'][1]:.2f}\N{MULTIPLICATION SIGN}")
    page.open("Specialisation")
    page.js("document.querySelector('#panel-specialisation .matrix').focus()")
    page.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    ratios = report["layers"][0]["class_log_ratio"]
    name = report["classes"][ratios["order"][2]]
    value = ratios["matrix"][0][ratios["order"][2]]
    assert page.text("#tip").startswith(f"expert 0, {name}\nlog-ratio {value:.2f}".replace("-0", "\N{MINUS SIGN}0"))


def test_a_dead_expert_says_so_and_tiles_lead_to_their_image(page, written):
    _, report, _ = written
    page.open("Experts")
    page.all(".card")[2].click()
    assert "This expert is dead" in page.text("#panel-experts")
    page.all(".card")[3].click()
    best = report["layers"][0]["experts"][3]["top"]
    assert len(page.all(".tiles.top .tile")) == len(best) and len(page.all(".tiles.random .tile")) == 16
    page.one(".tiles.top .tile").click()
    assert page.text(".verdict").startswith(f"Image {best[0]['image']} ")
    row, column = divmod(best[0]["patch"], 6)
    assert f"row {row + 1} of 6, column {column + 1} of 6" in page.text(".inspector")


def test_nothing_is_claimed_where_the_null_is_not_beaten(page):
    page.open("Specialisation")
    titles = {
        each.get_attribute("data-property"): each.find_element(By.TAG_NAME, "h4").text
        for each in page.all("[data-property]")
    }
    assert titles["brightness"] == "brightness: no layer beats its null, so nothing is claimed."
    assert titles["position"].startswith("position: beats its null in 3 of 3 layers")


def test_theme_follows_the_system_and_the_button(page):
    def paper():
        return page.js("return getComputedStyle(document.body).backgroundColor")

    themes = {}
    for scheme in ("light", "dark"):
        page.browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        themes[scheme] = paper()
        if scheme == "light":
            light_map = page.picture_of(0)
    assert themes == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}
    page.until(lambda: page.picture_of(0) != light_map)
    page.one("#theme").click()
    assert page.text("#theme") == "Theme: light" and paper() == themes["light"]
    page.one("#theme").click()
    assert page.text("#theme") == "Theme: dark" and paper() == themes["dark"]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_all_findings_can_be_asked_for(page, written):
    _, report, _ = written
    assert [each.text for each in page.all("#findings li")] == report["findings"][:4]
    page.one("#more-findings").click()
    assert [each.text for each in page.all("#findings li")] == report["findings"]
    page.one("#more-findings").click()
    assert len(page.all("#findings li")) == 4


def test_on_a_phone_the_tabs_are_on_the_first_screen(chromium, tmp_path):
    report, images = make_report()
    report["findings"] = [f"{index}: {'what the experts of a layer do, ' * 6}" for index in range(9)]
    write_page(report, images, tmp_path / "index.html")
    page = Page(chromium, tmp_path / "index.html", 390)
    assert page.js("return document.getElementById('tabs').getBoundingClientRect().bottom") < 560
    assert len(page.all("#findings li")) == 1
    page.one("#more-findings").click()
    assert [each.text for each in page.all("#findings li")] == [text.strip() for text in report["findings"]]
    assert page.errors() == []


@pytest.mark.parametrize("width", [390, 1280, 2560])
def test_no_width_makes_the_page_scroll_sideways(chromium, written, width):
    page = Page(chromium, written[0], width)
    for tab in TABS:
        page.js("openTab(arguments[0])", tab.lower())
        assert page.js("return document.documentElement.scrollWidth") <= width, tab
    assert page.errors() == []
