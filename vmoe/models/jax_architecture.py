"""The architecture of an original V-MoE checkpoint, read from its tensors.

D width; E experts; M members of an ensemble; P slots of an expert for an image; N tokens per image.
"""

import math
import re
from pathlib import Path
from typing import Any

from vmoe.errors import UserError
from vmoe.models.imported import ratio_for
from vmoe.models.jax_checkpoint import Leaf

POSITIONS = "Encoder/posembed_input/pos_embedding"
_MOE_PARTS = ("Moe/Router/dense/kernel", "Moe/Router/mu", "Moe/Mlp/Dense_0/kernel")


class Architecture:
    """The architecture, read from the tensors.

    Raises:
        UserError: A needed tensor is missing, or the tensors describe another kind of model.
    """

    def __init__(self, prefix: str | Path, leaves: dict[str, Leaf]) -> None:
        self.prefix, self.leaves = prefix, leaves
        *patch, self.in_chans, self.width = self._shape("embedding/kernel", 4)
        self.patch_size = tuple(patch)
        self.has_class_token = "cls" in leaves
        _, self.tokens, _ = self._shape(POSITIONS, 3)
        blocks = {int(match[1]) for name in leaves if (match := re.match(r"Encoder/encoderblock_(\d{1,4})/", name))}
        self.depth = len(blocks)
        if blocks != set(range(self.depth)):
            raise UserError(f"{prefix}: has blocks {sorted(blocks)}, which do not go from 0 on without a gap")
        _, self.heads, _ = self._shape("Encoder/encoderblock_0/SelfAttention/query/kernel", 3)
        self.moe_blocks = [i for i in sorted(blocks) if any(f"{self.block(i)}/{part}" in leaves for part in _MOE_PARTS)]
        first = f"{self.block(0)}/{'Moe/' if 0 in self.moe_blocks else ''}Mlp/Dense_0/kernel"
        self.hidden = self._shape(first, 3 if 0 in self.moe_blocks else 2)[-1]
        self.num_experts, self.slots = self._experts()
        self.members = self._members()
        self.pre_logits = self._shape("pre_logits/kernel", 2)[1] if "pre_logits/kernel" in leaves else None
        self.num_classes = self._shape("head/kernel", 2)[1] if "head/kernel" in leaves else 0

    @staticmethod
    def block(index: int) -> str:
        return f"Encoder/encoderblock_{index}"

    def kwargs(self) -> dict[str, Any]:
        """Arguments of the named model."""
        square = self.patch_size[0] == self.patch_size[1]
        return {
            "patch_size": self.patch_size[0] if square else list(self.patch_size),
            "in_chans": self.in_chans,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": ratio_for(self.hidden, self.width),
            "class_token": self.has_class_token,
            "global_pool": "token" if self.has_class_token else "avg",
            **({} if self.pre_logits is None else {"pre_logits": self.pre_logits}),
        }

    def image_size(self, wanted: int | tuple[int, int] | None) -> tuple[int, int]:
        """(rows, columns) in pixels: the wanted size, or the checkpoint's."""
        if wanted is None:
            side = math.isqrt(self.tokens - self.has_class_token)
            if side**2 + self.has_class_token != self.tokens:
                raise UserError(f"{self.prefix}: {POSITIONS} has {self.tokens} tokens, which are no square of patches")
            return side * self.patch_size[0], side * self.patch_size[1]
        size = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
        if len(size) != 2 or any(s < p or s % p for s, p in zip(size, self.patch_size, strict=True)):
            patch = "x".join(map(str, self.patch_size))
            raise UserError(f"img_size={wanted}: must be a multiple of the checkpoint's patches of {patch} pixels")
        return size

    def tokens_of(self, image_size: tuple[int, int]) -> int:
        """N for images of this size."""
        return math.prod(s // p for s, p in zip(image_size, self.patch_size, strict=True)) + self.has_class_token

    def _experts(self) -> tuple[int, int | None]:
        """E, and P for Soft MoE."""
        if not self.moe_blocks:
            return 0, None
        router = f"{self.block(self.moe_blocks[0])}/Moe/Router"
        if f"{router}/mu" in self.leaves:
            return self._shape(f"{router}/mu", 3)[1:]
        if len(self._leaf(f"{router}/dense/kernel").shape) == 3:
            _, members, of_each = self._shape(f"{router}/dense/kernel", 3)
            return members * of_each, None
        return self._shape(f"{router}/dense/kernel", 2)[1], None

    def _members(self) -> int | None:
        """M of an ensemble (E3), from an axis of its routers; None for a single model."""
        if not self.moe_blocks or self.slots is not None:
            return None
        shape = self._leaf(f"{self.block(self.moe_blocks[0])}/Moe/Router/dense/kernel").shape
        return shape[1] if len(shape) == 3 else None

    def _leaf(self, name: str) -> Leaf:
        if name not in self.leaves:
            raise UserError(f"{self.prefix}: lacks {name}; is it a checkpoint of a VisionTransformerMoe?")
        return self.leaves[name]

    def _shape(self, name: str, axes: int) -> tuple[int, ...]:
        shape = self._leaf(name).shape
        if len(shape) != axes:
            raise UserError(f"{self.prefix}: {name} has shape {shape}, which should have {axes} axes")
        return shape
