"""`vmoe.fit`: one run from Python, the same as by `vmoe train`."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from vmoe.checkpoints import RunFolder, TrainedModel, load
from vmoe.config_values import from_plain, to_plain
from vmoe.data.config import EMBEDDED_SETS, DataConfig, set_and_root
from vmoe.errors import UserError
from vmoe.moe import MoeConfig
from vmoe.training.config import ModelConfig, OptimConfig, TrainConfig
from vmoe.training.config_files import read_config
from vmoe.training.options import LIGHTNING_NAMES, check_keys, with_our_names
from vmoe.training.parallel.process import Process
from vmoe.training.recipes import check_side_of_recipe, find_recipe, is_recipe
from vmoe.training.run.progress import TrainingProgress


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run, the result of `vmoe.fit`.

    Attributes:
        path: The run's folder.
        summary: The content of its summary.json; empty on all ranks except the first.
    """

    path: Path
    summary: dict[str, Any] = dataclasses.field(repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the best checkpoint, such as "val/top1" and "test/top1"; accuracies are fractions."""
        return self.summary.get("metrics", {})

    @property
    def history(self) -> list[dict[str, float]]:
        """The rows of metrics.csv, one per epoch."""
        return [{name: float(value) for name, value in row.items()} for row in RunFolder(self.path).read_metrics()]

    @cached_property
    def model(self) -> TrainedModel:
        """The trained model from the best checkpoint; see `vmoe.load`."""
        return load(self.path)


def fit(
    config: TrainConfig | str | PathLike[str] | None = None,
    *,
    data: DataConfig | str | PathLike[str] | None = None,
    model: ModelConfig | str | None = None,
    moe: MoeConfig | Literal[False] | None = None,
    epochs: int | None = None,
    output_dir: str | PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
    command: str | None = None,
) -> FinishedRun:
    """Trains a run, tests its best checkpoint, and writes the folder that `vmoe train` writes.

        run = vmoe.fit(data="photos/", model="vit_small_patch16_224", moe=vmoe.MoeConfig(), epochs=10)
        run = vmoe.fit("digits", options={"optim.lr": 1e-3, "moe.num_experts": 16})
        run.metrics["test/top1"], run.model.predict("photo.jpg")

    Args:
        config: The config to start from: a `TrainConfig`, the name of a recipe or the path of a config file. None
            starts from the defaults.
        data: A folder of class folders or of tar shards, a table (.csv, .tsv, .parquet), an .npz file, the name of a
            set, or a `DataConfig`. None takes the config's.
        model: timm's name of the model, or a `ModelConfig`. None takes the config's.
        moe: The MoE layers; False trains the dense twin. None takes the config's; without a config there are none.
        epochs: Epochs to train for. None takes the config's.
        output_dir: The run's folder. None takes the config's, else a new one in runs/.
        options: Any other options by their dotted names, as on the command line, such as {"resume": True} to go on with
            the run in `output_dir`. Lightning's names work too.
        progress: Whether to print progress, with a bar if stdout is a terminal.
        command: The command that summary.json records. None records a call of this function.

    Raises:
        UserError: An option is unknown or not allowed, the folder holds a run already, data or device are missing, or
            the loss became NaN.
        Interrupted: A signal stopped the run. Its training up to then is saved.
    """
    from vmoe.training.run.train import train  # here: a mistake in an option is reported before Lightning's slow import

    given = {"data": data, "model": model, "moe": moe, "epochs": epochs, "output_dir": output_dir}
    given = {name: value for name, value in given.items() if value is not None}
    if given or options or not isinstance(config, TrainConfig):
        config = _config(config, given, dict(options or {}))
    elif config.output_dir is None:
        config = dataclasses.replace(config, output_dir=_new_folder(config.data.title))
    process = Process.this()
    shown = TrainingProgress(quiet=not progress or not process.is_first)
    summary = train(config, shown, command or "vmoe.fit")
    return FinishedRun(Path(str(config.output_dir)), summary or {})


def config_with(config: str | PathLike[str], options: Mapping[str, Any]) -> TrainConfig:
    """Reads the config of a recipe's name or a config file's path, and sets options by their dotted names.

    Raises:
        UserError: An option is unknown, or its value is not allowed.
    """
    return _config(config, {}, dict(options))


def _config(
    start: TrainConfig | str | PathLike[str] | None, given: dict[str, Any], options: dict[str, Any]
) -> TrainConfig:
    """The config of a call of `fit`.

    Raises:
        UserError: An option is unknown, or its value is not allowed.
    """
    name, recipe, plain = "", None, {}
    if isinstance(start, TrainConfig):
        plain = to_plain(start)
    elif start is not None:
        path = find_recipe(str(start))
        name, recipe = Path(path).stem, path if is_recipe(path) else None
        plain = with_our_names(read_config(path), path)
        check_keys(plain, TrainConfig, path)
    plain = {key: dict(value) if isinstance(value, dict) else value for key, value in plain.items()}
    of_recipe = dict(plain.get("data") or {})
    _take_options(plain, options)
    check_keys(plain, TrainConfig, "options")
    if "data" in given:
        plain["data"] = (plain.get("data") or {}) | _data_options(given["data"], options.get("data.root"))
    if "model" in given:
        plain["model"] = _model_options(given["model"], plain.get("model") or {})
    if "moe" in given:
        of_moe = [key for key in options if key.startswith("moe.")]
        if given["moe"] is False and of_moe:
            raise UserError(
                f"options: {of_moe[0]} is for MoE layers, and moe=False asks for none; leave one of them out"
            )
        plain["moe"] = to_plain(given["moe"]) or None
    if "epochs" in given:
        for key in {"trainer.epochs", "trainer.max_epochs"} & options.keys():
            if options[key] != given["epochs"]:
                raise UserError(f"epochs={given['epochs']}: options ask for {key}={options[key]}; give one of them")
        _put(plain, "trainer.epochs", given["epochs"])
    if (plain.get("data") or {}).get("name") is None:
        raise UserError("data: is missing; give a folder, the name of a set such as 'digits', or a recipe's name")
    if start is None:
        _put(plain, "optim.warmup_epochs", _short_warmup(plain))
    if "output_dir" in given:
        plain["output_dir"] = str(given["output_dir"])
    config = from_plain(TrainConfig, plain)
    if config.data.name in EMBEDDED_SETS and config.data.root != DataConfig.root:
        raise UserError(
            f"data.root={config.data.root}: {config.data.name} comes with vmoe and reads no folder; leave it out"
        )
    is_said = "data.image_size" in options or "image_size" in (to_plain(options.get("data")) or {})
    if recipe is not None and not is_said and not isinstance(given.get("data"), DataConfig):
        check_side_of_recipe(config.data, recipe, of_recipe, f"data={config.data.name}")
    if config.output_dir is None:
        config = dataclasses.replace(config, output_dir=_new_folder(name or config.data.title))
    return config


def _take_options(plain: dict[str, Any], options: dict[str, Any]) -> None:
    """Sets options by their dotted names. A section is set before its own options, and keeps all others."""
    for dotted, value in sorted(options.items(), key=lambda each: each[0].count(".")):
        own, value = LIGHTNING_NAMES.get(dotted, dotted), to_plain(value)
        if own in options and options[own] != value:
            raise UserError(f"options: {dotted}={value} and {own}={options[own]} mean the same; give one of them")
        if isinstance(value, dict) and "." not in own:
            value = (plain.get(own) or {}) | with_our_names({own: value}, "options")[own]
        _put(plain, own, value)


def _put(plain: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets an option by its dotted name."""
    *sections, last = dotted.split(".")
    for section in sections:
        if not isinstance(plain.get(section), dict):
            plain[section] = {}
        plain = plain[section]
    plain[last] = value


def _data_options(data: DataConfig | str | PathLike[str], root: str | None) -> dict[str, Any]:
    """The options of a set that the `data` argument names. `data.root` may be given too, or be None."""
    if isinstance(data, DataConfig):
        return to_plain(data)
    name, own = set_and_root(data)
    if own is not None and root is not None:
        raise UserError(f"data={str(data)!r}: says where the images are, and so does data.root={root}; leave one out")
    return {"name": name, "root": str(own) if own is not None else root or DataConfig.root}


def _model_options(model: Any, known: dict[str, Any]) -> dict[str, Any]:
    if isinstance(model, ModelConfig):
        return to_plain(model)
    if not isinstance(model, str):
        raise UserError(
            f"model: must be timm's name of a model, not a {type(model).__name__}; a model of your own is trained by "
            "vmoe.Classifier(model) in a lightning.Trainer"
        )
    return {**known, "name": model}


def _short_warmup(plain: dict[str, Any]) -> float:
    """Sets the warm-up, if none was given, to a quarter of the epochs, at most the default."""
    optim, trainer = plain.get("optim") or {}, plain.get("trainer") or {}
    epochs = trainer.get("epochs", 20)
    usual = OptimConfig.warmup_epochs
    return optim.get("warmup_epochs", min(usual, epochs / 4) if isinstance(epochs, int) else usual)


def _new_folder(name: str) -> str:
    """The folder runs/NAME, or with a number appended if that is not empty."""
    path, number = Path("runs") / name, 2
    while path.exists():
        path, number = Path("runs") / f"{name}-{number}", number + 1
    return str(path)
