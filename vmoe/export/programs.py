"""Exports a trained model as a program that runs without this project: ONNX, torch.export or AOTInductor.

A program maps normalised images (B, 3, height, width) float32, with any B >= 1, to logits (B, classes). Programs of
models for another number of channels take that number in place of 3.
"""

import importlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vmoe.checkpoints import load_checkpoint, require_rounding
from vmoe.checkpoints.program import METADATA, program_metadata
from vmoe.errors import UserError
from vmoe.export.int8 import Int8Linear
from vmoe.export.layer import DenseExportedMoe, ExportedMoe, dense_cost, exportable_copy
from vmoe.extras import require_extras
from vmoe.files import folder_for, replace, writing
from vmoe.models.families import own_channels
from vmoe.moe import moe_layers
from vmoe.sizes import ImageSize, height_and_width
from vmoe.version import __version__

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}
BATCHES = (1, 3, 8, 33)
TOLERANCE = 1e-4
OPSET = 20  # the first opset with Gelu
LARGEST_PROTOBUF = 2**31 - 2**20  # a protobuf file must be below 2 GiB; larger weights go into a second file
ProgramCall = Callable[[Tensor], Tensor]


def write_program(
    path: str | Path, source: str | Path, format: str, int8: bool = False, dense: bool = False
) -> dict[str, Any]:
    """Writes a checkpoint as a program if its logits match the model's; else it writes nothing.

    Args:
        path: The new file.
        source: A checkpoint file or a run's folder.
        format: A key of `SUFFIXES`.
        int8: Whether to round the experts' weights to int8 (`vmoe.moe.int8`).
        dense: Whether to compute each expert for all tokens, for compilers that need fixed shapes except the batch.

    Returns:
        The content of export.json: sizes, versions, and by batch size the largest difference of logits from the
        (rounded) model's, relative to the largest logit if that is above 1.

    Raises:
        UserError: The checkpoint cannot be read, its model cannot be exported, `int8` is given for a dense model, a
            package or the compiler is missing, the logits differ by more than `TOLERANCE`, or `path` cannot be written.
    """
    require(format)
    with _folder_beside(Path(path)) as folder:
        checkpoint = load_checkpoint(source)
        has_experts = bool(moe_layers(checkpoint.model))
        if int8:
            require_rounding(source, has_experts)
        if dense and not has_experts:
            raise UserError(f"--experts dense: {source}: a dense model has no experts; leave the option out")
        layer_type = DenseExportedMoe if dense else ExportedMoe
        try:
            model = exportable_copy(checkpoint.model, Int8Linear if int8 else None, layer_type)
        except ValueError as error:
            raise UserError(f"{source}: cannot be exported: {error}") from error
        file = folder / Path(path).name
        notes, run = convert(
            file, format, model, checkpoint.image_size, program_metadata(checkpoint.facts), str(source)
        )
        differences = compare(run, model if int8 else checkpoint.model, checkpoint.image_size)
        worst = max(differences.values())
        if not worst <= TOLERANCE:  # NaN included
            raise UserError(f"{source}: logits of the {format} program differ by {worst:.2g}; nothing is written")
        sizes = {part.name: part.stat().st_size for part in folder.iterdir()}
        for part in sorted(folder.iterdir(), key=lambda part: part == file):  # the program last
            replace(part, Path(path).with_name(part.name))
    report = {"format": format, "quantize": "int8" if int8 else None, "bytes": sizes, **notes}
    if dense:
        report["experts"] = {"computed": "dense", "times_the_flops_of_those_chosen": dense_cost(checkpoint.model)}
    report["parity"] = {"tolerance": TOLERANCE, "by_batch": differences}
    if int8:
        report["int8"] = rounding_error(checkpoint.model, model, checkpoint.image_size)
    return report | {"versions": {"vmoe": __version__, "torch": torch.__version__, **_versions(format)}}


def convert(
    file: Path, format: str, model: nn.Module, image_size: ImageSize, metadata: dict[str, Any], name: str
) -> tuple[dict[str, Any], ProgramCall]:
    """Writes an `exportable_copy` as a program.

    Args:
        file: The new file.
        format: A key of `SUFFIXES`.
        model: The copy.
        image_size: The side in pixels, or (height, width).
        metadata: The metadata, from `program_metadata`.
        name: The start of error messages.

    Returns:
        Notes on the program for export.json, and the program as it is read back.

    Raises:
        UserError: The model cannot be traced or converted.
    """
    program = trace(model, image_size, name)
    try:
        with quiet():
            return _WRITERS[format](file, program, metadata), load_program(file, format)
    except OSError:
        raise
    except Exception as error:  # exporters raise many types
        if format == "onnx" and make_attention_plain(model):
            return convert(file, format, model, image_size, metadata, name)
        reason = f"{type(model).__name__} cannot be exported as {format}: {reason_of(error)}"
        raise UserError(f"{name}: {reason}") from error


