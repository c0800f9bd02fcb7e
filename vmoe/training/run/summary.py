"""What a model costs, shown before training beside its dense twin, and summary.json after it."""

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

_CLASSES_NAMED = 12  # at most, with their numbers of images


@dataclass(frozen=True)
class Cost:
    """Parameters, in all and active for one token, and what one image's forward pass computes.

    Attributes:
        parameters: In all, and active for one token.
        flops: Floating-point operations per image; a multiply-add counts 2.
        moe_tokens: How many tokens of an image each MoE layer routes, by the layer's name.
    """

    parameters: Parameters
    flops: int
    moe_tokens: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, image_size: ImageSize) -> "Cost":
        return cls(count_parameters(model), *image_cost(model, image_size))


def twin_cost(config: ModelConfig, num_classes: int, image_size: ImageSize) -> Cost:
    """The cost of the same model without MoE layers; it takes no memory."""
    kwargs = {**config.kwargs, "pretrained": False}
    with torch.device("meta"):
        twin = build_model(config.name, kwargs, None, num_classes, image_size)
    return Cost.of(twin, image_size)


def cost_table(title: str, cost: Cost, twin: Cost) -> Table:
    """The model beside its dense twin: parameters in all and active, and FLOPs an image."""
    table = Table(title=escape(title), title_justify="left")
    for column in ("", "this model", "dense twin", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for name, ours, dense in (
        ("parameters", cost.parameters.total, twin.parameters.total),
        ("active parameters", cost.parameters.active, twin.parameters.active),
        ("FLOPs an image", cost.flops, twin.flops),
    ):
        table.add_row(name, _short(ours), _short(dense), f"{ours / dense:.2f}")
    return table


def data_lines(config: DataConfig, data: ImageDataModule) -> list[str]:
    """What a run trains on: the set, its place, the images of each split and class."""
    place = "" if config.name in EMBEDDED_SETS else f" in {config.root}"
    classes, size = counted(data.num_classes, "class", "classes"), data.image_size
    several = " (an image may have several)" if data.multi_label else ""
    lines = [f"images: {config.name}{place}, {classes}{several}, {size_text(size)} pixels"]
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
    """What a run trains: the model and its experts."""
    layers = moe_layers(model)
    if not layers:
        return f"model: {config.name}, dense"
    moe, chosen = layers[0][1].config, ", ".join(name for name, _ in layers)
    experts = f"{counted(moe.num_experts, 'expert')} with router={moe.router} in each of"
    return f"model: {config.name}, {experts} {counted(len(layers), 'MoE layer')} ({chosen})"


def result_line(result: dict[str, Any], folder: str) -> str:
    """What a run has reached, by the content of its summary.json."""
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
    # Of five classes it would always be 100 %; how many there are, a run's older summary does not tell.
    five = f", top-5 {metrics['test/top5']:.2%}" if result.get("classes", 6) > 5 else ""
    return (
        f"test top-1 {metrics['test/top1']:.2%}{five}, loss {metrics['test/loss']:.4f}, "
        f"by the checkpoint of epoch {result['best_epoch']} ({validation}, unaugmented training images "
        f"{metrics['train_clean/top1']:.2%}); {ending}"
    )


def _by_class(names: Sequence[str], counts: Sequence[int]) -> str:
    """How many images each class has: class by class where they differ and are few."""
    if min(counts) == max(counts):
        return f"{min(counts):,} per class"
    if len(names) <= _CLASSES_NAMED:
        return ", ".join(f"{count:,} of {name}" for name, count in zip(names, counts, strict=True))
    return f"{min(counts):,} to {max(counts):,} per class"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's kind and how many threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"


def device_line(device: torch.device, wanted: str) -> str:
    """Where a run trains, and why there; `wanted` is `trainer.device`."""
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
    """The most memory used so far: of the GPU when it trains, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20  # which never shrinks while the process runs
    return peak_host_memory() / 2**20


def cost_entries(cost: Cost, twin: Cost) -> dict[str, Any]:
    """The cost as summary.json tells it."""
    return {
        "parameters": cost.parameters._asdict(),
        "flops_per_image": cost.flops,
        "dense_twin": {"parameters": twin.parameters.total, "flops_per_image": twin.flops},
    }


def token_entries(cost: Cost, data: ImageDataModule, epochs: int) -> dict[str, Any]:
    """What the experts had to learn from, as summary.json tells it."""
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
