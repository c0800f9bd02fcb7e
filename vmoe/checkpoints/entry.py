"""This package's entry in a checkpoint, and its check: a file may be hand-made, damaged, or of another version."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmoe.checkpoints.calibration import is_calibration
from vmoe.errors import UserError
from vmoe.sizes import ImageSize, as_size

if TYPE_CHECKING:
    from vmoe.models.imported import ImportedModel

ENTRY = "vmoe"  # the key of this package's entry
MODEL_PREFIX = "model."  # the prefix of weights in a .ckpt file, where the LightningModule holds the model
# Raised when older versions of this package cannot use what a newer one writes. New entries alone do not raise it.
FORMAT_VERSION = 2
# For files without the news of version 2: images that are not square, not cropped at the centre or read with other
# channels, several classes
PLAIN_VERSION = 1
_LARGEST_IMAGE = 4096  # as in DataConfig
_WEIGHTS_ALONE = (
    "holds weights, but not what model they are of; fill the model by vmoe.Classifier.load_from_checkpoint(path, "
    "model=...) or load_state_dict, then vmoe.save(model, ...) writes what every tool opens"
)


@dataclass(frozen=True)
class ModelFacts:
    """What every tool must know about a model besides its weights, in plain types. Every file of a model holds it."""

    config: dict[str, Any]  # the run's whole config: seed, output_dir, data, model, moe, optim, trainer
    class_names: Sequence[str]  # in the order of the logits
    image_size: ImageSize  # side of the square images, or (height, width), pixels
    mean: Sequence[float]  # per channel, for pixels in [0, 1]
    std: Sequence[float]
    bit_depth: int | None = None  # of training files with more than 8 bits per channel; None without such files
    # timm's name and kwargs of the model, if config.model names a folder or hub entry, which may be gone
    architecture: dict[str, Any] | None = None
    crop: str = "centre"  # how images of another shape are fitted to the image size, as in `DataConfig`
    multi_label: bool = False  # whether an image may have several classes: then each logit has its own sigmoid
    thresholds: Sequence[float] | None = None  # with `multi_label`: the least probability per class
    calibration: dict[str, Any] | None = None  # by `vmoe.calibrate`; see `vmoe.checkpoints.calibration`
    channels: int | None = None  # as which pictures are read, as in `DataConfig`; None: RGB of 8 bits

    @property
    def is_plain(self) -> bool:
        """Whether versions of this package that only know square, centred RGB images of one class can use the model."""
        is_centred = self.crop == "centre" and isinstance(self.image_size, int)
        return is_centred and not self.multi_label and self.channels is None

    def by_architecture(self) -> "ModelFacts":
        """A copy with timm's own name and arguments in `config.model`, so that the model can be built anywhere."""
        built = self.config["model"] | (self.architecture or {})
        return replace(self, config=self.config | {"model": built}, architecture=None)


def entry_for(facts: ModelFacts, epochs_done: int = 0, step: int | None = None) -> dict[str, Any]:
    """This package's entry for a new checkpoint.

    Args:
        facts: The model's facts.
        epochs_done: Number of trained epochs.
        step: Number of updates, for a file in which Lightning does not write it.
    """
    version = PLAIN_VERSION if facts.is_plain else FORMAT_VERSION
    entry = {"version": version, **vars(facts), "epochs_done": epochs_done}
    for name in ("architecture", "multi_label", "thresholds", "channels"):
        if not entry[name]:
            del entry[name]
    if facts.crop == "centre":
        del entry["crop"]
    if facts.calibration is None:
        del entry["calibration"]
    if not isinstance(facts.image_size, int):
        entry["image_size"] = list(facts.image_size)
    lists = {name: list(entry[name]) for name in ("class_names", "mean", "std")}
    return entry | lists | ({} if step is None else {"step": step})


def facts_of(content: dict[str, Any]) -> ModelFacts:
    """The model's facts in a checkpoint that passed `check_entry`."""
    ours = content[ENTRY]
    return ModelFacts(
        config=ours["config"],
        class_names=[str(name) for name in ours["class_names"]],
        image_size=ours["image_size"] if isinstance(ours["image_size"], int) else as_size(*ours["image_size"]),
        mean=tuple(ours["mean"]),
        std=tuple(ours["std"]),
        bit_depth=ours.get("bit_depth"),
        architecture=ours.get("architecture"),
        crop=ours.get("crop", "centre"),
        multi_label=ours.get("multi_label", False),
        thresholds=ours.get("thresholds"),
        calibration=ours.get("calibration"),
        channels=ours.get("channels"),
    )


def facts_of_import(
    imported: "ImportedModel", class_names: Sequence[str], data: str | None, crop: str = "centre"
) -> ModelFacts:
    """The facts for a file of a model that others trained.

    Args:
        imported: The model, for square images.
        class_names: In the order of the logits.
        data: The name of its training set, if it is one of this package's.
        crop: As in `ModelFacts`.
    """
    size, mean, std = imported.image_size[0], list(imported.mean), list(imported.std)
    # Of red, green and blue, in_chans goes without saying, and a run's model.kwargs must not say it
    kwargs = {key: value for key, value in imported.kwargs.items() if (key, value) != ("in_chans", 3)}
    config = {
        "seed": 0,
        "output_dir": None,
        "resume": False,
        **({} if data is None else {"data": {"name": data, "image_size": size, "mean": mean, "std": std}}),
        "model": {"name": imported.name, "kwargs": kwargs},
        "moe": None if imported.moe is None else asdict(imported.moe),
        "optim": {},
        "trainer": {},
    }
    return ModelFacts(config, class_names, size, mean, std, crop=crop)


