"""Imports checkpoints of the original V-MoE code as timm models.

D width; H heads of width D/H; E experts; K choices per token; P slots of an expert for an image; N tokens per image;
M members of an ensemble.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.errors import UserError
from vmoe.models.imported import ImportedModel
from vmoe.models.jax_architecture import POSITIONS, Architecture
from vmoe.models.jax_checkpoint import Leaf, open_checkpoint, read_into
from vmoe.models.surgery import create_model
from vmoe.moe import MoeConfig
from vmoe.moe.assignment import expert_capacity

MODEL_NAME = "vmoe_vit"
_MEAN = _STD = (0.5, 0.5, 0.5)  # the original's value_range(-1, 1)


@dataclass(frozen=True)
class RoutingOptions:
    """The options that the tensors do not show; see `load_jax_checkpoint`."""

    router: str = "token_choice"
    top_k: int = 2
    capacity_factor: float | None = None
    batch_priority: bool = False
    group_images: int = 8
    capacity_rounding: str | None = None
    capacity_multiple_of: int | None = None
    ensemble: int | None = None  # members, of a router that has no axis of them; None: as the tensors are


def load_jax_checkpoint(
    prefix: str | Path,
    *,
    router: Literal["token_choice", "expert_choice", "soft"] = "token_choice",
    top_k: int = 2,
    capacity_factor: float | None = None,
    batch_priority: bool = False,
    group_images: int = 8,
    capacity_rounding: Literal["ceil", "round"] | None = None,
    capacity_multiple_of: int | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Loads a checkpoint of google-research/vmoe into a timm VisionTransformer with MoE layers.

    The tensors give width, depth, heads, patches, experts, MoE layers, classifier and image size. Normalise images to
    [-1, 1] (mean and standard deviation 0.5). Values become float32. Loading needs only the model's memory and some
    MiB. An ensemble (E3, the `eee_*` checkpoints) becomes a model with `MoeConfig(ensemble=M)`.

    Args:
        prefix: The files' common path: PREFIX.index and PREFIX.data-nnnnn-of-NNNNN.
        router: The router. Soft MoE is recognised by its parameters, so the default works for it too.
        top_k: K, experts per token. Not used by expert choice and Soft MoE.
        capacity_factor: The factor in training and evaluation; None drops nothing. Expert choice needs it. Soft MoE's
            is in the tensors, and a given one is only compared.
        batch_priority: Whether full experts drop the tokens with the smallest gates.
        group_images: Images per group; their tokens compete for capacity. Expert choice and Soft MoE route each image
            alone.
        capacity_rounding: "ceil" or "round". None is the original's: "ceil", for expert choice and Soft MoE "round".
        capacity_multiple_of: None is the original's: 4, for expert choice and Soft MoE 1.
        img_size: Pixels, one side of a square or (rows, columns); None keeps the checkpoint's. The position embedding
            is resized as in the original: bilinear with fixed corners, without the class token.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: A file is missing, cut off or foreign, a tensor is missing, unknown or of a wrong shape, or an
            argument does not match the tensors.
    """
    options = RoutingOptions(
        router, top_k, capacity_factor, batch_priority, group_images, capacity_rounding, capacity_multiple_of
    )
    return import_jax_checkpoint(prefix, options, img_size).model


def import_jax_checkpoint(
    prefix: str | Path, options: RoutingOptions, img_size: int | tuple[int, int] | None = None
) -> ImportedModel:
    """Like `load_jax_checkpoint`, with the arguments to rebuild the model."""
    leaves = open_checkpoint(prefix)
    architecture = Architecture(prefix, leaves)
    image_size = architecture.image_size(img_size)
    moe = _moe_config(architecture, options, image_size)
    kwargs = architecture.kwargs()
    try:
        model = create_model(
            MODEL_NAME,
            moe,
            img_size=image_size,
            num_classes=architecture.num_classes,
            device="meta",
            pretrained_cfg_overlay={"input_size": (architecture.in_chans, *image_size)},
            **kwargs,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"{prefix}: its tensors describe no model ({error})") from error
    _check_leaves(prefix, leaves, _views(model, architecture), resized=image_size != architecture.image_size(None))
    model = model.to_empty(device="cpu").eval()
    _fill_model(model, leaves, architecture)
    return ImportedModel(model, MODEL_NAME, kwargs, moe, image_size, architecture.num_classes, _MEAN, _STD)


