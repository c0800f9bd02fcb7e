"""The history in a run's folder: the experts' loads in every epoch, and earlier checkpoints."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from vmoe.checkpoints import RunFolder, TrainedModel, load_checkpoint
from vmoe.checkpoints.run_folder import loads_in
from vmoe.errors import UserError
from vmoe.explain.explorer.subject import Subject
from vmoe.moe import MoeConfig


class Snapshot(NamedTuple):
    """The model after some epochs of its run."""

    epoch: int
    subject: Subject


def training_loads(checkpoint: Path) -> dict[str, Any] | None:
    """Each expert's load relative to the fair share after every epoch, from the run's metrics.csv; None without one.

    Raises:
        UserError: The file exists but has another form than training writes.
    """
    folder = RunFolder.around(checkpoint)
    if folder is None or not folder.metrics.is_file():
        return None
    try:
        rows = folder.read_metrics()
        steps, loads = [int(row["step"]) for row in rows], [loads_in(row) for row in rows]
        layers = {name: {"load": [each[name] for each in loads]} for name in (loads[0] if loads else ())}
        if any(len(row) != len(layer["load"][0]) for layer in layers.values() for row in layer["load"]):
            raise ValueError("it lacks the load of an expert")
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{folder.metrics}: is not a table that training wrote ({error}); move it away") from error
    return {"steps": steps, "layers": layers} if layers else None


def snapshots(checkpoint: Path, device: torch.device) -> list[Snapshot]:
    """The run's checkpoints by epoch, up to the given one, each epoch once; empty if the given one is the only one."""
    folder = RunFolder.around(checkpoint)
    if folder is None:
        return []
    found: dict[int, Snapshot] = {}
    last = load_checkpoint(checkpoint, device)
    for path in sorted(folder.last.parent.glob("*.ckpt")):
        each = load_checkpoint(path, device)
        is_same = each.class_names == last.class_names and _moe_of(each) == _moe_of(last)
        if is_same and each.epoch < last.epoch:
            found.setdefault(each.epoch, Snapshot(each.epoch, Subject.of(each, path.name)))
    if not found:
        return []
    return [*(found[epoch] for epoch in sorted(found)), Snapshot(last.epoch, Subject.of(last, checkpoint.name))]


def _moe_of(checkpoint: TrainedModel) -> MoeConfig | None:
    """The config of its MoE layers with the router's defaults, whether it was stored with them or not."""
    moe = checkpoint.config["moe"]
    return None if moe is None else MoeConfig(**moe).resolved()
