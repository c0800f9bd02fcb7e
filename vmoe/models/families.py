"""Finds the MLPs of timm's models that can become MoE layers, and the reasons why others cannot.

There is no list of models. A forward pass on the meta device shows the order of the MLPs and the tokens of each. The
tables below hold only what shapes do not show.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vmoe.moe import MoeMlp
from vmoe.moe.attached import tensors_in
from vmoe.moe.mlps import PART_NAMES, class_key, split_leading_norm, take_apart

_BATCH_NORM = "MLPs with batch norms, which experts do not have"
_CLASS_TOKEN = "MLPs that see only a class token"
# Reasons why MLPs cannot become MoE layers, by timm's file and class. Classes in `PART_NAMES` too sometimes can.
REFUSALS = {
    "mlp.GlobalResponseNormMlp": "MLPs that mix tokens (global response norm)",
    "mlp.GatedMlp": "MLPs that mix tokens (spatial gate)",
    "pvt_v2.MlpWithDepthwiseConv": "MLPs that mix tokens (depthwise convolution)",
    "fastvit.ConvMlp": "MLPs that mix tokens (7x7 convolution)",
    "efficientformer.ConvMlpWithNorm": _BATCH_NORM,
    "efficientformer_v2.ConvMlpWithNorm": "MLPs that mix tokens (depthwise convolution)",
    "efficientvit_msra.ConvMlp": _BATCH_NORM,
    "efficientvim.FFN": _BATCH_NORM,
    "fasternet.MLPBlock": "MLPs in one module with what mixes tokens",
    "iformer.FFN": _BATCH_NORM,
    "levit.LevitMlp": _BATCH_NORM,
    "repvit.RepVitMlp": _BATCH_NORM,
    "shvit.FFN": _BATCH_NORM,
    "gemma4_vit.Gemma4GatedMlp": "MLPs that clamp values; create it with use_clipped_linears=False",
    "visformer.SpatialMlp": "MLPs that mix tokens (3x3 convolution)",
}
# Blocks with an MLP on other things than an image's tokens, by timm's file and class.
OTHER_BLOCKS = {
    "cait.LayerScaleBlockClassAttn": _CLASS_TOKEN,
    "xcit.ClassAttentionBlock": _CLASS_TOKEN,
    "volo.ClassBlock": _CLASS_TOKEN,
    "attention_pool.AttentionPoolLatent": _CLASS_TOKEN,
    "csatv2.SpatialTransformerBlock": "MLPs that weigh places",
}


class EligibleMlp(NamedTuple):
    """An MLP that can become an MoE layer.

    Attributes:
        name: The module's name in the model.
        mlp: The module.
        tokens: N, its number of tokens per image.
    """

    name: str
    mlp: nn.Module
    tokens: int


class Survey(NamedTuple):
    """The MLPs of a model.

    Attributes:
        eligible: The MLPs that can become MoE layers, in the order of the forward pass.
        left_out: The reasons why the other MLPs cannot, by name.
    """

    eligible: list[EligibleMlp]
    left_out: dict[str, str]


def survey(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> Survey:
    """Finds the MLPs of a model that work on one token at a time.

    Args:
        model: Any model built of timm's blocks. It is not changed.
        image_size: Pixels, one side of a square or (rows, columns). None takes the size that the model was built for.

    Raises:
        ValueError: The model has MoE layers already, or does not run at the image size.
    """
    if any(isinstance(module, MoeMlp) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has MoE layers already; sparsify a dense model")
    mlps = {name: module for name, module in model.named_modules() if class_key(module) in {**PART_NAMES, **REFUSALS}}
    left_out = {name: reason for name in mlps if (reason := _static_reason(model, name))}
    candidates = [name for name in mlps if name not in left_out]
    calls = _watch(model, candidates, image_size) if candidates else []
    eligible = []
    for name in dict.fromkeys(name for name, _ in calls):
        shapes = [shape for called, shape in calls if called == name]
        reason = _shape_reason(shapes)
        if reason:
            left_out[name] = reason
        else:
            eligible.append(EligibleMlp(name, mlps[name], _tokens_seen(mlps[name], shapes[0])))
    return Survey(eligible, left_out)


def eligible_mlps(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> list[EligibleMlp]:
    """The MLPs of a model that can become MoE layers, in forward order.

    Raises:
        ValueError: There is none. The message has the reason.
    """
    eligible, left_out = survey(model, image_size)
    if not eligible:
        reasons = list(dict.fromkeys(left_out.values())) or ["no MLPs that work on one token at a time"]
        family = type(model).__module__.rpartition(".")[2]
        raise ValueError(f"{type(model).__name__} ({family}) cannot have MoE layers: it has {'; '.join(reasons)}")
    return eligible


def has_class_token(model: nn.Module, mlp: EligibleMlp, image_size: int | tuple[int, int] | None = None) -> bool:
    """Whether the first token of an MLP is a class token.

    In some families the class token joins only in later blocks, so this also counts tokens.

    Args:
        model: The model.
        mlp: One of its MLPs, found with the same `image_size`.
        image_size: See `eligible_mlps`.
    """
    parts = mlp.name.split(".")
    owners = [model.get_submodule(".".join(parts[:length])) for length in range(len(parts) - 1, -1, -1)]
    owner: Any = next((owner for owner in owners if getattr(owner, "cls_token", None) is not None), None)
    embed: Any = getattr(owner, "patch_embed", None)
    patches = getattr(embed, "grid_size", None)
    if patches is not None and image_size is not None and hasattr(embed, "dynamic_feat_size"):
        patches = embed.dynamic_feat_size((image_size, image_size) if isinstance(image_size, int) else image_size)
    return patches is not None and mlp.tokens == math.prod(patches) + getattr(owner, "num_prefix_tokens", 1)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, which takes no memory, and without its hooks, which must not run.

    It includes tensors that modules keep beside parameters and buffers, such as biases cached in a forward pass.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = vars(module)
        memo |= {id(tensor): _without_values(tensor) for tensor in tensors_in(own)}
        memo |= {id(own[name]): type(own[name])() for name in _HOOKS}
    return copy.deepcopy(model, memo)


def run_on_meta(model: nn.Module, images: Tensor) -> Any:
    """The result of a model's forward pass on the meta device. It draws no random numbers."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.compiler.set_stance("force_eager"), _WholeImages():
        return model(images)


