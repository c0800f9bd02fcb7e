"""Routes images through a V-MoE, and describes the routing of each layer for figures and the index.

R x C patches of an image, E experts, K choices per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vmoe.data import eval_crop, eval_transform
from vmoe.data.channels import displayed
from vmoe.data.config import Crop
from vmoe.errors import UserError
from vmoe.moe import moe_layers
from vmoe.routing import record_routing
from vmoe.routing.recording import LayerRouting
from vmoe.sizes import ImageSize, as_size, height_and_width


@dataclass(frozen=True)
class RoutedImage:
    """An image with its prediction and the routing of its tokens."""

    model_input: np.ndarray  # (H, W, 3) uint8, the model's input, of other channels their display
    detail: np.ndarray  # (H', W', 3) uint8, the same part of the image in finer resolution, H' >= H
    probabilities: np.ndarray  # (classes,) float
    layers: dict[str, LayerRouting]  # the routing of this image, B = 1, from `drawable`
    crop: Crop = "centre"  # how the image was fitted to the model's input

    @property
    def predicted(self) -> int:
        """The most probable class."""
        return int(self.probabilities.argmax())


@torch.no_grad()
def route_image(
    model: nn.Module,
    image: np.ndarray,
    image_size: ImageSize,
    mean: Sequence[float],
    std: Sequence[float],
    detail_size: int = 400,
    crop: Crop = "centre",
) -> RoutedImage:
    """Runs one image through the model, prepared as in evaluation. It is alone in its batch and routing group.

    Args:
        model: A V-MoE in evaluation mode.
        image: (H, W, 3) uint8, or (H, W, C) float32 as `load_image` reads it by channels, of any size.
        image_size: Side of the model's input in pixels, or (height, width).
        mean: Mean of the channels, as in training.
        std: Standard deviation of the channels, as in training.
        detail_size: Largest side of the finer picture to draw on.
        crop: How the image is fitted to the input, as in training.

    Raises:
        UserError: The model is dense, or a logit is not finite.
    """
    require_experts(model)
    device = next(model.parameters()).device
    pixels = eval_transform(image_size, mean, std, crop)(image)[None].to(device)
    with record_routing(model) as trace:
        logits = model(pixels)
    if not logits.isfinite().all():
        raise UserError("CKPT: the model gives logits that are not finite; its training probably diverged")
    sides = height_and_width(image_size)
    most = max(*sides, min(detail_size, *image.shape[:2]))
    finer = as_size(*(round(side * most / max(sides)) for side in sides))
    return RoutedImage(
        model_input=displayed(eval_crop(image, image_size, crop)),
        detail=displayed(eval_crop(image, finer, crop)),
        crop=crop,
        probabilities=_probabilities(model, logits[0].float()).cpu().numpy(),
        layers={name: drawable(routing) for name, routing in trace.layers.items()},
    )


def _probabilities(model: nn.Module, logits: Tensor) -> Tensor:
    """The probabilities of the classes; independent ones with several classes per image."""
    return logits.sigmoid() if getattr(model, "multi_label", False) else logits.softmax(-1)


def require_experts(model: nn.Module) -> None:
    """Refuses a dense model, which routes nothing.

    Raises:
        UserError: The model has no MoE layer.
    """
    if not moe_layers(model):
        raise UserError("CKPT: a dense model without experts, which routes nothing; give a V-MoE's checkpoint")


def require_patch_routing(model: nn.Module) -> None:
    """Refuses models without a map to draw.

    Raises:
        UserError: The model has no MoE layer, or routes images as a whole.
    """
    require_experts(model)
    if any(layer.images is not None for _, layer in moe_layers(model)):
        raise UserError(
            "CKPT: moe.route=image sends all patches of an image to the same experts, so that a map would have one "
            "colour; vmoe explore shows which experts each class goes to"
        )


def select_layers(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """The names of the MoE layers in `wanted`, given by name ("blocks.1.mlp") or number of the block ("1").

    None and "all" select all of them.

    Raises:
        UserError: One of them is no MoE layer of the model.
    """
    names = [name for name, _ in moe_layers(model)]
    if not wanted or "all" in wanted:
        return names
    chosen = {name for layer in wanted for name in names if layer == name or layer in name.split(".")}
    for layer in wanted:
        if not any(layer == name or layer in name.split(".") for name in names):
            raise UserError(f"--layers {layer}: no such MoE layer; this model has {', '.join(names)}")
    return [name for name in names if name in chosen]


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name for the figures of each image: its stem, with -2, -3, ... if another image has it (ignoring case).

    Names are cut to 50 characters, so that suffixes fit any file system.
    """
    names: list[str] = []
    taken: set[str] = set()
    stems = [path.stem[:50] for path in paths]
    reserved = {stem.casefold() for stem in stems}
    for stem in stems:
        name, count = stem, 1
        while name.casefold() in taken or (count > 1 and name.casefold() in reserved):
            count += 1
            name = f"{stem}-{count}"
        taken.add(name.casefold())
        names.append(name)
    return names


def describe_layer(routing: LayerRouting) -> dict:
    """The numbers of a layer's figure, in plain types. Shares are of this image's patches, without prefix tokens."""
    patches = patch_part(routing)
    chosen, gates = patches.chosen[0], patches.gates[0]
    num_experts, top_k = gates.shape[-1], chosen.shape[-1]
    first, any_choice = (
        torch.bincount(part[part >= 0], minlength=num_experts).double() for part in (chosen[:, 0], chosen.flatten())
    )
    return {
        "grid": list(routing.grid),
        "num_experts": num_experts,
        "top_k": top_k,
        "first_choice_share": (first / len(chosen)).tolist(),
        "choice_share": (any_choice / any_choice.sum().clamp_min(1)).tolist(),
        "mean_gate": gates.double().mean(0).tolist(),
        "dropped_choices": int(patches.dropped.sum()),
        "dropped_share": float(patches.dropped.double().mean()),
        "prefix_tokens": [
            {
                "token": name,
                "experts": (experts := routing.chosen[0, index][routing.chosen[0, index] >= 0]).tolist(),
                "gates": routing.gates[0, index][experts].tolist(),
                "dropped": routing.dropped[0, index].tolist(),
            }
            for index, name in enumerate(routing.prefix_names)
        ],
    }


def patch_part(routing: LayerRouting) -> LayerRouting:
    """The same routing without its class and register tokens: N = rows * columns."""
    names = ("gates", "chosen", "combine_weights", "dropped")
    patches = {name: getattr(routing, name)[:, routing.num_prefix_tokens :] for name in names}
    return replace(routing, **patches, num_prefix_tokens=0, prefix_names=())


def drawable(routing: LayerRouting) -> LayerRouting:
    """The same routing on the CPU with its patches row by row, and with choices even for expert choice and Soft MoE.

    There a token's choices are the two experts with the largest shares of its result, or -1, and its gates are these
    shares. A token that no expert took counts as dropped, once. Where images were routed as a whole, there is one
    patch.
    """
    routing = routing.as_tokens()
    gates, chosen, weights, dropped = routing.gates, routing.chosen, routing.combine_weights, routing.dropped
    if routing.combine is not None:
        gates = routing.combine.sum(-1)
        weights, chosen = gates.topk(min(2, gates.shape[-1]))
        chosen = chosen.masked_fill(weights == 0, -1)
        dropped = weights[..., :1] == 0
    found = {"gates": gates.float(), "chosen": chosen, "combine_weights": weights.float(), "dropped": dropped}
    return replace(routing, **{name: routing.row_by_row(values).cpu() for name, values in found.items()}, order=None)
