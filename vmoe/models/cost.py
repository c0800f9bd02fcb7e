"""The costs of a model: parameters, in all and active for one token, and floating-point operations per image."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from vmoe.models.families import on_meta, own_channels, run_on_meta
from vmoe.models.members import add_member_hooks
from vmoe.models.padding import add_mask_hooks
from vmoe.moe import moe_layers


class Parameters(NamedTuple):
    """Numbers of parameters: all, and those active for one token (K of E experts; in an ensemble K per member)."""

    total: int
    active: int


def count_parameters(model: nn.Module) -> Parameters:
    """Counts the parameters of a dense or sparse model."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for _, layer in moe_layers(model):
        of_experts = sum(parameter.numel() for parameter in layer.experts.stacked_parameters())
        working = layer.config.ensemble * layer.config.experts_per_token
        idle += round(of_experts * (1 - min(1, working / layer.num_experts)))
    return Parameters(total, total - idle)


class ImageCost(NamedTuple):
    """The cost of one image's forward pass.

    Attributes:
        flops: Floating-point operations. A multiply-add counts 2, padding nothing.
        moe_tokens: Number of tokens that each MoE layer routes, by the layer's name. Padding of windows counts, and so
            does each member's copy in an ensemble.
    """

    flops: int
    moe_tokens: dict[str, int]


def image_cost(model: nn.Module, image_size: int | tuple[int, int], in_chans: int | None = None) -> ImageCost:
    """Counts the operations of one image's forward pass, which runs on the meta device.

    Matrix products and convolutions count, as usual, with any backend. With a capacity at evaluation, experts count as
    if all their slots were filled, since the number of drops depends on the image.

    Args:
        model: Any image model that is not sharded. It is not changed.
        image_size: Pixels, one side of a square or (rows, columns).
        in_chans: Channels. None: as many as the model was made for.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    tokens: dict[str, int] = {}

    def note(name: str, shape: torch.Size) -> None:
        tokens[name] = tokens.get(name, 0) + shape[:-1].numel()  # a layer may be called for several parts of an image

    counter = FlopCounterMode(display=False)
    with counter:
        _run_on_meta(model, (1, in_chans or own_channels(model), *size), training=False, watch=note)
    return ImageCost(counter.get_total_flops(), tokens)


def flops_per_image(model: nn.Module, image_size: int | tuple[int, int], in_chans: int | None = None) -> int:
    """The floating-point operations of one image's forward pass; see `image_cost`."""
    return image_cost(model, image_size, in_chans).flops


def check_training_capacity(model: nn.Module, images: int, image_size: int | tuple[int, int]) -> None:
    """Refuses a capacity factor that leaves experts without slots in training. It computes nothing.

    Args:
        model: Any image model. It is not changed.
        images: Images per batch.
        image_size: Pixels, one side of a square or (rows, columns).

    Raises:
        CapacityError: Experts would have no slot.
    """
    if any(layer.config.capacity_factor is not None for _, layer in moe_layers(model)):
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        _run_on_meta(model, (images, own_channels(model), *size), training=True)


def _run_on_meta(
    model: nn.Module,
    shape: tuple[int, ...],
    training: bool,
    watch: Callable[[str, torch.Size], None] = lambda name, shape: None,
) -> None:
    """Runs a forward pass of a copy on the meta device. The model does not change, and none of its hooks run.

    `watch` is called with the name of each MoE layer that runs and the shape of its tokens.
    """
    twin = on_meta(getattr(model, "_orig_mod", model)).train(training)
    twin.requires_grad_(False)  # else the FLOP counter also handles gradients of each block's input
    layers = dict(moe_layers(twin))
    add_mask_hooks(twin, layers)  # adds our own hooks
    add_member_hooks(twin, layers)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0].shape))
    dtype = next((parameter.dtype for parameter in twin.parameters()), torch.float32)
    run_on_meta(twin, torch.zeros(shape, dtype=dtype, device="meta"))


@register_flop_formula(torch.ops.vmoe.segment_linear)
def _segment_linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """The FLOPs of the operator: each row is multiplied by one expert's weights."""
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]
