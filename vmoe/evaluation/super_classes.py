"""Super-classes from what a model confuses: classes that it takes for one another come together.

C classes; E super-classes.
"""

from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from vmoe.checkpoints import TrainedModel, require_single_label
from vmoe.checkpoints.trained import evaluating
from vmoe.data import DataConfig
from vmoe.errors import UserError
from vmoe.evaluation.evaluate import classes_differ, data_for, measure_split, open_data
from vmoe.extras import require_extras
from vmoe.progress import Progress
from vmoe.text import counted

_SMALLEST_SHARE = 0.01  # of a soft super-class, below which it is left out
_FLOOR = 0.01  # of the mean similarity: what any two classes have in common, so that no class stands alone


class FoundSuperClasses(NamedTuple):
    """Super-classes, and how much of the confusion they hold.

    Attributes:
        groups: The classes of each of the E super-classes, by its name.
        of_classes: The super-class of each class, or its shares in several, as `loss.super_classes` takes them.
        errors_within: Share of the model's errors within a super-class: the answer and the right class are both in it.
        pairs_within: Share of all pairs of classes that are in one super-class: the value by chance.
    """

    groups: dict[str, list[str]]
    of_classes: dict[str, str | dict[str, float]]
    errors_within: float
    pairs_within: float


def super_classes(
    model: TrainedModel,
    count: int,
    data: str | PathLike[str] | DataConfig | None = None,
    *,
    root: str | PathLike[str] | None = None,
    soft: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress = True,
) -> FoundSuperClasses:
    """Groups a model's classes by its confusions on the validation images, with spectral clustering.

        found = vmoe.super_classes(vmoe.load("runs/dense"), 10)
        vmoe.fit("image_routed.yaml", options={"loss.super_classes": found.of_classes, "moe.num_experts": 10})

    Args:
        model: Made by `vmoe.load`; dense, or any other.
        count: E, how many super-classes.
        data: As for `vmoe.evaluate`. None: the set that the model was trained on.
        root: Where the data are. None: where the model's run had them.
        soft: Whether a class is shared by the super-classes of the model's answers to its images, rather than belong to
            one.
        batch_size: Images per batch. None: as the run had it.
        workers: Processes that load images. None: as the run had it.
        progress: As for `vmoe.evaluate`.

    Raises:
        UserError: scikit-learn is not installed, there are no validation images or other classes, or there is
            nothing to group by.
    """
    require_extras("cluster")
    if not isinstance(model, TrainedModel):
        raise UserError(f"model: a {type(model).__name__} does not know its classes; vmoe.load opens one that does")
    names = model.class_names
    require_single_label(model, "super-classes")
    if len(names) < 3:
        raise UserError(f"{model.path}: knows {counted(len(names), 'class', 'classes')}; super-classes need 3 or more")
    if not (type(count) is int and 2 <= count < len(names)):
        raise UserError(f"count={count!r}: must be from 2 to {len(names) - 1}, fewer than the {len(names)} classes")
    opened, _ = open_data(model, data_for(model, data, root, eval_batch_size=batch_size, workers=workers))
    if list(opened.class_names) != names:
        raise UserError(f"{classes_differ(model, opened)}; super-classes need the same classes in the same order")
    if not opened.has_validation:
        raise UserError("data.val_fraction=0: there are no validation images, of which the confusions are counted")
    with evaluating(model):
        (measured,) = measure_split(model, opened, "val", None, None, model.device, progress)
    if measured.confusion is None:
        raise UserError(f"model: {len(names):,} classes are too many for a confusion matrix")
    return group_classes(np.array(measured.confusion), names, count, soft)


def group_classes(confusion: np.ndarray, names: list[str], count: int, soft: bool = False) -> FoundSuperClasses:
    """The super-classes of a confusion matrix.

    Two classes are as similar as the mean of the two shares of their images that are taken for the other class. The
    clusters are those of the normalised graph Laplacian (von Luxburg 2007, https://arxiv.org/abs/0711.0189).

    Args:
        confusion: (C, C) images by true class (row) and predicted one.
        names: (C,) of the classes.
        count: E.
        soft: As for `super_classes`.

    Raises:
        UserError: The model confuses nothing.
    """
    from sklearn.cluster import SpectralClustering  # here, since only this needs it

    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    similarity = (shares + shares.T) / 2
    np.fill_diagonal(similarity, 0)
    if not similarity.any():
        raise UserError("model: it confuses no two classes of the validation images, so there is nothing to group")
    similarity += _FLOOR * similarity.mean()
    labels = SpectralClustering(count, affinity="precomputed", random_state=0).fit_predict(similarity)
    order = list(dict.fromkeys(labels.tolist()))  # by the first of their classes
    member = np.array([order.index(label) for label in labels])  # (C,)
    digits = len(str(count - 1))
    of_index = [f"group-{index:0{digits}}" for index in range(count)]  # so that their order is that of the experts
    groups = {
        group: [names[place] for place in np.flatnonzero(member == index)] for index, group in enumerate(of_index)
    }
    of_classes: dict[str, Any] = {name: group for group, members in groups.items() for name in members}
    if soft:
        answers = shares @ (member[:, None] == np.arange(count))  # (C, E)
        own = np.arange(len(names)), member
        answers[own] = np.maximum(answers[own], _SMALLEST_SHARE)  # so that no super-class is lost
        rows = dict(zip(names, answers, strict=True))
        of_classes = {name: _kept_shares(rows[name], of_index) for name in of_classes}
    errors = confusion * ~np.eye(len(names), dtype=bool)
    is_within = member[:, None] == member
    pairs = (is_within.sum() - len(names)) / (len(names) * (len(names) - 1))
    return FoundSuperClasses(groups, of_classes, float((errors * is_within).sum() / errors.sum()), float(pairs))


def _kept_shares(answers: np.ndarray, groups: list[str]) -> dict[str, float]:
    """The shares of a class that are not small, scaled to sum to 1."""
    kept = np.where(answers >= _SMALLEST_SHARE, answers, 0)
    shares = zip(groups, kept / kept.sum(), strict=True)
    return {group: round(float(share), 4) for group, share in shares if share}
