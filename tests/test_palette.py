"""The palette is measured: the distances that its docstring states, under normal and colour-blind vision."""

import re
from importlib.resources import files

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from vmoe.figures.style import DIVERGING, INK, MUTED, PAPER, RULE, SHADES
from vmoe.palette import NUM_COLOURS, expert_colours, expert_hex, ink_on, page_colours

# Machado et al. 2009, table 1, severity 1; rows give linear R, G, B.
MACHADO = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(srgb):
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def seen(srgb, vision):
    return np.clip(linear(srgb) @ np.array(MACHADO[vision]).T, 0, 1)


def oklab(rgb):
    lms = (
        rgb
        @ np.array(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ]
        ).T
    )
    return (
        np.cbrt(lms)
        @ np.array(
            [
                [0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660],
            ]
        ).T
    )


def cielab(rgb):
    xyz = (
        rgb
        @ np.array(
            [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
        ).T
    )
    x, y, z = (
        np.where(v > 216 / 24389, np.cbrt(v), (24389 / 27 * v + 16) / 116) for v in (xyz / [0.95047, 1, 1.08883]).T
    )
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def cos(degrees):
    return np.cos(np.radians(degrees))


def ciede2000(lab1, lab2):
    (l1, a1, b1), (l2, a2, b2) = lab1.T, lab2.T
    c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    g = 1.5 - 0.5 * np.sqrt(c7 / (c7 + 25.0**7))
    c1, c2 = np.hypot(g * a1, b1), np.hypot(g * a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, g * a1)) % 360, np.degrees(np.arctan2(b2, g * a2)) % 360
    dh = (h2 - h1 + 180) % 360 - 180
    dl, dc, dh_ = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(dh) / 2)
    lm, cm = (l1 + l2) / 2, (c1 + c2) / 2
    hm = np.where(np.abs(h1 - h2) > 180, (h1 + h2 + 360) / 2, (h1 + h2) / 2)
    t = 1 - 0.17 * cos(hm - 30) + 0.24 * cos(2 * hm) + 0.32 * cos(3 * hm + 6) - 0.2 * cos(4 * hm - 63)
    sl = 1 + 0.015 * (lm - 50) ** 2 / np.sqrt(20 + (lm - 50) ** 2)
    sc, sh = 1 + 0.045 * cm, 1 + 0.015 * cm * t
    turn = np.radians(60 * np.exp(-(((hm - 275) / 25) ** 2)))
    rt = -2 * np.sqrt(cm**7 / (cm**7 + 25.0**7)) * np.sin(turn)
    return np.sqrt((dl / sl) ** 2 + (dc / sc) ** 2 + (dh_ / sh) ** 2 + rt * dc / sc * dh_ / sh)


def test_ciede2000_of_the_published_pairs():
    # Sharma, Wu, Dalal 2005, table 1, pairs 1, 7 and 17.
    first = np.array([[50, 2.6772, -79.7751], [50, 0, 0], [50, 2.5, 0]])
    second = np.array([[50, 0, -82.7485], [50, -1, 2], [73, 25, -18]])
    assert ciede2000(first, second) == pytest.approx([2.0425, 2.3669, 27.1492], abs=1e-4)


@pytest.mark.parametrize(
    "first, ok_floor, de_floor", [(8, 0.164, 17.0), (12, 0.097, 11.7), (16, 0.064, 6.8), (32, 0.063, 5.4)]
)
def test_smallest_distance_under_all_kinds_of_vision(first, ok_floor, de_floor):
    colours = expert_colours(first)
    one, other = np.triu_indices(first, 1)
    ok = min(np.linalg.norm(lab[one] - lab[other], axis=1).min() for lab in (oklab(seen(colours, v)) for v in MACHADO))
    de = min(ciede2000(lab[one], lab[other]).min() for lab in (cielab(seen(colours, v)) for v in MACHADO))
    # What the docstring states, to its last digit: neither better nor worse.
    assert ok == pytest.approx(ok_floor, abs=0.0006)
    assert de == pytest.approx(de_floor, abs=0.06)


def test_an_expert_keeps_its_colour_whatever_the_number_of_experts():
    assert np.array_equal(expert_colours(64)[:8], expert_colours(8))
    assert np.array_equal(expert_colours(33)[NUM_COLOURS], expert_colours(1)[0])
    assert expert_hex(0) == expert_hex(NUM_COLOURS) == "#1879c1"


def test_ink_contrasts_with_every_colour():
    colours = expert_colours(32)
    light, ink = linear(colours) @ [0.2126, 0.7152, 0.0722], ink_on(colours)[:, 0]
    contrast = np.where(ink == 1, 1.05 / (light + 0.05), (light + 0.05) / 0.05)
    assert contrast.min() >= 4.5  # WCAG 2 AA


def test_text_contrasts_on_pages_in_light_and_dark():
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", page_colours())
    schemes = [{name: each[scheme] for name, *each in pairs} for scheme in (0, 1)]
    for colours in schemes:
        light = {name: linear(np.array(to_rgb(each))) @ [0.2126, 0.7152, 0.0722] for name, each in colours.items()}
        for name in light.keys() - {"paper", "raised", "rule"}:
            for ground in ("paper", "raised"):
                low, high = sorted((light[name], light[ground]))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)  # WCAG 2 AA
    assert [schemes[0][name] for name in ("ink", "muted", "paper", "rule")] == [INK, MUTED, PAPER, RULE]


def test_figures_and_page_have_the_same_scales():
    script = (files("vmoe.explain.page") / "assets" / "numbers.js").read_text(encoding="utf-8")
    for scale, name in ((SHADES, "SEQUENTIAL"), (DIVERGING, "DIVERGING")):
        light = re.search(rf"const {name} = {{\s*light: colourScale\(\[(.*?)\]\)", script).group(1)
        stops = re.findall(r"#[0-9a-f]{6}", light)
        shades = scale(np.linspace(0, 1, len(stops)))[:, :3]
        assert np.abs(shades - [to_rgb(stop) for stop in stops]).max() < 0.01