class _WholeImages(TorchFunctionMode):
    """Makes `any()` return False on the meta device, which has no values.

    timm's gemma4_vit (1.0.27 to 1.0.29) uses it to find padded images. Whole images have no padding.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.any and len(args) == 1 and not kwargs and args[0].is_meta:
            return torch.zeros((), dtype=torch.bool, device="cpu")
        return func(*args, **(kwargs or {}))


_HOOKS = [
    name
    for name in vars(nn.Module())
    if name.startswith(("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"))
]


def _without_values(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=empty.is_floating_point() or empty.is_complex())
    return empty


def _static_reason(model: nn.Module, name: str) -> str | None:
    """The reason why the MLP of this name cannot be replaced, independent of its input; or None."""
    mlp, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if class_key(parent) in OTHER_BLOCKS:
        return OTHER_BLOCKS[class_key(parent)]
    if name.endswith("mlp_tokens"):
        return "MLPs that mix tokens"
    reason = REFUSALS.get(class_key(mlp))
    if reason and class_key(mlp) not in PART_NAMES:
        return reason
    try:
        take_apart(split_leading_norm(mlp)[1])
    except ValueError as error:
        return reason or str(error)
    return None


_BATCH = 2


def _watch(model: nn.Module, names: list[str], image_size) -> list[tuple[str, torch.Size]]:
    """The calls of the modules in a batch's forward pass: name and input shape."""
    calls = []
    twin = on_meta(model).eval()
    for name in names:
        twin.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: calls.append((name, inputs[0].shape))
        )
    images = meta_images(model, image_size)
    try:
        run_on_meta(twin, images)
    except Exception as error:  # a model's own code may raise any type
        size, reason = tuple(images.shape[1:]), " ".join(str(error).split())
        raise ValueError(
            f"{type(model).__name__} does not run on images of {size} ({reason}); give sparsify its image_size"
        ) from error
    return calls


def _shape_reason(shapes: list[torch.Size]) -> str | None:
    """The reason why an MLP with these input shapes cannot be replaced, or None."""
    if any(len(shape) < 3 or shape[0] != _BATCH for shape in shapes):
        return "MLPs that do not see the tokens of whole images"
    return "MLPs that are shared by several places" if len(shapes) > 1 else None


def _tokens_seen(mlp: nn.Module, shape: torch.Size) -> int:
    width = shape[1] if take_apart(split_leading_norm(mlp)[1]).use_conv else shape[-1]
    return shape[1:].numel() // width


def meta_images(model: nn.Module, image_size: int | tuple[int, int] | None) -> Tensor:
    """A batch of two images of the model's own size, on the meta device."""
    config = getattr(model, "pretrained_cfg", None) or {}
    size = image_size or _own_size(model) or config.get("input_size", (3, 224, 224))
    size = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    return torch.zeros(_BATCH, own_channels(model), *size, dtype=dtype, device="meta")


def own_channels(model: nn.Module) -> int:
    """How many channels the images have that a model was made for."""
    if (known := _first_attribute(model, "in_chans", int)) is not None:
        return int(known)
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("input_size", (3, 224, 224))[0] if stem is None else stem.in_channels


def _own_size(model: nn.Module) -> tuple[int, ...] | None:
    if hasattr(model, "tokens_spatial_shape"):  # hiera keeps the patches instead
        hiera: Any = model
        return tuple(n * stride for n, stride in zip(hiera.tokens_spatial_shape, hiera.patch_stride, strict=True))
    return _first_attribute(model, "img_size", tuple)


def _first_attribute(model: nn.Module, attribute: str, kind: type):
    """The first value of type `kind` that a module of the model has as this attribute."""
    values = (getattr(module, attribute, None) for module in model.modules())
    return next((value for value in values if isinstance(value, kind)), None)
