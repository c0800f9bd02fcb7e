"""Opens a trained model in any shared form for prediction."""

from pathlib import Path

import torch
from torch import Tensor, nn

from vmoe.checkpoints import TrainedModel, as_trained, load
from vmoe.checkpoints.program import METADATA, facts_of_program
from vmoe.errors import UserError
from vmoe.export.programs import ProgramCall, load_program, require


class Program(nn.Module):
    """An exported program with the interface of a model. It gives logits, but has no layers.

    Args:
        run: Maps normalised images (B, 3, height, width) on the CPU to logits (B, classes).
    """

    def __init__(self, run: ProgramCall) -> None:
        super().__init__()
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.run(images)


def load_predictor(path: str | Path, device: torch.device) -> TrainedModel:
    """Opens what `vmoe.load` opens, or an ONNX file.

    Args:
        path: The file or folder.
        device: The device of a model. ONNX files run on the CPU.

    Raises:
        UserError: There is no such file, or it is damaged or foreign.
    """
    suffix = Path(path).suffix
    if suffix == ".pt2":
        raise UserError(
            f"{path}: to open such a program may run code that it holds, so no job does; give an ONNX file, or the "
            "checkpoint that it was made from"
        )
    return _load_onnx(Path(path)) if suffix == ".onnx" else load(path, device)


def _load_onnx(path: Path) -> TrainedModel:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    require("onnx")
    import onnx

    try:
        properties = onnx.load(path, load_external_data=False).metadata_props
        run = load_program(path, "onnx")
    except Exception as error:  # damaged files may raise any type
        raise UserError(f"{path}: cannot be read as an ONNX model: damaged, or without its .data file") from error
    text = next((entry.value for entry in properties if entry.key == METADATA), None)
    if text is None:
        raise UserError(f"{path}: an ONNX model without our metadata; write it by `vmoe export --format onnx`")
    return as_trained(Program(run).eval(), facts_of_program(text, path), epoch=0, step=0, path=path)
