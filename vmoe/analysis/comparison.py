"""Runs beside each other: reads their folders, groups the seeds of one config, states differences and their compute."""

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vmoe.checkpoints import RunFolder
from vmoe.errors import UserError

EQUAL_COMPUTE = 0.05  # FLOPs an image that differ by no more than this count as equal
_NOT_OF_THE_RECIPE = ("seed", "output_dir", "resume", "data.workers", "trainer.log_every")


@dataclass(frozen=True)
class Run:
    """What a run's folder says of it."""

    name: str
    config: dict[str, Any]
    top1: float  # on the test set, a fraction
    total_parameters: int
    active_parameters: int
    flops: int  # an image
    images_per_second: float  # in training
    device: str
    seed: int
    curve: list[tuple[float, float]]  # (epoch, val/top1)

    @property
    def data(self) -> dict[str, Any]:
        """What decides which images it saw and was tested on."""
        return {key: self.config["data"].get(key) for key in ("name", "root", "image_size", "subset", "split_seed")}

    @property
    def recipe(self) -> dict[str, Any]:
        """Every value of its config that can change the result, by dotted name; without the seed."""
        return {key: value for key, value in _flat(self.config).items() if key not in _NOT_OF_THE_RECIPE}

    @property
    def is_dense(self) -> bool:
        """Whether it has no MoE layers."""
        moe = self.config.get("moe")
        return not moe or moe.get("layers") == []

    def is_twin_of(self, other: "Run") -> bool:
        """Whether `other` is dense and has the same backbone and data."""
        return other.is_dense and self.config["model"] == other.config["model"] and self.data == other.data


@dataclass(frozen=True)
class Group:
    """Runs of one config that differ in their seed only."""

    name: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        """A run of it; all have the same config, so the same parameters and FLOPs."""
        return self.runs[0]

    @property
    def n(self) -> int:
        """How many runs."""
        return len(self.runs)

    def mean(self, field: str) -> float:
        """The mean of a figure over the runs."""
        return statistics.fmean(getattr(run, field) for run in self.runs)

    def sd(self, field: str) -> float | None:
        """Its standard deviation over the runs (n - 1 below); None for one run."""
        return statistics.stdev(getattr(run, field) for run in self.runs) if self.n > 1 else None


def read_run(path: str | Path) -> Run:
    """Reads a run's config.yaml, summary.json and metrics.csv.

    Raises:
        UserError: a file is missing, unreadable, or not of a finished run.
    """
    folder = RunFolder(Path(path))
    if not folder.path.is_dir():
        raise UserError(f"{path}: no such run folder; give the output_dir of a finished run")
    for file in (folder.config, folder.summary, folder.metrics):
        if not file.is_file():
            raise UserError(f"{path}: holds no {file.name}; give the folder of a run that was trained to its end")
    try:
        config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
        run = Run(
            name=folder.path.resolve().name,
            config=dict(config),
            top1=float(summary["metrics"]["test/top1"]),
            total_parameters=int(summary["parameters"]["total"]),
            active_parameters=int(summary["parameters"]["active"]),
            flops=int(summary["flops_per_image"]),
            images_per_second=float(summary["images_per_second"]),
            device=str(summary["device"]),
            seed=int(summary["seed"]),
            curve=_read_curve(folder.metrics),
        )
        for section in ("data", "model"):
            if not isinstance(run.config.get(section), dict):
                raise ValueError(f"config.yaml has no {section}")
        if not math.isfinite(run.top1) or min(run.flops, run.total_parameters, run.images_per_second) <= 0:
            raise ValueError("summary.json holds impossible numbers")
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError, csv.Error) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: not the folder of a finished run of this package ({reason}); train it again"
        ) from error
    return run


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs whose configs differ only in seed and folder, in the order of their first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.recipe, sort_keys=True, default=str), []).append(run)
    return [Group(name, members) for name, members in zip(_names(groups.values()), groups.values(), strict=True)]