def make_attention_plain(model: nn.Module) -> bool:
    """Turns off fused attention in timm's modules, since ONNX supports it only on four axes. Returns if any had it."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    return bool(fused)


def require(format: str) -> None:
    """Checks that the packages and the compiler of a format are installed.

    Raises:
        UserError: One is missing. The message has the command that installs it.
    """
    if format == "onnx":
        require_extras("export")
    compiler = os.environ.get("CXX", "g++")
    if format == "aoti" and shutil.which(compiler) is None:
        raise UserError(f"--format aoti: needs the C++ compiler {compiler}, which is not here; install it, or set CXX")


def trace(model: nn.Module, image_size: ImageSize, name: str) -> ExportedProgram:
    """Traces an `exportable_copy` for any batch size.

    Raises:
        UserError: torch.export cannot trace the model. The message starts with `name`.
    """
    images = torch.zeros(2, own_channels(model), *height_and_width(image_size))
    try:
        with quiet():
            return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    except Exception as error:  # the tracer raises many types
        raise UserError(f"{name}: {type(model).__name__} cannot be exported: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """The first line of an error's original cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:200] for line in lines if line), type(error).__name__)


def load_program(path: str | Path, format: str) -> ProgramCall:
    """A function from images to logits, both on the CPU, that runs a written program."""
    if format == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    if format == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    return torch.export.load(str(path)).module()


@torch.no_grad()
def compare(run: ProgramCall, model: nn.Module, image_size: ImageSize) -> dict[int, float]:
    """The largest difference between a program's and a model's logits on random images, for each of `BATCHES`."""
    differences = {}
    for batch in BATCHES:
        images = _noise(model, batch, image_size)
        expected = model(images)
        differences[batch] = float((run(images) - expected).abs().max() / expected.abs().max().clamp_min(1))
    return differences


@torch.no_grad()
def rounding_error(model: nn.Module, rounded: nn.Module, image_size: ImageSize, count: int = 64) -> dict[str, float]:
    """The effect of rounding on `count` random images: |difference| / |logits| (2-norms), share of changed classes."""
    images = _noise(model, count, image_size)
    before, after = model(images), rounded(images)
    changed = (before.argmax(-1) != after.argmax(-1)).double().mean()
    return {"relative_logit_error": float((after - before).norm() / before.norm()), "top1_changed": float(changed)}


def _noise(model: nn.Module, batch: int, image_size: ImageSize) -> Tensor:
    shape = batch, own_channels(model), *height_and_width(image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch))


def write_onnx(
    file: Path,
    program: ExportedProgram,
    metadata: dict[str, Any],
    inputs: Sequence[str] = ("images",),
    outputs: Sequence[str] = ("logits",),
) -> dict[str, Any]:
    """Writes a traced program as ONNX with metadata and names of inputs and outputs. Returns the opset."""
    names = {"input_names": inputs, "output_names": outputs}
    with quiet():
        exported = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False, **names)
    exported.model.metadata_props[METADATA] = json.dumps(metadata)
    weights = sum(value.const_value.nbytes for value in exported.model.graph.initializers.values())
    exported.save(file, external_data=weights > LARGEST_PROTOBUF)
    return {"opset": exported.model.opset_imports[""]}


def _write_torch_export(file: Path, program: ExportedProgram, metadata: dict[str, Any]) -> dict[str, Any]:
    content = io.BytesIO()  # torch's own file writer aborts the process when the disk is full
    torch.export.save(program, content, extra_files={METADATA: json.dumps(metadata)})
    file.write_bytes(content.getbuffer())
    return {}


def _write_aoti(file: Path, program: ExportedProgram, metadata: dict[str, Any]) -> dict[str, Any]:
    configs = {"aot_inductor.metadata": {METADATA: json.dumps(metadata)}}
    content = io.BytesIO()  # as for torch.export
    torch._inductor.aoti_compile_and_package(program, package_path=content, inductor_configs=configs)
    file.write_bytes(content.getbuffer())
    return {}


_WRITERS = {"onnx": write_onnx, "torch-export": _write_torch_export, "aoti": _write_aoti}


def _versions(format: str) -> dict[str, str]:
    packages = ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()
    return {name: importlib.import_module(name).__version__ for name in packages}


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as `path`.

    Raises:
        UserError: The parent folder cannot be written.
    """
    scratch = f".{path.name}."
    with writing(path), folder_for(path), tempfile.TemporaryDirectory(prefix=scratch, dir=path.parent) as folder:
        yield Path(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the exporters' output on their internals."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
