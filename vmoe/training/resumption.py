"""What a run that is resumed finds: its last checkpoint, if its config is still the same."""

import json
from typing import Any

from vmoe.checkpoints import ENTRY, RunFolder, read_without_tensors
from vmoe.errors import UserError
from vmoe.training.config import TrainConfig, from_plain, to_plain

# What may differ when a run is resumed: where things are and how fast they go, but nothing that changes the result.
FREE_ON_RESUME = (
    "output_dir",
    "resume",
    "data.root",
    "data.workers",
    "trainer.device",
    "trainer.compile",
    "trainer.cuda_graph",
    "trainer.log_every",
    "parallel.strategy",
    "parallel.expert_size",
)


def saved_state(folder: RunFolder, config: TrainConfig) -> dict[str, Any] | None:
    """The last checkpoint of a run to resume; None to start from the beginning.

    Raises:
        UserError: there is a run and no --resume, or the run to resume had another config.
    """
    if not config.resume:
        if folder.config.exists() or folder.last.exists() or folder.metrics.exists():
            raise UserError(
                f"--output_dir {folder.path}: holds a run already; give another folder, or --resume to go on with it"
            )
        return None
    if not folder.last.exists():
        if folder.summary.exists():
            raise UserError(
                f"--resume: the finished run in {folder.path} has lost its last.ckpt; give another --output_dir"
            )
        return None
    saved = read_without_tensors(folder.last)
    before = _flat(to_plain(from_plain(TrainConfig, saved[ENTRY]["config"])))
    now = _flat(to_plain(config))
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key) and key not in FREE_ON_RESUME]
    if changed:
        told = ", ".join(f"{key} (was {before.get(key)!r}, now {now.get(key)!r})" for key in changed)
        raise UserError(
            f"--resume: the run in {folder.path} had another config: {told}; keep it, or start a run in another folder"
        )
    return saved


def read_summary(folder: RunFolder) -> dict[str, Any] | None:
    """The content of summary.json; None where it is missing or damaged."""
    try:
        return json.loads(folder.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in plain.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
