"""Passes a block's attention mask to its MoE layer as a token mask, for NaFlex models with padded tokens.

B images of N tokens, some of them padding.
"""

import inspect

import torch
from torch import Tensor, nn

from vmoe.moe import MoeMlp
from vmoe.moe.mlps import class_key

# The families, by timm's file, in which attention masks only mark padding.
PADDED_FAMILIES = ("naflexvit.", "gemma4_vit.")


class TokenMask:
    """Reads the attention mask of `block`'s call, and passes it to the MoE layer inside it.

    Padded tokens then take no capacity, have no loss and are not counted.
    """

    def __init__(self, block: nn.Module, layer: MoeMlp) -> None:
        self.position = list(inspect.signature(block.forward).parameters).index("attn_mask")
        self.mask: Tensor | None = None
        block.register_forward_pre_hook(self.read, with_kwargs=True)
        layer.register_forward_pre_hook(self.give, with_kwargs=True)

    def read(self, block: nn.Module, inputs: tuple, named: dict) -> None:
        """Runs as a hook before the block."""
        mask = inputs[self.position] if len(inputs) > self.position else named.get("attn_mask")
        self.mask = None if mask is None else real_tokens(mask)

    def give(self, layer: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        """Runs as a hook before the layer."""
        return inputs, {**named, "token_mask": self.mask}


def add_mask_hooks(model: nn.Module, layers: dict[str, MoeMlp]) -> None:
    """Adds hooks that give MoE layers their token masks, in models for padded images. Other models do not change."""
    padded = [name for name, module in model.named_modules() if class_key(module).startswith(PADDED_FAMILIES)]
    for name, layer in layers.items():
        if any(name.startswith(f"{owner}." if owner else "") for owner in padded):
            TokenMask(model.get_submodule(name.rpartition(".")[0]), layer)


def remove_masks(model: nn.Module) -> None:
    """Undoes `add_mask_hooks` in blocks without an MoE layer."""
    for block in model.modules():
        hooks = block._forward_pre_hooks
        if not any(isinstance(child, MoeMlp) for child in block.children()):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), TokenMask)]:
                del hooks[key]
                block._forward_pre_hooks_with_kwargs.pop(key, None)


def real_tokens(attn_mask: Tensor) -> Tensor:
    """(B, 1, N or 1, N) attention mask, additive or bool -> (B, N) bool, True for real tokens.

    A real token may attend to itself; padding may not.
    """
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > torch.finfo(attn_mask.dtype).min
    if allowed.shape[-2] == 1:
        return allowed[:, 0, 0]
    return allowed[:, 0].diagonal(dim1=-2, dim2=-1)