def _moe_config(architecture: Architecture, options: RoutingOptions, image_size: tuple[int, int]) -> MoeConfig | None:
    """The MoE config from options and tensors; None for a dense checkpoint."""
    if not architecture.moe_blocks:
        return None
    prefix, factor = architecture.prefix, options.capacity_factor
    router = "soft" if architecture.slots and options.router == "token_choice" else options.router
    if router not in ("token_choice", "expert_choice", "soft"):
        raise UserError(f'router={router!r}: must be "token_choice", "expert_choice" or "soft"')
    if (router == "soft") != (architecture.slots is not None):
        kind = "Soft MoE" if architecture.slots else "token choice or expert choice"
        raise UserError(f"router={router!r}: the tensors of {prefix} are those of {kind}")
    if router == "expert_choice" and factor is None:
        raise UserError(
            "capacity_factor: must be given with router='expert_choice': it says how many tokens an expert takes"
        )
    if architecture.members is not None and options.ensemble not in (None, architecture.members):
        raise UserError(f"ensemble={options.ensemble}: the routers of {prefix} have {architecture.members} members")
    try:
        common = {
            "layers": architecture.moe_blocks,
            "num_experts": architecture.num_experts,
            "router": router,
            "ensemble": architecture.members or options.ensemble or 1,
            "batch_priority": options.batch_priority,
            "capacity_rounding": options.capacity_rounding,
            "capacity_multiple_of": options.capacity_multiple_of,
        }
        if router == "token_choice":
            common |= {"top_k": options.top_k, "group": options.group_images}
        else:
            common |= {"top_k": 1}
        if router == "soft":
            _check_slots(architecture, MoeConfig(**common, capacity_factor=factor or 1.0), factor)
            # the factor that gives the checkpoint's number of slots for the current number of tokens
            common |= {"capacity_rounding": "round", "capacity_multiple_of": 1}
            factor = architecture.slots * architecture.num_experts / architecture.tokens_of(image_size)
        moe = MoeConfig(**common, capacity_factor=factor, eval_capacity_factor=factor)
        if router == "expert_choice":
            _check_expert_choice(moe, architecture.tokens_of(image_size))
        return moe
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{prefix}: {error}") from error


def _check_slots(architecture: Architecture, moe: MoeConfig, factor: float | None) -> None:
    """Checks that a given capacity factor matches the tensors."""
    if factor is None:
        return
    slots = expert_capacity(architecture.tokens, architecture.num_experts, factor, *moe.rounding)
    if slots != architecture.slots:
        raise UserError(
            f"capacity_factor={factor}: gives {slots} slots per expert, but {architecture.prefix} has "
            f"{architecture.slots}; leave it out"
        )


def _check_expert_choice(moe: MoeConfig, tokens: int) -> None:
    capacity = expert_capacity(tokens, moe.num_experts, moe.capacity_factor, *moe.rounding)
    if capacity > tokens:
        raise UserError(
            f"capacity_factor={moe.capacity_factor}: each expert would choose {capacity} of an image's {tokens} "
            "tokens; lower it"
        )


