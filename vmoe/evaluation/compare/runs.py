"""Reads the folders of runs and groups the seeds of one recipe into arms of a study."""

import csv
import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vmoe.checkpoints import WITHOUT_EFFECT, RunFolder, flatten
from vmoe.errors import UserError
from vmoe.evaluation.compare.labels import arm_labels, with_router_defaults

_NAMED_BY_ROOT = ("folder", "table", "huggingface", "npz", "webdataset")  # sets that are identified by their path
_PIPELINE = "data.augment.albumentations"  # this and the next count as one option, however long they are
_SUPER_CLASSES = "loss.super_classes"
_FOREIGN = (KeyError, TypeError, ValueError, OverflowError, AttributeError, yaml.YAMLError, csv.Error)


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    name: str
    config: dict[str, Any]
    score: float  # top-1, or mAP with several classes per image, on the test set, a fraction
    train_score: float | None  # on training images without augmentation; None if the summary lacks it
    total_parameters: int
    active_parameters: int
    flops: int  # per image
    images_per_second: float  # in training
    device: str
    seed: int
    curve: list[tuple[float, float]]  # (epoch, the score in validation)
    summary: dict[str, Any]  # the content of summary.json

    @property
    def metric(self) -> str:
        """The name of its score in the summary: "top1", or "mAP" with several classes per image."""
        return _metric_of(self.summary)

    @property
    def metric_title(self) -> str:
        """The name of its score for people."""
        return {"top1": "top-1"}.get(self.metric, self.metric)

    @property
    def test_loss(self) -> float | None:
        """Mean cross-entropy on the test set (binary with several classes per image); None if the summary lacks it."""
        return self.summary["metrics"].get("test/loss")

    @property
    def data(self) -> dict[str, Any]:
        """The options that decide its training and test images."""
        names = ["name", "image_size", "crop", "split_seed"]
        sections = ["subset"]
        if self._is_named_by_root:  # a table may have several columns of labels
            names.append("root")
            sections.append("table")
        given = self.config["data"]
        values = {key: given.get(key, "centre" if key == "crop" else None) for key in names}
        for name in sections:  # without nulls: runs from before an option existed have the same data as later ones
            values[name] = {key: value for key, value in (given.get(name) or {}).items() if value is not None}
        return values

    @property
    def recipe(self) -> dict[str, Any]:
        """Every value of its config that can change the result, by dotted name, without the seed.

        Null values are left out, so that runs from before an option existed have the same recipe as later ones.
        """
        others = ("seed", *WITHOUT_EFFECT, *([] if self._is_named_by_root else ["data.root"]))
        values = {
            key: value for key, value in flatten(self._resolved).items() if key not in others and value is not None
        }
        pipeline = (self.config["data"].get("augment") or {}).get("albumentations")
        super_classes = (self.config.get("loss") or {}).get("super_classes")
        for name, content in ((_PIPELINE, pipeline), (_SUPER_CLASSES, super_classes)):
            if content and not isinstance(content, str):
                values = {key: value for key, value in values.items() if not key.startswith(f"{name}.")}
                values[name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        if values.get("data.crop") == "centre":  # the only way before the option existed
            del values["data.crop"]
        if self.config["data"].get("name") != "fractals":  # then its settings have no effect
            values = {key: value for key, value in values.items() if not key.startswith("data.fractals.")}
        if values.get("distill.teacher") is None:  # then no other option of distillation has an effect
            values = {key: value for key, value in values.items() if not key.startswith("distill.")}
        return values

    @property
    def is_validated(self) -> bool:
        """Whether images were kept for validation."""
        return _is_validated(self.summary)

    @property
    def _is_named_by_root(self) -> bool:
        return self.config["data"].get("name") in _NAMED_BY_ROOT

    @property
    def moe(self) -> dict[str, Any] | None:
        """The config of its MoE layers; None for a dense model."""
        moe = self._resolved.get("moe")
        return None if not moe or moe.get("layers") == [] else moe

    @property
    def _resolved(self) -> dict[str, Any]:
        """Its config, with the router's defaults for nulls in `moe`."""
        moe = self.config.get("moe")
        return self.config if not moe else self.config | {"moe": with_router_defaults(moe)}

    @property
    def is_dense(self) -> bool:
        """Whether it has no MoE layers."""
        return self.moe is None

    def is_twin_of(self, other: "Run") -> bool:
        """Whether `other` is dense and has the same backbone and data, read with the same channels."""
        channels, others = (run.config["data"].get("channels") for run in (self, other))
        return other.is_dense and self._backbone == other._backbone and self.data == other.data and channels == others

    @property
    def _backbone(self) -> dict[str, Any]:
        return {key: value for key, value in self.config["model"].items() if key != "moe_drop_path"}


@dataclass(frozen=True)
class Arm:
    """Runs of one recipe with different seeds."""

    name: str  # a distinct name, such as "E=8 K=2 width 0.5"
    runs: list[Run]

    @property
    def first(self) -> Run:
        """One of its runs. All have the same config, and so the same parameters and FLOPs."""
        return self.runs[0]

    @property
    def n(self) -> int:
        """The number of runs."""
        return len(self.runs)

    def mean(self, field: str) -> float | None:
        """The mean of a figure over the runs; None if a run lacks it."""
        values = [getattr(run, field) for run in self.runs]
        return None if None in values else statistics.fmean(values)

    def sd(self, field: str) -> float | None:
        """The standard deviation of a figure over the runs (divided by n - 1); None for one run, or as `mean`."""
        values = [getattr(run, field) for run in self.runs]
        return None if None in values or self.n == 1 else statistics.stdev(values)

    def score_by_seed(self) -> dict[int, float]:
        """The score on the test set by seed, the mean over runs of one seed."""
        by_seed: dict[int, list[float]] = {}
        for run in self.runs:
            by_seed.setdefault(run.seed, []).append(run.score)
        return {seed: statistics.fmean(values) for seed, values in by_seed.items()}


def read_run(path: str | Path) -> Run:
    """Reads a run's config.yaml, summary.json and metrics.csv.

    Raises:
        UserError: A file is missing, unreadable, or not of a finished run.
    """
    folder = RunFolder(Path(path))
    if not folder.path.is_dir():
        raise UserError(f"{path}: no such run folder; give the output_dir of a finished run")
    for file in (folder.config, folder.summary, folder.metrics):
        if not file.is_file():
            raise UserError(f"{path}: holds no {file.name}; give the folder of a run that was trained to its end")
    try:
        config = folder.read_config()
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
        curve = _read_curve(folder, f"val/{_metric_of(summary)}") if _is_validated(summary) else []
        return _checked(folder.path.resolve().name, config, summary, curve)
    except UserError:
        raise
    except _FOREIGN as error:
        raise UserError(
            f"{path}: not the folder of a finished run of this package ({_first_words(error)}); train it again"
        ) from error


def read_comparison(path: str | Path) -> list[Run]:
    """The runs of an earlier comparison, from its comparison.json (see `as_plain`).

    Raises:
        UserError: The file is missing or no such file.
    """
    try:
        runs = json.loads(Path(path).read_text(encoding="utf-8"))["runs"]
        if not isinstance(runs, list) or not runs:
            raise ValueError("it has no runs")
        return [_checked(str(run["run"]), run["config"], run["summary"], _as_curve(run["curve"])) for run in runs]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except _FOREIGN as error:
        raise UserError(f"{path}: not the comparison.json of `vmoe compare` ({_first_words(error)})") from error


def as_plain(run: Run) -> dict[str, Any]:
    """The run's data for comparison.json, with which it can be compared again without its folder."""
    return {"run": run.name, "config": run.config, "summary": run.summary, "curve": run.curve}


def _checked(name: str, config: Any, summary: Any, curve: list[tuple[float, float]]) -> Run:
    metric = _metric_of(summary)
    clean = summary["metrics"].get(f"train_clean/{metric}")
    run = Run(
        name=name,
        config=dict(config),
        score=float(summary["metrics"][f"test/{metric}"]),
        train_score=None if clean is None else float(clean),
        total_parameters=int(summary["parameters"]["total"]),
        active_parameters=int(summary["parameters"]["active"]),
        flops=int(summary["flops_per_image"]),
        images_per_second=float(summary["images_per_second"]),
        device=str(summary["device"]),
        seed=int(summary["seed"]),
        curve=curve,
        summary=dict(summary),
    )
    for section in ("data", "model"):
        if not isinstance(run.config.get(section), dict):
            raise ValueError(f"its config has no {section}")
    if not math.isfinite(run.score) or min(run.flops, run.total_parameters, run.images_per_second) <= 0:
        raise ValueError("its summary holds impossible numbers")
    return run


def _as_curve(points: Any) -> list[tuple[float, float]]:
    return [(float(epoch), float(score)) for epoch, score in points]


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def group_runs(runs: Sequence[Run], by_folder: bool = False) -> list[Arm]:
    """Groups runs into arms: their configs differ only in seed and folder. Arms are in the order of appearance.

    Args:
        runs: The runs.
        by_folder: Whether to name arms by their folders, without the _sSEED of a sweep, instead of by their recipes.

    Raises:
        UserError: The folders of an arm have several names, or two arms have one name; or only some runs have several
            classes per image.
    """
    by_metric = {run.metric_title: run.name for run in runs}
    if len(by_metric) > 1:
        one, other = (f"{name} has {title}" for title, name in by_metric.items())
        raise UserError(f"RUN: {one} and {other}; compare runs of one class per image, or of several, alone")
    recipes: dict[str, list[Run]] = {}
    for run in runs:
        recipes.setdefault(json.dumps(run.recipe, sort_keys=True, default=str), []).append(run)
    if by_folder:
        names = _folder_names(list(recipes.values()))
    else:
        names = arm_labels([(members[0].recipe, members[0].moe) for members in recipes.values()])
    return [Arm(name, members) for name, members in zip(names, recipes.values(), strict=True)]


def _folder_names(arms: list[list[Run]]) -> list[str]:
    found: dict[str, list[Run]] = {}
    for members in arms:
        for name in dict.fromkeys(run.name.removesuffix(f"_s{run.seed}") for run in members):
            if found.setdefault(name, members) is not members:
                raise UserError(f"--by-folder: runs named {name} differ in more than their seed; leave the option out")
    if len(found) > len(arms):
        raise UserError(f"--by-folder: {' and '.join(found)} have the same recipe; leave the option out")
    return list(found)


def warnings_for(runs: Sequence[Run]) -> list[str]:
    """Warnings against comparing these runs, a line each."""
    lines = []
    devices = sorted({run.device for run in runs})
    if len(devices) > 1:
        lines.append(f"trained on different hardware ({'; '.join(devices)}): images/s cannot be compared")
    differing = {f"data.{key}" for run in runs for key, value in run.data.items() if value != runs[0].data.get(key)}
    if differing:
        names = sorted({f"{run.data['name']} at {run.data['image_size'] or 'its own'} px" for run in runs})
        named = f"{'; '.join(names)}; other {', '.join(sorted(differing))}"
        lines.append(f"trained on different data ({named}): neither accuracy nor images/s can be compared")
    for arm in group_runs(runs):
        if len({run.seed for run in arm.runs}) < arm.n:
            lines.append(f"{arm.name}: several runs of one seed, so its spread says little")
    return lines


def _read_curve(folder: RunFolder, column: str) -> list[tuple[float, float]]:
    return [(float(row["epoch"]), float(row[column])) for row in folder.read_metrics() if row[column]]


def _is_validated(summary: dict[str, Any]) -> bool:
    return f"val/{_metric_of(summary)}" in summary["metrics"]


def _metric_of(summary: dict[str, Any]) -> str:
    return "mAP" if "test/mAP" in summary["metrics"] else "top1"
