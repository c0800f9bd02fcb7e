"""The rows of all jobs as tables: what is compared with what."""

import csv
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmoe.bench.report import Column
from vmoe.files import atomic_write

Row = dict[str, Any]
# Largest difference from one process that is no mistake, in weights and in losses. In float32 and less AdamW makes of a
# gradient that is zero but for rounding, such as that of a key's bias, a step of up to its rate (1e-3) either way.
BOUNDS = {"float64": (1e-9, 1e-9), "float32": (1e-5, 1e-5), "bfloat16": (6.1e-3, 1e-2)}
TABLES = {
    "equality": (
        Column("layout", "layout"),
        Column("processes", "processes"),
        Column("type", "dtype"),
        Column("weights", "weights", ".1e"),
        Column("beyond the bound", "weights_beyond", ".2%"),
        Column("losses", "loss", ".1e"),
        Column("gradients", "gradients", ".1e"),
        Column("routing", "routing", ".1e"),
        Column("bound", "bound", ".0e"),
        Column("within", "within"),
    ),
    "speed": (
        Column("layout", "layout"),
        Column("model", "model"),
        Column("E", "experts"),
        Column("batch", "batch"),
        Column("compiled", "compiled"),
        Column("graph", "graphed"),
        Column("processes", "processes"),
        Column("ms", "step_ms", "#.4g"),
        Column("spread", "spread", ".1%"),
        Column("img/s a process", "images_per_second_a_process", ",.0f"),
        Column("weak", "weak", ".1%"),
        Column("strong", "strong", ".1%"),
        Column("beside ddp", "beside_ddp", ".3f"),
        Column("MiB", "peak", ",.0f"),
        Column("exchange", "share_exchange", ".1%"),
        Column("tokens", "share_tokens", ".1%"),
        Column("weights", "share_weights", ".1%"),
        Column("gradients", "share_gradients", ".1%"),
        Column("hidden", "share_hidden", ".0%"),
        Column("idle", "share_idle", ".1%"),
        Column("ms predicted", "predicted_ms", "#.4g"),
        Column("ratio", "time_ratio", ".2f"),
        Column("MiB predicted", "predicted_mib", ",.0f"),
        Column("ratio", "memory_ratio", ".2f"),
        Column("waits", "waits"),
    ),
    "checkpoint": (
        Column("saved by, resumed by", "layout"),
        Column("processes", "processes"),
        Column("step", "step"),
        Column("weights", "weights", ".1e"),
        Column("losses", "loss", ".1e"),
        Column("gradients", "gradients", ".1e"),
        Column("bound", "bound", ".0e"),
        Column("within", "within"),
    ),
    "size": (
        Column("layout", "layout"),
        Column("processes", "processes"),
        Column("E", "experts"),
        Column("batch", "batch"),
        Column("blocks", "blocks"),
        Column("parameters", "parameters", ",.0f"),
        Column("MiB", "peak", ",.0f"),
        Column("ms", "step_ms", "#.4g"),
        Column("MiB predicted", "predicted_mib", ",.0f"),
        Column("ratio", "memory_ratio", ".2f"),
        Column("ms predicted", "predicted_ms", "#.4g"),
        Column("ratio", "time_ratio", ".2f"),
        Column("", "state"),
    ),
}


def finished(rows: list[Row], folder: Path, known: dict[str, Row]) -> list[Row]:
    """The rows of jobs that came to an end, with what compares them to others.

    Args:
        rows: As the workers wrote them.
        folder: Where the workers left weights.
        known: Gets what these told, by the keys of jobs, and is asked first.
    """
    ended = []
    for row in rows:
        is_told = row["state"] == "started" or (row["part"] == "size" and row["state"] == "done")
        same = [one for one in ended if one["key"] == row["key"] and one.get("pairs") == row.get("pairs")]
        if not is_told and not any(one["state"] == row["state"] for one in same):  # as another rank has said it
            ended.append(row)
    for row in ended:
        if row.get("pairs"):
            row["blocks"] = 2 * row["pairs"]
        if "peak_mib" in row:
            row["peak"] = max(row["peak_mib"])
        if row["state"] == "done" and row["part"] in ("equality", "checkpoint"):
            known[row["key"]] = known.get(row["key"]) or _differences(row, ended, folder)
            row |= known[row["key"]]
    speeds = [row for row in ended if row["part"] == "speed" and row["state"] == "done"]
    for row in speeds:
        row |= _scaling(row, speeds)
    return ended


def write_csv(path: Path, rows: list[Row]) -> None:
    """All rows under all the names that they have, atomically."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in row.items()})
    with atomic_write(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _differences(row: Row, rows: list[Row], folder: Path) -> Row:
    """How far a training's results are from those of one process."""
    alike = [
        other for other in rows
        if other["part"] == row["part"] and other["state"] == "done" and other["dtype"] == row["dtype"]
        and other["processes"] == 1 and other["step"] == "whole"
    ]  # fmt: skip
    paths = [folder / f"{one['key']}.pt" for one in (*alike[:1], row)]
    if not alike or alike[0] is row or not all(path.exists() for path in paths):
        return {}
    one, ours = (torch.load(path, weights_only=True) for path in paths)
    bound, loss_bound = BOUNDS[row["dtype"]]
    weights = {name: (ours["weights"][name] - value).abs() for name, value in one["weights"].items()}
    count = len(ours["losses"])
    loss = max(abs(a - b) for a, b in zip(ours["losses"], one["losses"][-count:], strict=True))
    worst = max(float(difference.max()) for difference in weights.values())
    beyond = sum(int((difference > bound).sum()) for difference in weights.values())
    return {
        "weights": worst,
        "weights_beyond": beyond / sum(difference.numel() for difference in weights.values()),
        "loss": loss,
        "gradients": _largest_relative(ours["moments"], one["moments"]),
        "routing": max(
            abs(load - other)
            for name, loads in one["routing"].items()
            for load, other in zip(loads, ours["routing"][name], strict=True)
        ),
        "bound": bound,
        "loss_bound": loss_bound,
        "within": worst <= bound and loss <= loss_bound,
    }  # fmt: skip


def _largest_relative(ours: dict[str, Tensor], one: dict[str, Tensor]) -> float:
    """The largest difference as a share of the largest value."""
    largest = max(float(value.abs().max()) for value in one.values())
    return max(float((ours[name] - value).abs().max()) for name, value in one.items()) / largest


def _scaling(row: Row, rows: list[Row]) -> Row:
    """Efficiency beside one process: as many images a process (weak), and as many in all (strong)."""

    def of(**wanted: Any) -> float | None:
        same = {name: row[name] for name in ("model", "experts", "compiled", "graphed")} | wanted
        found = [one for one in rows if all(one[key] == value for key, value in same.items())]
        return found[0]["images_per_second_a_process"] if found else None

    ours, result = row["images_per_second_a_process"], {}
    if row["processes"] > 1:
        weak = of(processes=1, layout="none", batch=row["batch"] // row["processes"])
        strong = of(processes=1, layout="none", batch=row["batch"])
        ddp = of(processes=row["processes"], layout="ddp", batch=row["batch"])
        pairs = {"weak": weak, "strong": strong, "beside_ddp": ddp}
        result = {name: ours / other for name, other in pairs.items() if other}
    return result
