"""The explorer's page as a file: its size, what it holds, and that names stay text."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from support.synthetic_report import make_report

from vmoe.explain.page import document, write_page
from vmoe.explain.page.packing import compact, pack

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{report}}\"'\u2028"


class Elements(HTMLParser):
    """The elements of a page with their attributes and, of scripts, the text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def written(tmp_path, report, images):
    write_page(report, images, tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    elements = Elements(text)
    palette, held, sample, _ = elements.scripts
    return text, elements, json.loads(palette), json.loads(held), json.loads(sample)


def unpacked(packed):
    """What assets/data.js makes of a packed array."""
    codes = np.frombuffer(base64.b64decode(packed["packed"]), dtype=f"<u{packed['bits'] // 8}").reshape(packed["shape"])
    if "low" not in packed:
        return codes
    step = (packed["high"] - packed["low"]) / (2 ** packed["bits"] - 2)
    return np.where(codes == 0, np.nan, packed["low"] + (codes.astype(float) - 1) * step)


@pytest.mark.parametrize("bits", [8, 16])
def test_quantised_numbers_come_back_within_half_a_step(bits):
    values = np.random.default_rng(0).normal(3, 2, (7, 5, 3))
    values[1, 2, 0] = np.nan
    values[3, 0, 1] = -np.inf
    back = unpacked(pack(values, bits))
    finite = np.isfinite(values)
    assert np.array_equal(np.isnan(back), ~finite)
    half = (values[finite].max() - values[finite].min()) / (2**bits - 2) / 2
    assert np.abs(back - values)[finite].max() <= half * 1.000001


def test_a_constant_and_an_empty_table_survive():
    assert np.array_equal(unpacked(pack(np.full((2, 3), 0.25))), np.full((2, 3), 0.25))
    assert unpacked(pack(np.zeros((0, 4)))).shape == (0, 4)


def test_long_lists_are_packed_and_indices_stay_exact():
    order = np.random.default_rng(0).permutation(1000)
    held = compact(
        {"order": order.tolist(), "short": [0.123456789, None, float("nan"), 2, True], "steps": [10**6] * 300}
    )
    assert np.array_equal(unpacked(held["order"]), order)
    assert held["short"] == [0.12346, None, None, 2, True]
    assert held["steps"] == [10**6] * 300


def test_gates_and_choices_of_the_sample(tmp_path):
    report, images = make_report(images=6)
    *_, sample = written(tmp_path, report, images)
    assert sample["mapped"] == 6
    for packed, maps in zip(sample["layers"], images["layers"], strict=True):
        experts, gates = unpacked(packed["weights"]["experts"]), unpacked(packed["weights"]["gates"])
        true = maps["gates"].astype(float)
        assert np.array_equal(experts[..., :2], maps["chosen"])
        assert np.abs(gates - np.take_along_axis(true, experts.astype(int), -1)).max() <= true.max() / 254 / 2 * 1.001
        assert np.array_equal(unpacked(packed["dropped"]) & 1, maps["dropped"][..., 0])
        assert np.array_equal(unpacked(packed["dropped"]) >> 1, maps["dropped"][..., 1])


def test_choices_come_before_larger_gates(tmp_path):
    # A router that balances by a bias chooses against its gates; -1 is no choice.
    report, images = make_report(images=1, layers=1, experts=4, grid=(1, 2), prefix=0, classes=2)
    layer = images["layers"][0]
    layer["gates"] = np.array([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]], np.float16)
    layer["chosen"] = np.array([[[3, 1], [0, -1]]], np.int16)
    layer["dropped"], layer["entropy"] = np.zeros((1, 2, 2), bool), np.ones((1, 2), np.float16)
    *_, sample = written(tmp_path, report, images)
    assert unpacked(sample["layers"][0]["weights"]["experts"]).tolist() == [[[3, 1, 0, 2], [0, 3, 2, 1]]]


