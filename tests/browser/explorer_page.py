"""The explorer's page as its browser tests see it: opened from disk, pointed at, read."""

import pytest

_webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
ActionChains = _webdriver.ActionChains
By = pytest.importorskip("selenium.webdriver.common.by", reason="needs selenium").By
WebDriverWait = pytest.importorskip("selenium.webdriver.support.wait", reason="needs selenium").WebDriverWait

TABS = ("Images", "Experts", "Load", "Specialisation", "Structure", "Causes", "Compare")


class Page:
    """A page opened from disk."""

    def __init__(self, browser, path, width=1280, height=1000):
        self.browser = browser
        browser.get_log("browser")  # what earlier pages said
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        browser.get("about:blank")  # so that a page of the same name is loaded again
        browser.get(path.as_uri())
        self.until(lambda: self.js("return document.documentElement.dataset.ready"))

    def js(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, condition):
        return WebDriverWait(self.browser, 20, poll_frequency=0.05).until(lambda _: condition())

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).text

    def open(self, tab):
        self.one(f"#tab-{tab.lower()}").click()

    def map(self, layer):
        return self.one(f".panel[data-layer='{layer}'] .map")

    def picture_of(self, layer):
        canvas = f"document.querySelector('.panel[data-layer=\"{layer}\"] canvas')"
        return self.js(f"return {canvas}.toDataURL()")

    def pick_mode(self, value):
        self.one(f".choice input[value='{value}']").find_element(By.XPATH, "..").click()

    def point_at(self, layer, row, column):
        rows, columns = self.js("return REPORT.layers[arguments[0]].grid", layer)
        target = self.map(layer)
        self.js("arguments[0].scrollIntoView({block: 'center'})", target)
        width, height = target.size["width"], target.size["height"]
        x, y = (column + 0.5) / columns - 0.5, (row + 0.5) / rows - 0.5
        ActionChains(self.browser, duration=0).move_to_element_with_offset(target, x * width, y * height).perform()

    def press(self, *keys):
        ActionChains(self.browser, duration=0).send_keys(*keys).perform()

    def errors(self):
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]
