"""Any trained model, in whatever form it was shared, as one function from pictures to probabilities."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmoe.checkpoints import load_checkpoint
from vmoe.data.images import eval_crop, normalise
from vmoe.errors import UserError
from vmoe.export.programs import METADATA, load_program, require


@dataclass(frozen=True)
class Predictor:
    """A model and how its pictures are prepared.

    Attributes:
        logits: From normalised images (B, 3, image_size, image_size) on the CPU to logits (B, classes).
        class_names: In the order of the logits.
        image_size: In pixels.
        mean: Of the channels.
        std: Of the channels.
        model: The model in PyTorch; None for a program.
        bit_depth: Of the training files with more than 8 bits per channel (see `vmoe.data.load_image`); None where
            there were none.
    """

    logits: Callable[[Tensor], Tensor]
    class_names: list[str]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    model: nn.Module | None = None
    bit_depth: int | None = None

    @torch.no_grad()
    def probabilities(self, images: list[np.ndarray]) -> np.ndarray:
        """(B, classes) for B pictures (H, W, 3) uint8, each of its own size.

        Raises:
            UserError: a logit is not finite.
        """
        squares = [eval_crop(image, self.image_size) for image in images]
        logits = self.logits(normalise(squares, self.mean, self.std)).float().cpu()
        if not logits.isfinite().all():
            raise UserError("MODEL: gives logits that are not finite; its training probably diverged")
        return logits.softmax(-1).numpy()


def most_probable(probabilities: np.ndarray, names: list[str], count: int) -> list[dict[str, Any]]:
    """The `count` most probable classes of (classes,), best first, as plain types; of equal ones the earlier first."""
    order = (-probabilities).argsort(kind="stable")[:count]
    return [{"class": names[index], "probability": float(probabilities[index])} for index in order]


def load_predictor(path: str | Path, device: torch.device) -> Predictor:
    """Opens a checkpoint, a run's or shared folder, a safetensors or an ONNX file.

    Args:
        path: The file or folder.
        device: Where a model runs; ONNX files run on the CPU.

    Raises:
        UserError: there is no such file, or it is damaged or foreign.
    """
    if Path(path).suffix == ".onnx":
        return _load_onnx(Path(path))
    checkpoint = load_checkpoint(path, device)
    prepared = (checkpoint.class_names, checkpoint.image_size, checkpoint.mean, checkpoint.std)
    return Predictor(
        lambda images: checkpoint.model(images.to(device)), *prepared, checkpoint.model, checkpoint.bit_depth
    )


def _load_onnx(path: Path) -> Predictor:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    require("onnx")
    import onnx

    try:
        properties = onnx.load(path, load_external_data=False).metadata_props
        run = load_program(path, "onnx")
    except Exception as error:  # damaged files raise any type
        raise UserError(f"{path}: cannot be read as an ONNX model: damaged, or without its .data file") from error
    text = next((entry.value for entry in properties if entry.key == METADATA), None)
    if text is None:
        raise UserError(f"{path}: an ONNX model without our metadata; write it by `vmoe export --format onnx`")
    try:
        told = json.loads(text)
        version, names = int(told["version"]), [str(name) for name in told["class_names"]]
        prepared = int(told["image_size"]), tuple(told["mean"]), tuple(told["std"])
        predictor = Predictor(run, names, *prepared, bit_depth=told.get("bit_depth"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its metadata is damaged; write it anew by `vmoe export --format onnx`") from error
    if version > 1:
        raise UserError(f"{path}: written by a newer vmoe, in format {version}; this one knows 1: update it")
    return predictor