def test_padding_belongs_to_no_expert(tmp_path):
    report, images = make_report(images=2, grid=(2, 2), prefix=0)
    valid = np.array([[True, True, True, False], [True] * 4])
    images["layers"][0]["valid"] = valid
    *_, sample = written(tmp_path, report, images)
    gates = unpacked(sample["layers"][0]["weights"]["gates"])
    assert np.array_equal(gates.sum(-1) > 0, valid)


def test_slots_hold_both_directions_and_tokens_that_no_expert_took(tmp_path):
    report, images = make_report(images=3, kind="slots")
    images["layers"][0]["gates"][1, 4] = 0
    *_, sample = written(tmp_path, report, images)
    packed = sample["layers"][0]
    assert packed["chosen"] == 0
    assert np.argwhere(unpacked(packed["dropped"])).tolist() == [[1, 4]]
    experts = unpacked(packed["dispatch"]["experts"])
    assert np.array_equal(experts[..., 0], images["layers"][0]["dispatch"].astype(np.float32).argmax(-1))


def test_what_does_not_fit_is_left_out_and_said(tmp_path, monkeypatch):
    report, images = make_report(layers=6, experts=32, images=120, size=96, grid=(8, 8))
    write_page(report, images, tmp_path / "whole.html")
    monkeypatch.setattr(document, "PAGE_CHARACTERS", 2_500_000)
    *_, sample = written(tmp_path, report, images)
    assert (tmp_path / "whole.html").stat().st_size > 4_000_000
    assert (tmp_path / "index.html").stat().st_size <= 2_500_000
    assert sample["count"] == 120 and 0 < sample["mapped"] <= 120
    assert max(sample["tops"]) < 32
    assert all(layer["weights"]["experts"]["shape"][0] == sample["mapped"] for layer in sample["layers"])


def test_tables_by_class_go_last(tmp_path, monkeypatch):
    report, images = make_report(layers=2, experts=16, classes=300, images=10)
    assert written(tmp_path, report, images)[3]["left_out"] == []
    monkeypatch.setattr(document, "PAGE_CHARACTERS", 700_000)
    monkeypatch.setattr(document, "_NUMBERS_PART", 0.08)
    *_, held, _ = written(tmp_path, report, images)
    assert "ablation_by_class" in held["left_out"] and "ablation_by_class" not in held["layers"][0]


@pytest.mark.slow
def test_48_layers_of_64_experts_fit_25_megabytes(tmp_path):
    report, images = make_report(layers=48, experts=64, classes=1000, images=120, grid=(14, 14), size=224)
    *_, sample = written(tmp_path, report, images)
    assert (tmp_path / "index.html").stat().st_size <= 25_000_000
    assert sample["mapped"] >= 50


def test_names_cannot_leave_their_place(tmp_path):
    report, images = make_report()
    plain = written(tmp_path, report, images)[1].found
    report["title"] = report["findings"][0] = report["classes"][0] = report["layers"][0]["name"] = HOSTILE
    report["provenance"]["checkpoint"] = report["runs"][0]["name"] = HOSTILE
    text, elements, _, held, _ = written(tmp_path, report, images)
    assert [tag for tag, _ in elements.found] == [tag for tag, _ in plain]
    assert held["classes"][0] == held["title"] == held["layers"][0]["name"] == HOSTILE
    assert HOSTILE not in text


def test_a_name_that_is_no_valid_text_is_written(tmp_path):
    report, images = make_report(images=2)
    report["title"] = "run\udcff"  # how Python reads a byte of a file's name that is no UTF-8
    assert "run?" in written(tmp_path, report, images)[0]


def test_nothing_is_loaded(tmp_path):
    text, elements, *_ = written(tmp_path, *make_report())
    for tag, attributes in elements.found:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert set(re.findall(r"https?://[^\s\"'`)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttpRequest|\bimport\(|innerHTML|insertAdjacentHTML", text)
    policy = next(
        attributes["content"] for tag, attributes in elements.found if tag == "meta" and "content" in attributes
    )
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