def warnings_for(runs: Sequence[Run]) -> list[str]:
    """What keeps these runs from being compared, a line each."""
    lines = []
    devices = sorted({run.device for run in runs})
    if len(devices) > 1:
        lines.append(f"trained on different hardware ({'; '.join(devices)}): images/s cannot be compared")
    if any(run.data != runs[0].data for run in runs):
        names = sorted({f"{run.data['name']} at {run.data['image_size'] or 'its own'} px" for run in runs})
        lines.append(f"trained on different data ({'; '.join(names)}): neither accuracy nor images/s can be compared")
    for group in group_runs(runs):
        if len({run.seed for run in group.runs}) < group.n:
            lines.append(f"{group.name}: several runs of one seed, so its spread says little")
    return lines


def differences(groups: Sequence[Group]) -> list[str]:
    """A sentence for each V-MoE beside each dense group of the same backbone and data; where there is no such pair, for
    each group beside the first. Each says whether compute is equal and how many runs stand behind it.
    """
    pairs = [
        (sparse, dense)
        for sparse in groups
        for dense in groups
        if not sparse.first.is_dense and sparse.first.is_twin_of(dense.first)
    ]
    return [_difference(group, base) for group, base in pairs or [(group, groups[0]) for group in groups[1:]]]


def _difference(group: Group, base: Group) -> str:
    points = 100 * (group.mean("top1") - base.mean("top1"))
    flops = group.first.flops / base.first.flops
    equal = abs(math.log(flops)) <= math.log1p(EQUAL_COMPUTE)
    parameters = group.first.total_parameters / base.first.total_parameters
    return (
        f"{group.name} against {base.name}: {points:+.2f} points of test top-1 at "
        f"{'equal' if equal else 'unequal'} compute "
        f"({flops:.2f}x the FLOPs an image, {parameters:.2f}x the parameters); {_evidence(group, base)}"
        f"{_other_differences(group.first.recipe, base.first.recipe)}"
    )


def _other_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """What else than the MoE layers the difference may come from; "" when nothing."""
    names = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
    names = [name for name in names if name != "moe" and not name.startswith("moe.")]
    return f"; not the MoE layers alone, they also differ in {', '.join(names)}" if names else ""


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in plain.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _evidence(group: Group, base: Group) -> str:
    if min(group.n, base.n) == 1:
        runs = "n=1 each" if group.n == base.n else f"n={group.n} and n={base.n}"
        return f"{runs}: one run says nothing of the spread between seeds, no significance is claimed"
    spread = [f"sd {100 * part.sd('top1'):.2f} (n={part.n})" for part in (group, base)]
    return f"spread over seeds: {spread[0]} against {spread[1]} points"


def table_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The comparison as one plain row a group; accuracies are fractions."""
    return [
        {
            "name": group.name,
            "kind": "dense" if group.first.is_dense else "V-MoE",
            "n": group.n,
            "seeds": " ".join(str(run.seed) for run in group.runs),
            "test_top1_mean": group.mean("top1"),
            "test_top1_sd": group.sd("top1"),
            "flops_per_image": group.first.flops,
            "active_parameters": group.first.active_parameters,
            "total_parameters": group.first.total_parameters,
            "train_images_per_second_mean": group.mean("images_per_second"),
            "data": group.first.data["name"],
            "device": "; ".join(sorted({run.device for run in group.runs})),
        }
        for group in groups
    ]


def _read_curve(path: Path) -> list[tuple[float, float]]:
    with open(path, newline="", encoding="utf-8") as file:
        return [(float(row["epoch"]), float(row["val/top1"])) for row in csv.DictReader(file) if row["val/top1"]]


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The folder's name of each group's first run, numbered where two groups would share it."""
    names: list[str] = []
    for runs in groups:
        name, count = runs[0].name, 1
        while name in names:
            count += 1
            name = f"{runs[0].name} ({count})"
        names.append(name)
    return names
