"""One example per family of timm, for the sweep of `test_families.py` and the list in docs/backbones.md.

Regenerate that page with `python tests/support/backbones.py > docs/backbones.md`.
"""

import importlib
from collections import Counter
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from vmoe.models.families import survey

VIT = {"embed_dim": 24, "depth": 4, "num_heads": 2}
STAGES = {"depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)}
WIDTHS = {"embed_dims": (16, 16, 32, 32), **STAGES}


class Example(NamedTuple):
    """A model and a smaller one of the same family.

    Attributes:
        family: The file of timm.
        name: A model of full size.
        small: Arguments that make it small; None if the model is too large for the numerical part of the sweep.
        pixels: Side of the small model's images.
        build: The class to call with `small` if timm's own function does not accept these arguments.
    """

    family: str
    name: str
    small: dict[str, Any] | None
    pixels: int = 64
    build: str | None = None

    def make_small(self) -> nn.Module:
        """The small model, with 5 classes. Its scales are so large that every MLP changes the logits."""
        if self.build is None:
            model = timm.create_model(self.name, num_classes=5, **self.small)
        else:
            module = importlib.import_module(f"timm.models.{self.family}")
            model = getattr(module, self.build)(num_classes=5, **self.small)
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                nn.init.normal_(parameter, std=0.5)
        return model


# One of each kind: of MLP's class, of blocks that are left out, of how tokens lie. The others are many of a kind.
KINDS = {
    "vit_tiny_patch16_224",
    "vit_so150m_patch16_reg4_gap_256",
    "vit_small_patch16_18x2_224",
    "vit_giant_patch14_dinov2",
    "eva02_base_patch14_224",
    "vitamin_small_224",
    "gemma4_vit_167m",
    "convnext_atto",
    "convnext_tiny",
    "visformer_tiny",
    "hiera_tiny_224",
    "tiny_vit_5m_224",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "volo_d1_224",
    "csatv2",
    "tnt_s_patch16_224",
}


def _mvitv2() -> dict[str, Any]:
    from timm.models.mvitv2 import MultiScaleVitCfg

    return {"cfg": MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=16), "img_size": (64, 64)}


