"""V-MoEs by name, registered in timm: `timm.create_model("vmoe_small_patch32_last2_e8")` once `vmoe` is imported.

The architecture is that of the original code: a ViT with tanh GELU, LayerNorms of eps 1e-6 and a final LayerNorm for
every classifier. `vmoe_vit` has no MoE layers by default; arguments set any size. `vmoe_cct`, for small images, has
none either: it is CCT-7/3x1 (https://arxiv.org/abs/2104.05704) with mean pooling instead of sequence pooling.
"""

import sys
from collections import OrderedDict
from dataclasses import replace
from typing import Any, Literal

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vmoe.models.surgery import create_model, sparsify
from vmoe.models.tokenizer import ConvTokenizer
from vmoe.moe import MoeConfig, moe_layers

# The paper's sizes (Riquelme et al. 2021, appendix B). Its S has 8 layers of width 512, not timm's 12 of 384.
_PAPER_SIZES = {
    "small": {"embed_dim": 512, "depth": 8, "num_heads": 8},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
_FAMILY = (("small", 32), ("small", 16), ("base", 32), ("base", 16), ("large", 16), ("huge", 14))
_CCT = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 256,
    "depth": 7,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "class_token": False,
    "global_pool": "avg",
    "embed_layer": ConvTokenizer,
}
_FOR_32_PIXELS = {
    "vmoe_tiny_patch4_32": {"embed_dim": 192, "depth": 6, "num_heads": 3, "patch_size": 4},
    "vmoe_small_patch4_32": {**_PAPER_SIZES["small"], "patch_size": 4},
}


def _named_models() -> dict[str, tuple[dict[str, Any], MoeConfig]]:
    """The arguments and the MoE layers of each name."""
    models: dict[str, tuple[dict[str, Any], MoeConfig]] = {
        "vmoe_vit": ({**_PAPER_SIZES["small"], "patch_size": 32}, MoeConfig(layers=[])),
        "vmoe_cct": (_CCT, MoeConfig(layers=[])),
    }
    for size, patch_size in _FAMILY:
        for layers in ("last2", "every2"):
            for num_experts in (8, 32):
                name = f"vmoe_{size}_patch{patch_size}_{layers}_e{num_experts}"
                moe = MoeConfig(layers=layers.replace("2", "-2"), num_experts=num_experts)
                models[name] = ({**_PAPER_SIZES[size], "patch_size": patch_size}, moe)
    for name, arguments in _FOR_32_PIXELS.items():
        models[name] = ({**arguments, "img_size": 32}, MoeConfig(layers="last-2"))
    return models


def _default_cfg(arguments: dict[str, Any]) -> dict[str, Any]:
    side = arguments.get("img_size", 224)
    return {
        "url": "",
        "num_classes": 1000 if side == 224 else 10,
        "input_size": (3, side, side),
        "fixed_input_size": True,
        # same as the original's `decode|resize(side)|value_range(-1,1)`
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj.0" if "embed_layer" in arguments else "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


NAMED = _named_models()
ON_BACKBONE = "vmoe_on_backbone"
_BACKBONE = "vit_tiny_patch16_224"
default_cfgs = generate_default_cfgs(
    {
        **{name: _default_cfg(arguments) for name, (arguments, _) in NAMED.items()},
        ON_BACKBONE: {**_default_cfg({}), "fixed_input_size": False},
    }
)


def _build(moe: MoeConfig | dict[str, Any] | Literal[False], pre_logits: int | None = None, **kwargs: Any) -> nn.Module:
    """The transformer with its MoE layers.

    Args:
        moe: The MoE layers, or their settings from a shared folder's config.json; False for none.
        pre_logits: Width of a dense layer with tanh between the pooled token and the classifier, which is timm's
            `fc_norm` module. None for none.
        **kwargs: Arguments of timm's VisionTransformer.
    """
    moe = MoeConfig(**moe) if isinstance(moe, dict) else moe
    model = VisionTransformer(**{"act_layer": "gelu_tanh", "fc_norm": False, **kwargs})
    if pre_logits is not None:
        _insert_pre_logits(model, pre_logits)
    return sparsify(model, moe) if moe and moe.layers else model


def _insert_pre_logits(model: VisionTransformer, width: int) -> None:
    placement: dict[str, Any] = {"device": model.norm.weight.device, "dtype": model.norm.weight.dtype}
    dense = nn.Linear(model.embed_dim, width, **placement)
    model.fc_norm = nn.Sequential(OrderedDict(fc=dense, act=nn.Tanh()))
    if model.num_classes > 0 and width != model.embed_dim:
        model.head = nn.Linear(width, model.num_classes, **placement)
    model.head_hidden_size = width


def _register(name: str, arguments: dict[str, Any], moe: MoeConfig) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            _build,
            name,
            pretrained,
            pretrained_filter_fn=_with_the_file_s_slots,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **{"moe": moe, **arguments, **kwargs},
        )

    create.__name__ = create.__qualname__ = name
    register_model(create)


