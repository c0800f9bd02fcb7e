"""The folder of a run: the names of its files, and the content of those that are no checkpoints."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vmoe.files import atomic_write
from vmoe.version import __version__

_WRITTEN_BY = "# vmoe "  # followed by the version: the first line of a run's config.yaml
_BLOCK, _LOAD = "moe/", "/load/"  # a column of metrics.csv is moe/BLOCK/load/EXPERT
# Options on paths and speed that do not change a run's result. (With Muon the layout does: it decides which matrices
# Muon trains.)
WITHOUT_EFFECT = (
    *("output_dir", "resume", "data.workers", "data.check", "trainer.log_every", "trainer.loggers"),
    *("trainer.device", "trainer.compile", "trainer.cuda_graph", "trainer.grad_checkpointing"),
    *("parallel.strategy", "parallel.expert_size", "parallel.dense", "parallel.async_save"),
)


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run's files."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def shared(self) -> Path:
        """The weights of a folder to share, which is no run's folder."""
        return self.path / "model.safetensors"

    @property
    def launch(self) -> Path:
        return self.path / "checkpoints" / ".launch"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @classmethod
    def around(cls, checkpoint: Path) -> "RunFolder | None":
        """The run's folder around a checkpoint file; None if it is not in one."""
        folder = cls(checkpoint.parent.parent)
        return folder if checkpoint.parent == folder.last.parent else None

    def read_config(self) -> Any:
        """The content of config.yaml.

        Raises:
            OSError, UnicodeDecodeError, yaml.YAMLError: It cannot be read.
        """
        return yaml.safe_load(self.config.read_text(encoding="utf-8"))

    def read_summary(self) -> dict[str, Any] | None:
        """The content of summary.json; None if it is missing or damaged."""
        try:
            content = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def read_metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv, one per epoch.

        Raises:
            OSError, UnicodeDecodeError, csv.Error: It cannot be read.
        """
        with open(self.metrics, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def metrics_of(summary: dict[str, Any] | None) -> dict[str, float]:
    """The metrics in summary.json, such as "test/top1", as fractions; {} if it has none."""
    metrics = (summary or {}).get("metrics")
    return metrics if isinstance(metrics, dict) else {}


def is_tested(summary: dict[str, Any] | None) -> bool:
    """Whether a run was tested after its training."""
    return not {"test/top1", "test/mAP"}.isdisjoint(metrics_of(summary))


def loads_in(row: dict[str, str]) -> dict[str, list[float]]:
    """Each expert's load relative to the fair share, by block, from a row of metrics.csv.

    Raises:
        ValueError, TypeError: A cell holds no number.
    """
    loads: dict[str, list[float]] = {}
    for column, value in row.items():
        block, is_load, _ = (column or "").partition(_LOAD)
        if is_load and block.startswith(_BLOCK) and value:
            loads.setdefault(block.removeprefix(_BLOCK), []).append(float(value))
    return loads


def config_text(config: dict[str, Any]) -> str:
    """The text of a run's config.yaml. Its first line has the version that wrote it."""
    return f"{_WRITTEN_BY}{__version__}\n{yaml.safe_dump(config, sort_keys=False)}"


def is_config_of_run(path: Path) -> bool:
    """Whether a run wrote this config.yaml into its folder, and not a user."""
    try:
        with open(path, encoding="utf-8") as file:
            is_ours = file.readline().startswith(_WRITTEN_BY)
    except (OSError, UnicodeDecodeError):
        return False
    folder = RunFolder(path.parent)
    # older versions did not write that line
    beside = (folder.last.parent, folder.metrics, folder.summary)
    return path == folder.config and (is_ours or any(each.exists() for each in beside))


def newer_version(path: str | Path) -> str | None:
    """The version that wrote a run's config.yaml, if it is newer than this one; else None."""
    try:
        first = Path(path).read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return None
    version = first.removeprefix(_WRITTEN_BY) if first.startswith(_WRITTEN_BY) else ""
    parts, ours = (re.findall(r"\d+", text)[:3] for text in (version, __version__))
    return version if list(map(int, parts)) > list(map(int, ours)) else None


def note_epochs(folder: RunFolder, epochs: int) -> None:
    """Updates the number of epochs in the config.yaml of a run that continues. The other lines stay."""
    text = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
    longer = re.sub(r"(^trainer:\n(?:[ #].*\n)*?  epochs: )\d+", rf"\g<1>{epochs}", text, flags=re.MULTILINE)
    if longer != text:
        with atomic_write(folder.config) as temporary:
            temporary.write_text(longer, encoding="utf-8")


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a config of nested dicts into one dict by dotted names."""
    flat = {}
    for key, value in plain.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
