"""The picture of precision over recall, one curve per class."""

import numpy as np

from vmoe.evaluation.curves import RECALLS
from vmoe.evaluation.metrics import Evaluation
from vmoe.figures.style import BODY, INK, MARGIN, MUTED, RULE, SMALL, Page, label, plain_axes
from vmoe.palette import expert_hex

_MOST_NAMED = 10  # number of classes with a colour and a name: the worst ones
_WIDTH, _HEIGHT, _LIST, _ROW = 620, 520, 330, 24


def draw_precision_recall(evaluation: Evaluation, class_names: list[str], data: str, model: str) -> Page:
    """Draws a curve per class and their mean in bold. Classes with the lowest average precision have colours and names.

    Args:
        evaluation: The evaluation, with its curves.
        class_names: The names of all classes.
        data: The name of the data, for the title.
        model: The name of the model, such as its path.
    """
    curves, averages = evaluation.class_precision_at_recall, evaluation.class_average_precision
    known = sorted(
        (index for index, curve in enumerate(curves) if curve is not None), key=lambda index: averages[index]
    )
    named = known[:_MOST_NAMED]
    page = Page(_WIDTH + _LIST + 3 * MARGIN, _HEIGHT + 4 * MARGIN + 60)
    figures = (
        f"average precision {evaluation.average_precision:.2%}, AUROC {evaluation.auroc:.2%} (means of the classes)"
    )
    page.heading(f"Precision and recall on the {data}", f"{evaluation.images:,} images · {figures}")
    page.text(MARGIN, MARGIN + 74, page.fit(model, BODY, page.width - 2 * MARGIN, keep="end"), color=MUTED)
    top = MARGIN + 110
    axes = plain_axes(page.axes(MARGIN + 50, top, _WIDTH - 50, _HEIGHT), SMALL)
    for index in known[_MOST_NAMED:]:
        axes.plot(RECALLS, curves[index], color=RULE, linewidth=0.8)
    for number, index in enumerate(named):
        axes.plot(RECALLS, curves[index], color=expert_hex(number), linewidth=1.4)
    axes.plot(RECALLS, np.mean([curves[index] for index in known], 0), color=INK, linewidth=2.6)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    label(axes, "recall: share of the class's images that are found", "precision: share of what is found that is right")
    left = MARGIN + _WIDTH + MARGIN
    title = "Average precision" if len(known) <= _MOST_NAMED else f"Average precision, the {_MOST_NAMED} lowest"
    page.text(left, top + 10, title, BODY, weight="bold")
    rows = [(INK, "mean of all classes", evaluation.average_precision)]
    rows += [(expert_hex(number), class_names[index], averages[index]) for number, index in enumerate(named)]
    for row, (colour, name, average) in enumerate(rows):
        y = top + 44 + _ROW * row
        page.rectangle(left, y - 8, 22, 4, face=colour)
        page.text(left + 32, y, page.fit(name, BODY, _LIST - 110), BODY)
        page.text(left + _LIST, y, f"{average:.1%}", BODY, ha="right")
    if len(known) > _MOST_NAMED:
        page.rectangle(left, top + 44 + _ROW * len(rows) - 8, 22, 4, face=RULE)
        page.text(left + 32, top + 44 + _ROW * len(rows), "the other classes", BODY, color=MUTED)
    return page