SUPPORTED = [
    Example("beit", "beit_base_patch16_224", {"img_size": 64, **VIT}),
    Example("cait", "cait_xxs24_224", {"img_size": 64, **VIT}),
    Example(
        "coat",
        "coat_lite_tiny",
        {"img_size": 64, "embed_dims": (16, 16, 32, 32), "serial_depths": (1, 1, 1, 2)},
    ),
    Example("convit", "convit_tiny", {"img_size": 64, **VIT, "embed_dim": 12, "local_up_to_layer": 2}),
    Example("convnext", "convnext_atto", {"dims": (8, 12, 16, 24), "depths": (1, 1, 2, 1)}),
    Example("convnext", "convnext_tiny", {"dims": (8, 12, 16, 24), "depths": (1, 1, 2, 1)}),
    Example(
        "crossvit",
        "crossvit_tiny_240",
        {"embed_dim": (24, 48), "depth": ((1, 2, 0), (1, 2, 0)), "num_heads": (2, 2)},
        pixels=240,
    ),
    Example(
        "csatv2",
        "csatv2",
        {
            "dims": (16, 16, 16, 32),
            "depths": (1, 1, 2, 2),
            "transformer_depths": (0, 0, 1, 1),
        },
        pixels=128,
        build="CSATv2",
    ),
    Example(
        "davit",
        "davit_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 48), "num_heads": (2, 2, 2, 2)},
    ),
    Example("deepseek_vit", "deepseek_vit_412m", {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}, 56),
    Example("deit", "deit_tiny_distilled_patch16_224", {"img_size": 64, **VIT}),
    Example("edgenext", "edgenext_xx_small", {}),
    Example(
        "efficientformer",
        "efficientformer_l1",
        {"depths": (1, 1, 1, 2), "embed_dims": (16, 16, 24, 32), "num_vit": 1},
        pixels=224,  # its attention is made for 7 x 7 patches
        build="EfficientFormer",
    ),
    Example("eva", "eva02_tiny_patch14_224", {"img_size": 56, **VIT}, 56),
    Example("eva", "eva02_base_patch14_224", {"img_size": 56, **VIT}, 56),
    Example("focalnet", "focalnet_tiny_srf", {"embed_dim": 16, "depths": (1, 1, 2, 1)}, build="FocalNet"),
    Example("gcvit", "gcvit_xxtiny", {"img_size": 64, "embed_dim": 16, **STAGES}, build="GlobalContextVit"),
    Example(
        "gemma4_vit",
        "gemma4_vit_167m",
        {"use_clipped_linears": False, "embed_dim": 32, "depth": 2, "num_heads": 2},
        pixels=96,
    ),
    Example("hiera", "hiera_tiny_224", {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 2, 1)}),
    Example("hieradet_sam2", "hieradet_small", {"embed_dim": 16, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)}),
    Example("inception_next", "inception_next_atto", {"dims": (16, 16, 16, 24), "depths": (1, 1, 2, 1)}),
    Example("maxxvit", "test_maxvit", {}, 160),
    Example("metaformer", "caformer_s18", {"dims": (16, 16, 32, 32), "depths": (1, 1, 2, 1)}, build="MetaFormer"),
    Example("mlp_mixer", "mixer_s32_224", {"img_size": 64, "embed_dim": 24, "num_blocks": 4}, build="MlpMixer"),
    Example(
        "mlp_mixer",
        "resmlp_12_224",
        {"img_size": 64, "embed_dim": 24, "num_blocks": 4},
        build="MlpMixer",
    ),
    Example("mobilevit", "mobilevitv2_050", {}),
    Example("mvitv2", "mvitv2_tiny", _mvitv2(), build="MultiScaleVit"),
    Example("naflexvit", "naflexvit_base_patch16_siglip", {**VIT}),
    Example(
        "nest",
        "nest_tiny",
        {"img_size": 64, "embed_dims": (16, 16, 32), "depths": (1, 1, 2), "num_heads": (1, 1, 2)},
        build="Nest",
    ),
    Example(
        "nextvit",
        "nextvit_small",
        {"in_chans": 3, "stem_chs": (16, 16, 16), "depths": (1, 1, 5, 1)},
        build="NextViT",
    ),
    Example(
        "pit",
        "pit_ti_224",
        {"img_size": 64, "depth": (1, 2, 1), "base_dims": (8, 8, 8), "heads": (2, 4, 8)},
        build="PoolingVisionTransformer",
    ),
    Example("qwen3_vit", "qwen3_vit_88m", {"img_size": 96, "embed_dim": 32, "depth": 2, "num_heads": 2}, 96),
    Example(
        "sequencer",
        "sequencer2d_s",
        {"img_size": 56, "layers": (1, 1, 1, 1), "embed_dims": (16, 24, 24, 24), "hidden_sizes": (8, 8, 8, 8)},
        pixels=56,
    ),
    Example(
        "swiftformer",
        "swiftformer_xs",
        {"layers": (1, 1, 2, 1), "embed_dims": (16, 16, 24, 32)},
        build="SwiftFormer",
    ),
    Example("swin_transformer", "swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 12, **STAGES}, 56),
    Example("swin_transformer_v2", "swinv2_tiny_window8_256", {"img_size": 64, "embed_dim": 12, **STAGES}),
    Example("swin_transformer_v2_cr", "swinv2_cr_tiny_224", {"img_size": 56, "embed_dim": 12, **STAGES}, 56),
    Example("tiny_vit", "tiny_vit_5m_224", {**WIDTHS, "num_heads": (1, 1, 2, 2)}, 224),
    Example(
        "tnt",
        "tnt_s_patch16_224",
        {"img_size": 64, "embed_dim": 24, "inner_dim": 8, "depth": 2, "num_heads_outer": 2, "num_heads_inner": 2},
    ),
    Example("twins", "twins_svt_small", {"img_size": 64, **WIDTHS, "num_heads": (1, 1, 2, 2)}),
    Example("visformer", "visformer_tiny", {"img_size": 64, "embed_dim": 48, "num_heads": 2, "depth": (1, 2, 2)}),
    Example("vision_transformer", "vit_tiny_patch16_224", {"img_size": 64, **VIT}),
    Example("vision_transformer", "vit_so150m_patch16_reg4_gap_256", {"img_size": 64, **VIT}),
    Example("vision_transformer", "vit_giant_patch14_dinov2", {"img_size": 56, **VIT}, 56),
    Example("vision_transformer", "vit_small_patch16_18x2_224", {"img_size": 64, **VIT, "depth": 2}),
    Example("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", {"img_size": 64, **VIT}),
    Example("vision_transformer_relpos", "vit_relpos_small_patch16_224", {"img_size": 64, **VIT}),
    Example("vision_transformer_relpos", "vit_srelpos_small_patch16_224", {"img_size": 64, **VIT}),
    Example(
        "vision_transformer_sam",
        "samvit_base_patch16_224",
        {"img_size": 64, **VIT, "window_size": 2, "global_attn_indexes": (1,)},
    ),
    Example("vitamin", "vitamin_small_224", {"img_size": 64, "depth": 2}),
    Example(
        "volo",
        "volo_d1_224",
        {
            "img_size": 64,
            "layers": (1, 1, 1, 1),
            "embed_dims": (16, 32, 32, 32),
            "num_heads": (2, 2, 2, 2),
        },
        build="VOLO",
    ),
    Example("xcit", "xcit_nano_12_p16_224", {"img_size": 64, **VIT}),
]
REFUSED = [
    Example("convnext", "convnextv2_atto", None),
    Example("efficientformer_v2", "efficientformerv2_s0", None),
    Example("efficientvim", "efficientvim_m1", None),
    Example("efficientvit_msra", "efficientvit_m0", None),
    Example("fasternet", "fasternet_t0", None),
    Example("fastvit", "fastvit_t8", None),
    Example("gemma4_vit", "gemma4_vit_167m", None),
    Example("iformer", "iformer_t", None),
    Example("levit", "levit_128s", None),
    Example("mlp_mixer", "gmlp_ti16_224", None),
    Example("mobilevit", "mobilevit_xxs", None),
    Example("pvt_v2", "pvt_v2_b0", None),
    Example("repvit", "repvit_m1", None),
    Example("resnet", "resnet18", None),
    Example("shvit", "shvit_s1", None),
]

