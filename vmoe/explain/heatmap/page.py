"""The page of a folder of routing maps: every image with its prediction and its figures."""

import os
from collections.abc import Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from vmoe.palette import page_colours
from vmoe.text import printable

# A light theme only, since the figures are light
_STYLE = """\
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1360px; padding: 24px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 4px 0; color: var(--muted); overflow-wrap: anywhere; }
a { color: var(--link); }
section { margin-top: 32px; padding-top: 16px; border-top: 1px solid var(--rule); }
img { display: block; width: 100%; height: auto; margin-top: 12px; border: 1px solid var(--rule); }
nav { margin-top: 16px; columns: 9em; }
nav a { display: block; overflow-wrap: anywhere; }
"""


def heatmap_page(index: dict[str, Any]) -> str:
    """HTML with the figures of `index`, the result of `write_heatmaps`. It must be in the figures' folder."""
    images = index["images"]
    count = f"{len(images)} image{'s' * (len(images) > 1)}"
    size = index["image_size"]
    pixels = size if isinstance(size, int) else " x ".join(map(str, size))
    about = [f"checkpoint {index['checkpoint']}", f"epoch {index['epoch']}", f"images of {pixels} pixels"]
    if index["capacity_factor"] is not None:
        about.append(f"capacity factor {index['capacity_factor']:g}")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Routing maps of {count}</title><style>\n{page_colours()}{_STYLE}</style></head><body>",
        f"<h1>Which expert takes which patch, in {count}</h1>",
        f"<p>{_escaped_text(' · '.join(about))}</p>",
        "<p>Each figure opens in full size. The numbers behind them: <a href='index.json'>index.json</a></p>",
    ]
    if len(images) > 1:
        links = [f"<a href='#{number}'>{_escaped_text(_image_name(image))}</a>" for number, image in enumerate(images)]
        parts += ["<nav>", *links, "</nav>"]
    for number, image in enumerate(images):
        parts += _section(number, image)
    if index["damaged"]:
        parts.append("<section><h2>Left out</h2>")
        parts += [f"<p>{_escaped_text(line)}</p>" for line in index["damaged"]]
        parts.append("</section>")
    return "\n".join([*parts, "</body></html>", ""])


def _section(number: int, image: dict[str, Any]) -> Sequence[str]:
    classes = ", ".join(f"{each['class']} {each['probability']:.1%}" for each in image["most_probable"])
    if "labels" in image:  # several classes per image
        classes = f"{', '.join(image['labels']) or 'no class'} ({classes})"
    figures = [
        f"<a href='{_page_link(page)}'><img loading='lazy' src='{_page_link(page)}' alt='{_escaped_text(page)}'></a>"
        for page in image["pages"]
    ]
    return [
        f"<section id='{number}'><h2>{_escaped_text(_image_name(image))}</h2>",
        f"<p>predicted: {_escaped_text(classes)}</p>",
        *figures,
        "</section>",
    ]


def _image_name(image: dict[str, Any]) -> str:
    return os.path.basename(image["file"])


def _escaped_text(text: str) -> str:
    return escape(printable(text))


def _page_link(page: str) -> str:
    return quote(os.fsencode(page))
