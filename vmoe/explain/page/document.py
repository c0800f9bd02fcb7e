"""Combines template, style, scripts and data into one page, with all data escaped."""

import base64
import hashlib
import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.explain.page.maps import maps_that_fit, pack_layer
from vmoe.explain.page.packing import compact, pack, pack_integers
from vmoe.explain.page.sprites import tile
from vmoe.files import write_text
from vmoe.palette import NUM_COLOURS, expert_hex, page_colours

PAGE_CHARACTERS = 24_500_000  # the most characters of a page, below the promised 25 MB
_NUMBERS_PART, _PICTURES_PART = 0.6, 0.3  # largest shares of the page; the rest is for the routing of the pictures
_CODE_CHARACTERS = 400_000
_CLASS_TABLES = ("ablation_by_class", "class_log_ratio")  # large tables with many classes and experts
_SCRIPTS = (
    "elements.js", "numbers.js", "data.js", "state.js", "tooltip.js", "plots.js", "matrix.js", "flows.js",
    "patches.js", "inspector.js", "strip.js", "panels.js", "images.js", "experts.js", "load.js",
    "specialisation.js", "structure.js", "causes.js", "compare.js", "main.js",
)  # fmt: skip
_NO_PATCH = 65_535  # fills galleries that are shorter than the longest one


def write_page(report: dict[str, Any], images: dict[str, Any], path: str | Path) -> None:
    """Writes the explorer's page: one HTML file that needs no network, at most 25 MB.

    To fit, it reduces the resolution of pictures, the number of gates per patch, the images with routing, and at last
    the tables by class. The page lists what it holds.

    Args:
        report: The numbers, plain JSON types: see docs/explorer_metrics.md.
        images: The sampled images: "pixels" (n, height, width, 3) uint8, "label" and "predicted" (n, or (n, C) bool for
            several classes), "confidence" (n), "number" (n, their indices in the data set; optional), "name" (n, of
            their files; optional), and for each layer of the report "gates" (n, N, E), "dispatch" (the same, or None),
            "chosen" and "dropped" (n, N, K) or None, "entropy" (n, N) in nats. N: prefix tokens, then patches.
        path: The file, written atomically.

    Raises:
        UserError: The file cannot be written.
    """
    numbers = _report_json(report)
    pictures = tile(np.asarray(images["pixels"], dtype=np.uint8), int(_PICTURES_PART * PAGE_CHARACTERS))
    budget = PAGE_CHARACTERS - len(numbers) - sum(map(len, pictures["sheets"])) - _CODE_CHARACTERS
    count = len(images["label"])
    mapped, tops = maps_that_fit(report["layers"], images["layers"], count, max(0, budget))
    sample = {
        **pictures,
        "size": list(np.shape(images["pixels"])[1:3]),
        "count": count,
        "mapped": mapped,
        "tops": tops,
        "label": _labels(images["label"]),
        "predicted": _labels(images["predicted"]),
        "number": [int(number) for number in images.get("number", range(count))],
        "name": [str(name) for name in images["name"]] if "name" in images else None,
        "confidence": [round(float(value), 4) for value in images["confidence"]],
        "layers": [
            pack_layer(layer, maps, top, mapped)
            for layer, maps, top in zip(report["layers"], images["layers"], tops, strict=True)
        ],
    }
    palette = _inline_json([expert_hex(expert) for expert in range(NUM_COLOURS)])
    text = _assemble(str(report["title"]), {"report": numbers, "sample": _inline_json(sample), "palette": palette})
    write_text(path, text, errors="replace")  # a file's name may be invalid UTF-8


def _labels(values: Any) -> list[int | None] | list[list[int]]:
    """Class indices, or with several classes a list per image; None for an image without a label (below zero)."""
    if np.ndim(values) == 2:
        return [np.flatnonzero(row).tolist() for row in values]
    return [int(value) if value is not None and value >= 0 else None for value in values]


def _report_json(report: dict) -> str:
    """The report as JSON, without the tables by class if they alone would fill the page."""
    layers = [_columns(layer) for layer in report["layers"]]
    for left_out in range(len(_CLASS_TABLES) + 1):
        names = _CLASS_TABLES[:left_out]
        kept = [{key: value for key, value in layer.items() if key not in names} for layer in layers]
        text = _inline_json(compact({**report, "layers": kept, "left_out": names}))
        if len(text) <= _NUMBERS_PART * PAGE_CHARACTERS:
            break
    return text


def _columns(layer: dict) -> dict:
    """A layer with its experts' entries as columns, which pack well."""
    experts, ablation = layer["experts"], layer["ablation"]
    columns = {
        "top": _packed_gallery([expert["top"] for expert in experts]),
        "random": _packed_gallery([expert["random"] for expert in experts]),
        "position": [expert["position"] for expert in experts],
    }
    rest = [{key: value for key, value in expert.items() if key not in columns} for expert in experts]
    layer = {**layer, "experts": rest, **columns}
    if ablation is not None:
        layer["ablation"] = [{key: value for key, value in row.items() if key != "by_class"} for row in ablation]
        layer["ablation_by_class"] = [row.get("by_class") for row in ablation]
    return layer


def _packed_gallery(patches: list[list[dict]]) -> dict[str, Any]:
    """Patches of each expert as three (E, longest) tables."""
    longest = max(map(len, patches), default=0)
    image = np.full((len(patches), longest), _NO_PATCH)
    patch, gate = image.copy(), np.full(image.shape, np.nan)
    for row, entries in enumerate(patches):
        for column, entry in enumerate(entries):
            image[row, column], patch[row, column] = entry["image"], entry["patch"]
            gate[row, column] = entry["gate"]
    return {"image": pack_integers(image, 16), "patch": pack_integers(patch, 16), "gate": pack(gate)}


def _inline_json(value: Any) -> str:
    """JSON for a script element: nothing in it can end the element or start a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _assemble(title: str, data: dict[str, str]) -> str:
    assets = files("vmoe.explain.page") / "assets"
    style = page_colours() + (assets / "page.css").read_text(encoding="utf-8")
    script = "\n".join((assets / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    script = f'"use strict";\n{script}'
    # the browser enforces this policy: no network, and no other script
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    page = (assets / "page.html").read_text(encoding="utf-8")
    parts = {"title": html.escape(title), "policy": policy, "style": style, "script": script, **data}
    head, *rest = page.split("{{")  # in one pass, so that placeholders within inserted parts are never replaced
    return head + "".join(parts[name] + text for name, text in (each.split("}}", 1) for each in rest))


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