def checked(content: Any, path: Path) -> dict[str, Any]:
    """Returns a checkpoint's content after checking that it is this package's and of a supported version.

    Raises:
        UserError: It is not.
    """
    ours = content.get(ENTRY) if isinstance(content, dict) else None
    version = ours.get("version") if isinstance(ours, dict) else None
    if ours is None and _are_weights_alone(content):
        raise UserError(f"{path}: {_WEIGHTS_ALONE}")
    if type(version) is not int or version < 1:
        raise UserError(f"{path}: not a checkpoint of this package; `vmoe train` writes them")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path}: written by a newer vmoe, in format {version}; this one knows {FORMAT_VERSION}: update it"
        )
    return content


def _are_weights_alone(content: Any) -> bool:
    """Whether the content is a state dict, or holds one, as other trainers write it."""
    if not isinstance(content, dict):
        return False
    held = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    return len(held) > 0 and all(hasattr(value, "is_floating_point") for value in held.values())  # tensors


def check_entry(content: dict[str, Any], path: Path) -> None:
    """Checks that a checkpoint, already `checked`, holds all facts that tools need, in the right types.

    Raises:
        UserError: It does not.
    """
    if "config" not in content[ENTRY] and "pytorch-lightning_version" in content:
        raise UserError(f"{path}: {_WEIGHTS_ALONE}")
    reason = _fault(content, content[ENTRY])
    if reason is not None:
        raise UserError(f"{path}: its weights and its config do not make a model ({reason}); train it again")


def _fault(content: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first entry that is missing or wrong, or None."""
    config = ours.get("config")
    if not isinstance(config, dict):
        return "config must be a dict"
    model = config.get("model")
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("name"), str)
        or not isinstance(model.get("kwargs"), dict)
    ):
        return "config.model must hold a name and kwargs"
    built = ours.get("architecture", {})
    if not isinstance(built, dict) or not isinstance(built.get("name", ""), str):
        return "architecture must be a dict with a name"
    if not isinstance(built.get("kwargs", {}), dict):
        return "architecture.kwargs must be a dict"
    names, size, channels = ours.get("class_names"), ours.get("image_size"), ours.get("channels")
    count = channels if type(channels) is int and channels != 3 else 3
    numbers = "three" if count == 3 else count
    facts = {
        "config.moe must be a dict or None": isinstance(config.get("moe"), dict | type(None)),
        "config.data must be a dict": isinstance(config.get("data", {}), dict),
        "config.seed must be from 0 to 4294967295": _is_count(config.get("seed", 0), 2**32 - 1),
        "class_names must be a list of names": isinstance(names, list | tuple) and len(names) > 0,
        f"image_size must be from 1 to {_LARGEST_IMAGE}": _is_size(size),
        "crop must be centre, squash or letterbox": ours.get("crop", "centre") in ("centre", "squash", "letterbox"),
        "channels must be from 1 to 512 or None": channels is None or (_is_count(channels, 512) and channels > 0),
        f"mean must be {numbers} numbers": _are_numbers(ours.get("mean"), count),
        f"std must be {numbers} numbers above 0": _are_numbers(ours.get("std"), count) and min(ours["std"]) > 0,
        "multi_label must be true or false": isinstance(ours.get("multi_label", False), bool),
        "thresholds must be a number for each class or None": _are_thresholds(ours.get("thresholds"), names),
        "bit_depth must be from 1 to 32 or None": _is_depth(ours.get("bit_depth")),
        "calibration must be what vmoe.calibrate gives": is_calibration(ours.get("calibration")),
        "epochs_done must be a whole number": _is_count(ours.get("epochs_done")),
        "state_dict must hold the weights": isinstance(content.get("state_dict", {}), dict),
        "global_step must be a whole number": _is_count(content.get("global_step")),
    }
    return next((rule for rule, holds in facts.items() if not holds), None)


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    return all(_is_count(side, _LARGEST_IMAGE) and side > 0 for side in sides)


def _are_thresholds(values: Any, names: Any) -> bool:
    is_right = isinstance(values, list | tuple) and isinstance(names, list | tuple) and len(values) == len(names)
    return values is None or (is_right and all(type(value) in (int, float) and 0 <= value <= 1 for value in values))


def _is_count(value: Any, most: float = math.inf) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_depth(value: Any) -> bool:
    return value is None or (_is_count(value, 32) and value > 0)


def _are_numbers(values: Any, count: int) -> bool:
    is_sequence = isinstance(values, list | tuple) and len(values) == count
    return is_sequence and all(type(value) in (int, float) and math.isfinite(value) for value in values)
