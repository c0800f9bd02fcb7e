"""The confusion picture shows the numbers, also of many classes."""

import numpy as np
import pytest
from matplotlib.text import Text

from vmoe.evaluation.confusion import draw_confusion
from vmoe.evaluation.metrics import Evaluation
from vmoe.figures.style import SHADES


def make_evaluation(confusion):
    confusion = np.array(confusion)
    totals = confusion.sum(1)
    accuracy = [float(hit / total) if total else None for hit, total in zip(np.diag(confusion), totals, strict=True)]
    top1 = float(np.trace(confusion) / confusion.sum())
    of_classes = {"class_accuracy": accuracy, "class_precision": accuracy, "class_f1": accuracy}
    return Evaluation(
        images=int(confusion.sum()),
        capacity_factor=None,
        top_k=None,
        top1=top1,
        top5=1.0,
        nll=0.1,
        ece=0.0,
        brier=0.0,
        **of_classes,
        balanced_accuracy=top1,
        f1=top1,
        confusion=confusion.tolist(),
        images_per_second=None,
        dropped=None,
        layers={},
    )


def texts(page):
    return {text.get_text(): text for text in page.figure.findobj(Text) if text.get_text()}


@pytest.mark.parametrize("num_classes", [25, 300])
def test_each_cell_has_the_shade_of_its_share(num_classes):
    confusion = np.eye(num_classes, dtype=int) * 8
    confusion[3, 7] = 2
    names = [f"class {index}" for index in range(num_classes)]
    page = draw_confusion(make_evaluation(confusion), names, "test set", "runs/a")
    cells = page.figure.images[0].get_array()
    cell = len(cells) / num_classes

    def shade(row, column):
        return cells[int((row + 0.5) * cell), int((column + 0.5) * cell)].tolist()

    for (row, column), share in {(0, 0): 1.0, (3, 3): 0.8, (3, 7): 0.2, (7, 3): 0.0}.items():
        assert shade(row, column) == pytest.approx(255 * np.array(SHADES(share**0.5)[:3]), abs=1.5)


def test_names_stay_readable_with_a_hundred_classes():
    names = [f"class {index}" for index in range(100)]
    page = draw_confusion(make_evaluation(np.eye(100, dtype=int)), names, "test set", "runs/a")
    shown = [texts(page)[name] for name in names]
    assert min(text.get_fontsize() * page.figure.dpi / 72 for text in shown) >= 11  # pixels
    assert len([text for text in page.figure.findobj(Text) if text.get_text() in names]) == 200


def test_few_classes_show_their_counts_and_accuracies():
    names = ["cat", "a name too long to be shown in full"]
    page = draw_confusion(make_evaluation([[41, 2], [7, 43]]), names, "test set", "runs/a")
    shown = texts(page)
    assert {"41", "2", "7", "43", "95.3%", "86.0%"} <= set(shown)
    assert "a name too long to be…" in shown


@pytest.mark.parametrize("num_classes", [2, 100])
def test_the_page_says_of_which_model_it_is_and_holds_its_texts(num_classes):
    names = [f"class {index}" for index in range(num_classes)]
    model = "/home/somebody/" + "a folder of many/" * 40 + "runs/mine/checkpoints/best.ckpt"
    page = draw_confusion(make_evaluation(np.eye(num_classes, dtype=int)), names, "test set of digits", model)
    shown = texts(page)
    assert "Confusion on the test set of digits" in shown
    assert any(text.startswith("…") and text.endswith("/runs/mine/checkpoints/best.ckpt") for text in shown)
    boxes = [text.get_window_extent(page.canvas.get_renderer()) for text in shown.values()]
    assert all(box.x0 >= 0 and box.x1 <= page.width and box.y0 >= 0 for box in boxes)


def test_a_class_without_images_is_said():
    assert "no images" in texts(draw_confusion(make_evaluation([[3, 0], [0, 0]]), ["a", "b"], "test set", "runs/a"))
