"""The picture of a confusion matrix, readable from 2 classes to 1000."""

import numpy as np

from vmoe.evaluation.metrics import Evaluation
from vmoe.figures.style import BODY, INK, MARGIN, MUTED, PAPER, RULE, SHADES, SMALL, Page, text_width

_MOST_NAMED_ROWS = 200  # with up to so many classes each row has its name
_BARS = 190  # width of the bars with their numbers, in pixels


def draw_confusion(evaluation: Evaluation, class_names: list[str], data: str, model: str) -> Page:
    """Draws a confusion matrix: rows are true classes, columns predictions, with each class's accuracy on the right.

    Shades show the share of the row on a square root scale, so that rare confusions are visible.

    Args:
        evaluation: The evaluation, with its confusion matrix.
        class_names: The names of all classes.
        data: The name of the data, for the title.
        model: The name of the model, such as its path.
    """
    counts = np.array(evaluation.confusion)
    num_classes = len(counts)
    totals = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    cell = int(np.clip(640 // num_classes, 14, 64)) if num_classes <= _MOST_NAMED_ROWS else max(1, 1400 // num_classes)
    side = cell * num_classes
    size = min(BODY, cell - 2)  # font size of the names
    names = [_shorten(name) for name in class_names] if num_classes <= _MOST_NAMED_ROWS else [""] * num_classes
    longest = int(max(text_width(name, size) for name in names)) if any(names) else 60
    is_upright = longest <= cell - 6
    left, top = MARGIN + longest + 30, MARGIN + 116
    right, bottom = left + side + 24, top + side
    below = max(30 if is_upright or not any(names) else longest + 10, 62)  # names of the columns, and the legend
    page = Page(max(right + _BARS + MARGIN, 760), bottom + below + MARGIN)
    page.heading(
        f"Confusion on the {data}",
        f"{evaluation.images:,} images · top-1 {evaluation.top1:.2%} · rows: true class, columns: predicted class",
    )
    page.text(MARGIN, MARGIN + 74, page.fit(model, BODY, page.width - 2 * MARGIN, keep="end"), color=MUTED)
    page.picture(left, top, _matrix_pixels(shares, cell))
    _write_names(page, names, left, top, cell, size, is_upright)
    if cell >= 32:
        _numbers(page, counts, shares, left, top, cell)
    _bars(page, evaluation, right, top, cell, _BARS - 60)
    _draw_scale(page, right, bottom + 8)
    return page


def _shorten(name: str, longest: int = 22) -> str:
    return name if len(name) <= longest else name[: longest - 1].rstrip() + "…"


def _matrix_pixels(shares: np.ndarray, cell: int) -> np.ndarray:
    pixels = np.repeat(np.repeat(SHADES(np.sqrt(shares))[..., :3], cell, 0), cell, 1)
    if cell >= 6:  # hairlines between the cells
        pixels[cell - 1 :: cell] *= 0.96
        pixels[:, cell - 1 :: cell] *= 0.96
    return pixels


def _write_names(page: Page, names: list[str], left: int, top: int, cell: int, size: float, is_upright: bool) -> None:
    bottom = top + cell * len(names)
    for index, name in enumerate(names):
        middle = (index + 0.5) * cell
        page.text(left - 10, top + middle, name, size, ha="right", va="center_baseline")
        page.text(left + middle, bottom + 10, name, size, ha="center", va="top", rotation=0 if is_upright else 90)
    if not any(names):
        for index in range(0, len(names), 100):
            page.text(left - 10, top + index * cell, str(index), SMALL, ha="right", va="top", color=MUTED)


def _numbers(page: Page, counts: np.ndarray, shares: np.ndarray, left: int, top: int, cell: int) -> None:
    size = min(SMALL, int(cell * 0.36))
    for row, column in zip(*np.nonzero(counts), strict=True):
        ink = PAPER if shares[row, column] > 0.3 else INK
        place = left + (column + 0.5) * cell, top + (row + 0.5) * cell
        page.text(*place, str(counts[row, column]), size, color=ink, ha="center", va="center_baseline")


def _bars(page: Page, evaluation: Evaluation, left: int, top: int, cell: int, width: int) -> None:
    page.text(left, top - 12, "Accuracy of the class", SMALL, color=MUTED)
    size = min(SMALL, cell - 2)
    for index, accuracy in enumerate(evaluation.class_accuracy):
        height = int(np.clip(cell - 1, 1, 26))
        y = top + index * cell + (cell - height) / 2
        page.rectangle(left, y, width, height, face="#f1f3f5")
        if accuracy is not None:
            page.rectangle(left, y, width * accuracy, height, face="#79b4e2")
        if size >= 8:
            text = "no images" if accuracy is None else f"{accuracy:.1%}"
            page.text(left + width + 6, y + height / 2, text, size, va="center_baseline", color=MUTED)


def _draw_scale(page: Page, left: int, y: int) -> None:
    ramp = np.repeat(SHADES(np.linspace(0, 1, 150))[None, :, :3], 12, 0)
    page.picture(left, y, ramp)
    for share in (0, 0.05, 0.3, 1):
        x = left + 150 * share**0.5
        page.rectangle(x, y + 13, 1, 4, face=RULE)
        align = {0: "left", 1: "right"}.get(share, "center")
        page.text(x, y + 30, f"{share:.0%}", SMALL, ha=align, color=MUTED)
    page.text(left, y + 50, "share of the true class", SMALL, color=MUTED)
