"""Any trained model, in whatever form it was shared, as one that predicts."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from vmoe.checkpoints import TrainedModel, as_trained, load
from vmoe.errors import UserError
from vmoe.export.programs import METADATA, Run, load_program, require


class Program(nn.Module):
    """An exported program in the place of a model: it gives logits, but does not show its layers.

    Args:
        run: From normalised images (B, 3, image_size, image_size) on the CPU to logits (B, classes).
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.run(images)


def load_predictor(path: str | Path, device: torch.device) -> TrainedModel:
    """Opens what `vmoe.load` opens, or an ONNX file.

    Args:
        path: The file or folder.
        device: Where a model runs; ONNX files run on the CPU.

    Raises:
        UserError: there is no such file, or it is damaged or foreign.
    """
    return _load_onnx(Path(path)) if Path(path).suffix == ".onnx" else load(path, device)


def _load_onnx(path: Path) -> TrainedModel:
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
        version = int(told["version"])
        model = as_trained(
            Program(run).eval(),
            config={},
            class_names=[str(name) for name in told["class_names"]],
            image_size=int(told["image_size"]),
            mean=tuple(told["mean"]),
            std=tuple(told["std"]),
            epoch=0,
            step=0,
            path=path,
            bit_depth=told.get("bit_depth"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its metadata is damaged; write it anew by `vmoe export --format onnx`") from error
    if version > 1:
        raise UserError(f"{path}: written by a newer vmoe, in format {version}; this one knows 1: update it")
    return model