def _views(model: nn.Module, architecture: Architecture) -> dict[str, Tensor]:
    """The model's parameters as views in the checkpoint's layout, by their names there."""
    views = {
        **_affine_views("embedding", model.patch_embed.proj, (2, 3, 1, 0)),
        POSITIONS: model.pos_embed,
        **_affine_views("Encoder/encoder_norm", model.norm),
    }
    if architecture.has_class_token:
        views["cls"] = model.cls_token
    if architecture.pre_logits is not None:
        views |= _affine_views("pre_logits", model.fc_norm.fc, (1, 0))
    if architecture.num_classes:
        views |= _affine_views("head", model.head, (1, 0))
    for i, block in enumerate(model.blocks):
        name = architecture.block(i)
        views |= _affine_views(f"{name}/LayerNorm_0", block.norm1) | _affine_views(f"{name}/LayerNorm_1", block.norm2)
        views |= _attention_views(f"{name}/SelfAttention", block.attn)
        if i not in architecture.moe_blocks:
            views |= _affine_views(f"{name}/Mlp/Dense_0", block.mlp.fc1, (1, 0))
            views |= _affine_views(f"{name}/Mlp/Dense_1", block.mlp.fc2, (1, 0))
            continue
        experts, router = block.mlp.experts, block.mlp.router
        views |= _affine_views(f"{name}/Moe/Mlp/Dense_0", experts.fc1, (0, 2, 1))
        views |= _affine_views(f"{name}/Moe/Mlp/Dense_1", experts.fc2, (0, 2, 1))
        if architecture.slots is None:
            kernel_DE = router.gate.weight.t()
            members = architecture.members
            views[f"{name}/Moe/Router/dense/kernel"] = (
                kernel_DE if members is None else kernel_DE.unflatten(1, (members, -1))
            )
        else:
            views |= {f"{name}/Moe/Router/mu": router.mu, f"{name}/Moe/Router/scale": router.scale}
    return {name: view.detach() for name, view in views.items()}


def _affine_views(name: str, module: nn.Module, axes: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """The views of a norm's scale, or of a kernel with the weight's axes in the order `axes`; and of the bias."""
    if axes is None:
        return {f"{name}/scale": module.weight, f"{name}/bias": module.bias}
    return {f"{name}/kernel": module.weight.permute(axes), f"{name}/bias": module.bias}


def _attention_views(name: str, attention: nn.Module) -> dict[str, Tensor]:
    """The views of an attention. timm has one matrix (3D, D) for query, key and value; the original has three."""
    heads, width = attention.num_heads, attention.proj.weight.shape[0]
    weights = attention.qkv.weight.view(3, heads, -1, width).permute(0, 3, 1, 2)
    biases = attention.qkv.bias.view(3, heads, -1)
    views = {
        f"{name}/out/kernel": attention.proj.weight.view(width, heads, -1).permute(1, 2, 0),
        f"{name}/out/bias": attention.proj.bias,
    }
    for i, part in enumerate(("query", "key", "value")):
        views |= {f"{name}/{part}/kernel": weights[i], f"{name}/{part}/bias": biases[i]}
    return views


def _check_leaves(prefix: str | Path, leaves: dict[str, Leaf], views: dict[str, Tensor], resized: bool) -> None:
    """Checks that the checkpoint has exactly the model's tensors."""
    for name, view in views.items():
        if name not in leaves:
            raise UserError(f"{prefix}: lacks {name}; is it a checkpoint of a VisionTransformerMoe?")
        if leaves[name].shape != tuple(view.shape) and not (resized and name == POSITIONS):
            raise UserError(
                f"{prefix}: {name} has shape {leaves[name].shape}, but the others ask for {tuple(view.shape)}"
            )
    unknown = sorted(leaves.keys() - views.keys())
    if unknown:
        raise UserError(f"{prefix}: holds {unknown[0]}, which this model does not have; it is of a kind not supported")


def _fill_model(model: nn.Module, leaves: dict[str, Leaf], architecture: Architecture) -> None:
    """Reads the values into the model, and resizes the position embedding to the model's resolution."""
    views = _views(model, architecture)
    positions = torch.empty(leaves[POSITIONS].shape)
    own, views[POSITIONS] = views[POSITIONS], positions
    read_into(leaves, {name: view.numpy() for name, view in views.items()})
    own.copy_(_resize(positions, model.patch_embed.grid_size, architecture.has_class_token))


def _resize(positions: Tensor, grid: tuple[int, int], has_class_token: bool) -> Tensor:
    """Resizes (1, N, D) of a square of patches to (1, N', D) for `grid`, bilinearly with fixed corners."""
    prefix, patches = positions[:, :has_class_token], positions[:, has_class_token:]
    side = math.isqrt(patches.shape[1])
    if grid == (side, side):
        return positions
    square = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=True)
    return torch.cat([prefix, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