@register_model
def vmoe_on_backbone(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MoE layers on any timm model, so that a folder's config.json can describe every V-MoE.

    `backbone` is its name, `moe` a dict of `MoeConfig`'s fields. All other arguments are the backbone's.
    """
    return create_on_backbone(ON_BACKBONE, pretrained, **kwargs)


def create_on_backbone(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """As `vmoe_on_backbone`, for a name of timm's registry that has a description of its own."""
    features = _features_of(**kwargs) if kwargs.get("features_only") else {}
    return build_model_with_cfg(
        _build_on_backbone,
        variant,
        pretrained,
        pretrained_filter_fn=_with_the_file_s_slots,
        feature_cfg=features,
        **kwargs,
    )


def _features_of(moe: object = None, backbone: str = _BACKBONE, **kwargs: Any) -> dict[str, Any]:
    """The way in which timm extracts features of the backbone, for `build_model_with_cfg`. `moe` has no effect."""
    arguments = {name: value for name, value in kwargs.items() if not name.startswith("pretrained")}
    with torch.device("meta"):
        features: Any = timm.create_model(backbone, **arguments)
        stages = {name for name, _ in timm.create_model(backbone).named_children()}
    found = {
        "feature_cls": type(features),
        "out_indices": list(features.feature_info.out_indices),
        "output_fmt": getattr(features, "output_fmt", "NCHW"),
    }
    # of the backbone's parts, in place of the backbone
    is_list = isinstance(features, nn.ModuleDict) and "model" not in features
    return found | ({"flatten_sequential": True} if is_list and not {*features} <= stages else {})


def fitted_weights(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights for a model of another image size, converted by timm's code of the backbone if it has any."""
    own = model.state_dict()
    if all(name in own and own[name].shape == value.shape for name, value in state_dict.items()):
        return state_dict
    resize = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return state_dict if resize is None else resize(state_dict, model)


def _with_the_file_s_slots(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Like `fitted_weights`, and gives the model's Soft MoE layers the file's number of slots.

    timm builds the model for its `img_size`, so the number of slots differs from that of a file for another size. Slots
    are trained parameters that cannot be resampled. Images with more or fewer tokens are mixed into the same slots, as
    after timm's `set_input_size`.
    """
    for name, layer in moe_layers(model):
        mu = state_dict.get(f"{name}.router.mu")
        if layer.config.router != "soft" or mu is None or mu.shape == layer.router.mu.shape:
            continue
        factor = layer.config.experts_per_token * mu.shape[-1] / layer.router.mu.shape[-1]
        layer.config = replace(layer.config, capacity_factor=factor, eval_capacity_factor=None)  # None takes training's
        layer.router.mu = nn.Parameter(layer.router.mu.new_empty((*layer.router.mu.shape[:2], mu.shape[-1])))
    return fitted_weights(state_dict, model)


def _build_on_backbone(backbone: str = _BACKBONE, moe: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    if not timm.is_model(backbone):  # names such as hf-hub:... would fetch a model
        raise ValueError(f"backbone={backbone!r}: timm knows no such model")
    return create_model(backbone, MoeConfig(**(moe or {})), **kwargs)


for _name, (_arguments, _moe) in NAMED.items():
    _register(_name, _arguments, _moe)