PAGE = """# Backbones

This page lists which of timm's models can be made sparse, and which of their MLPs become MoE layers. It is written by
`python tests/support/backbones.py > docs/backbones.md`, and a test keeps it up to date.

```python
model = vmoe.sparsify(timm.create_model("swin_tiny_patch4_window7_224"), vmoe.MoeConfig(layers="last-2", num_experts=8))
```

`vmoe.sparsify` replaces MLPs that work on one token at a time: timm's `Mlp`, `GluMlp`, `SwiGLU`, `ConvMlp` and the
families' own classes with the same function, on (B, N, D), (B, rows, columns, D) and (B, D, rows, columns). It finds
them by a forward pass on the meta device; `MoeConfig.layers` counts them in the order of that pass, from 0. Every
family below is tested: upcycled with renormalised combine weights its logits equal the dense model's, gradients reach
every expert, `vmoe.densify` gives the dense model back, and `vmoe.record_routing` finds the grid of every layer.

GLU MLPs become GLU experts, and experts have the MLP's own norm where it has one. An MLP that begins with a norm keeps
it in front of the router. Not counted are MLPs that see only a class token, mix tokens, or hold batch norms.

| family | example | MLP | MoE layers it can have | notes |
|---|---|---|---|---|
{supported}

Refused. The reason that `sparsify` gives is that the model has

| family | example | reason |
|---|---|---|
{refused}

timm's other convolutional networks (densenet, efficientnet, regnet, vgg, ...) are refused like resnet.
"""


def row(example: Example) -> str:
    """The example's line in the page, from the model of full size on the meta device."""
    with torch.device("meta"):
        model = timm.create_model(example.name, **_full_size(example))
    places, left_out = survey(model)
    if not places:
        reasons = list(dict.fromkeys(left_out.values())) or ["no MLPs that work on one token at a time"]
        return f"| {example.family} | {example.name} | {'; '.join(reasons)} |"
    kinds = ", ".join(dict.fromkeys(_kind(place.mlp) for place in places))
    tokens = [place.tokens for place in places]
    seen = f"{tokens[0]} tokens" if len(set(tokens)) == 1 else f"{max(tokens)} to {min(tokens)} tokens"
    notes = [seen, *(f"not counted: {reason} ({count})" for reason, count in Counter(left_out.values()).items())]
    return f"| {example.family} | {example.name} | {kinds} | {len(places)} | {'; '.join(notes)} |"


def _kind(mlp: nn.Module) -> str:
    is_conv = any(isinstance(layer, nn.Conv2d) for layer in mlp.children())
    return f"`{type(mlp).__name__}`" + (" of 1x1 convolutions" if is_conv else "")


def _full_size(example: Example) -> dict[str, Any]:
    """Surveys the model of full size."""
    options = example.small or {}
    return {"use_clipped_linears": False} if "use_clipped_linears" in options else {}


def page() -> str:
    """The whole page."""
    return PAGE.format(supported="\n".join(map(row, SUPPORTED)), refused="\n".join(map(row, REFUSED)))


if __name__ == "__main__":
    print(page(), end="")
