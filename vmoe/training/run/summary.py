"""The costs of a model beside its dense twin, printed before training, and summary.json after it."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from vmoe.checkpoints import build_model
from vmoe.data import ImageDataModule
from vmoe.data.config import EMBEDDED_SETS, DataConfig
from vmoe.memory import peak_host_memory
from vmoe.models.cost import Parameters, count_parameters, image_cost
from vmoe.moe import moe_layers
from vmoe.sizes import ImageSize, size_text
from vmoe.text import counted
from vmoe.training.config import ModelConfig

_CLASSES_NAMED = 12  # at most so many classes are listed with their numbers of images


@dataclass(frozen=True)
class Cost:
    """Parameters and floating-point operations of a model.

    Attributes:
        parameters: The number of parameters in all, and active for one token.
        flops: Floating-point operations per image in the forward pass; a multiply-add counts 2.
        moe_tokens: The number of tokens per image that each MoE layer routes, by the layer's name.
    """

    parameters: Parameters
    flops: int
    moe_tokens: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, image_size: ImageSize) -> "Cost":
        return cls(count_parameters(model), *image_cost(model, image_size))


def twin_cost(config: ModelConfig, num_classes: int, image_size: ImageSize, channels: int | None = None) -> Cost:
    """The cost of the same model without MoE layers. It is computed without memory for weights."""
    kwargs = {**config.kwargs, "pretrained": False}
    with torch.device("meta"):
        twin = build_model(config.name, kwargs, None, num_classes, image_size, channels)
    return Cost.of(twin, image_size)


def cost_table(title: str, cost: Cost, twin: Cost) -> Table:
    """A table of the model beside its dense twin: parameters in all and active, and FLOPs per image."""
    table = Table(title=escape(title), title_justify="left")
    for column in ("", "this model", "dense twin", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for name, ours, dense in (
        ("parameters", cost.parameters.total, twin.parameters.total),
        ("active parameters", cost.parameters.active, twin.parameters.active),
        ("FLOPs per image", cost.flops, twin.flops),
    ):
        table.add_row(name, _short(ours), _short(dense), f"{ours / dense:.2f}")
    return table


def data_lines(config: DataConfig, data: ImageDataModule) -> list[str]:
    """Lines on a run's data: the set, its path, the number of images per split and class."""
    place = "" if config.name in EMBEDDED_SETS else f" in {config.root}"
    classes, size = counted(data.num_classes, "class", "classes"), data.image_size
    several = " (an image may have several)" if data.multi_label else ""
    channels = "" if data.channels is None else f", {counted(data.channels, 'channel')}"
    lines = [f"images: {config.name}{place}, {classes}{several}, {size_text(size)} pixels{channels}"]
    for split, title in (("train", "training"), ("val", "validation"), ("test", "test")):
        if split == "val" and not data.has_validation:
            lines.append(f"  {title}: none")
            continue
        counts = data.images_of_classes(split)
        images = counted(data.number_of_images(split), "image")
        if split == "train" and data.is_endless:
            images = f"without end, each pass {images} that are new"
        lines.append(f"  {title}: {images}, {_by_class(data.class_names, counts)}")
    return lines


def model_line(config: ModelConfig, model: nn.Module) -> str:
    """A line on the model and its experts."""
    layers = moe_layers(model)
    if not layers:
        return f"model: {config.name}, dense"
    moe, chosen = layers[0][1].config, ", ".join(name for name, _ in layers)
    per_image = ""
    if moe.route == "image":
        per_image = f", one decision per image{' for all layers' if moe.shared_router else ''},"
    experts = f"{counted(moe.num_experts, 'expert')} with router={moe.router}{per_image} in each of"
    return f"model: {config.name}, {experts} {counted(len(layers), 'MoE layer')} ({chosen})"


def result_line(result: dict[str, Any], folder: str) -> str:
    """A line on a run's result, from the content of its summary.json."""
    metrics = result["metrics"]
    ending = f"{result['train_seconds']:.0f} s, {result['images_per_second']:,.0f} img/s; all in {folder}"
    if "test/mAP" in metrics:
        validation = f"val mAP {metrics['val/mAP']:.2%}" if "val/mAP" in metrics else "no validation"
        return (
            f"test mAP {metrics['test/mAP']:.2%}, F1 {metrics['test/f1']:.2%}, loss {metrics['test/loss']:.4f}, by the "
            f"checkpoint of epoch {result['best_epoch']} ({validation}, unaugmented training images "
            f"{metrics['train_clean/mAP']:.2%}); {ending}"
        )
    validation = f"val top-1 {metrics['val/top1']:.2%}" if "val/top1" in metrics else "no validation"
    # with up to five classes top-5 is always 100 %; older summaries do not hold the number of classes
    five = f", top-5 {metrics['test/top5']:.2%}" if result.get("classes", 6) > 5 else ""
    return (
        f"test top-1 {metrics['test/top1']:.2%}{five}, loss {metrics['test/loss']:.4f}, "
        f"by the checkpoint of epoch {result['best_epoch']} ({validation}, unaugmented training images "
        f"{metrics['train_clean/top1']:.2%}); {ending}"
    )


def _by_class(names: Sequence[str], counts: Sequence[int]) -> str:
    """The number of images per class: one by one if they differ and the classes are few."""
    if min(counts) == max(counts):
        return f"{min(counts):,} per class"
    if len(names) <= _CLASSES_NAMED:
        return ", ".join(f"{count:,} of {name}" for name, count in zip(names, counts, strict=True))
    return f"{min(counts):,} to {max(counts):,} per class"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's type and the number of torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"


def device_line(device: torch.device, wanted: str) -> str:
    """A line on the device of a run and the reason for it. `wanted` is `trainer.device`."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda":
        number = f", GPU {device.index or 0} of {gpus}" if gpus > 1 else ""
        return f"device: {torch.cuda.get_device_name(device)}{number}, by trainer.device={wanted}"
    if device.type == "mps":
        return f"device: Apple's GPU (MPS), by trainer.device={wanted}"
    if gpus:
        why = "which repeats runs that were measured on a CPU"
        other = f"--trainer.device auto trains on the {torch.cuda.get_device_name()} that is here"
        return f"device: cpu, by trainer.device={wanted}, {why}; {other}"
    if torch.backends.mps.is_available():
        return f"device: cpu, by trainer.device={wanted}; --trainer.device mps trains on Apple's GPU"
    reason = "there is no usable GPU" if torch.version.cuda else "this torch is built without CUDA"
    return f"device: cpu, by trainer.device={wanted}; {reason}"


def peak_memory_mib(device: torch.device) -> float:
    """The peak memory so far in MiB: of the GPU if it trains, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20  # it never shrinks while the process runs
    return peak_host_memory() / 2**20


def cost_entries(cost: Cost, twin: Cost) -> dict[str, Any]:
    """The entries of summary.json on the cost."""
    return {
        "parameters": cost.parameters._asdict(),
        "flops_per_image": cost.flops,
        "dense_twin": {"parameters": twin.parameters.total, "flops_per_image": twin.flops},
    }


def token_entries(cost: Cost, data: ImageDataModule, epochs: int) -> dict[str, Any]:
    """The entries of summary.json on the number of tokens that each expert has seen."""
    sampler = data.train_sampler
    return {
        "images_trained": epochs * (sampler.epoch_images // sampler.batch_size) * sampler.batch_size,
        "moe_tokens_per_image": cost.moe_tokens,
    }


def _short(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
