"""The architecture of a Swin-MoE checkpoint, read from its tensors.

D width; E experts; H hidden width of an expert; C width of a token in a stage.
"""

import math
import re
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vmoe.errors import UserError
from vmoe.models.imported import ratio_for
from vmoe.models.swin_files import EXPERTS, SwinFiles

GATE = ".mlp._moe_layer.gates.0."
_BLOCK = re.compile(r"layers\.(\d{1,3})\.blocks\.(\d{1,3})\.")


class Slices(NamedTuple):
    """The distribution of a layer's experts over the files of the ranks.

    Attributes:
        experts: Number of experts in a file, whole ones or a slice of one.
        per_expert: Number of files per expert; each has an equal part of its hidden width.
    """

    experts: int
    per_expert: int


class SwinArchitecture:
    """The architecture, read from the tensors.

    Attributes:
        depths: Number of blocks of each stage.
        windows: Side of each stage's windows in tokens, at the checkpoint's image size.
        moe_blocks: (stage, block) of each MoE layer.
        router: "token_choice" or "cosine".
        num_experts: E; 0 for a dense model.
        slices: The slices of every MoE layer; None for a dense model.

    Raises:
        UserError: A needed tensor is missing, files of ranks are missing, or the tensors describe another kind of
            model.
    """

    def __init__(self, files: SwinFiles) -> None:
        self.path, self.tensors = files.path, files.tensors
        self.width, self.in_chans, self.patch_size, _ = self._shape("patch_embed.proj.weight", 4)
        self.depths = self._depths()
        stages = range(len(self.depths))
        self.windows = [math.isqrt(self._attention(i, "relative_position_index", 2)[0]) for i in stages]
        self.num_heads = [self._attention(i, "cpb_mlp.2.weight", 2)[0] for i in stages]
        self.num_classes = self._shape("head.weight", 2)[0] if "head.weight" in self.tensors else 0
        blocks = [(i, j) for i in stages for j in range(self.depths[i])]
        self.moe_blocks = [each for each in blocks if any(name.startswith(_name(each) + GATE) for name in self.tensors)]
        self.router: Literal["token_choice", "cosine"] = "token_choice"
        self.num_experts, self.cosine_dim = 0, 0
        self.slices: Slices | None = None
        experts = files.experts(0)
        self.mlp_ratio = self._mlp_ratio(blocks, experts, len(files.ranks))
        if self.moe_blocks:
            self._read_routers()
            self.slices = self._read_slices(experts, len(files.ranks))

    def kwargs(self, window_size: int) -> dict[str, Any]:
        """Arguments of timm's model."""
        return {
            "patch_size": self.patch_size,
            "in_chans": self.in_chans,
            "embed_dim": self.width,
            "depths": self.depths,
            "num_heads": self.num_heads,
            "window_size": window_size,
            "mlp_ratio": self.mlp_ratio,
        }

    def image_size(self) -> int:
        """Side in pixels of the checkpoint's images, from its masks of shifted windows.

        Raises:
            UserError: The stages contradict each other, for example without the masks.
        """
        side = None
        for stage, depth in enumerate(self.depths):
            if depth > 1:
                masks = self.tensors.get(f"layers.{stage}.blocks.1.attn_mask")
                tokens = self.windows[stage] * (1 if masks is None else math.isqrt(masks.shape[0]))
                side = tokens * 2**stage
                break
        if side is None or any(self.windows[i] != min(max(self.windows), side >> i) for i in range(len(self.depths))):
            raise UserError(
                f"{self.path}: does not record the size of its images; give img_size=PIXELS and window_size=TOKENS"
            )
        return side * self.patch_size

    def windows_at(self, image_size: int, window_size: int) -> list[int]:
        """Side of each stage's windows in tokens for images of another size.

        Raises:
            UserError: Windows do not divide a stage evenly, which the original needs.
        """
        if image_size < 1 or image_size % (self.patch_size << (len(self.depths) - 1)):
            least = self.patch_size << (len(self.depths) - 1)
            raise UserError(
                f"img_size={image_size}: must be a multiple of {least}, the pixels of a token of the last stage"
            )
        if window_size < 1:
            raise UserError(f"window_size={window_size}: must be at least 1")
        sides = [(image_size // self.patch_size) >> stage for stage in range(len(self.depths))]
        windows = [min(side, window_size) for side in sides]
        for side, window in zip(sides, windows, strict=True):
            if side % window:
                raise UserError(
                    f"img_size={image_size}: a stage of {side}x{side} tokens is not filled by windows of {window}; "
                    "use another size of images or windows"
                )
        return windows

    def position_bias(self, attention: str, stage: int, window: int) -> Tensor:
        """The bias of every offset in a window, ((2 window - 1)^2, heads), from the checkpoint's own small network.

        Offsets are scaled by the windows of training, so the network also works for other windows.
        """
        own, largest = self.windows[stage], 1.0
        table = self.tensors.get(f"{attention}.relative_coords_table")
        if table is not None and own > 1:
            largest = float(table.max())
            if not 0 < largest < 10:
                raise UserError(
                    f"{self.path}: {attention}.relative_coords_table is no table of offsets; is it damaged?"
                )
        extent = max(round(8 * (own - 1) / (8**largest - 1)), 1) if own > 1 else max(window - 1, 1)
        if table is None or window != own or own == 1:
            offset = torch.arange(1 - window, window, dtype=torch.float32) / extent * 8
            table = torch.stack(torch.meshgrid(offset, offset, indexing="ij"), -1)
            table = table.sign() * table.abs().add(1).log2() / 3  # log2 / 3 is the logarithm to base 8
        weight1, bias1, weight2 = (
            self._tensor(f"{attention}.cpb_mlp.{each}").float() for each in ("0.weight", "0.bias", "2.weight")
        )
        hidden = torch.nn.functional.linear(table.float().reshape(-1, 2), weight1, bias1).relu()
        return torch.nn.functional.linear(hidden, weight2)

    def _depths(self) -> list[int]:
        blocks = {(int(match[1]), int(match[2])) for name in self.tensors if (match := _BLOCK.match(name))}
        depths = [sum(stage == i for stage, _ in blocks) for i in range(max((i for i, _ in blocks), default=-1) + 1)]
        if not blocks or blocks != {(i, j) for i, depth in enumerate(depths) for j in range(depth)}:
            raise UserError(f"{self.path}: its stages and blocks have gaps, or it has none; is it a Swin-MoE?")
        return depths

    def _mlp_ratio(self, blocks: list[tuple[int, int]], experts: dict[str, Tensor], ranks: int) -> float:
        dense = next((each for each in blocks if each not in self.moe_blocks), None)
        if dense is not None:
            hidden, width = self._shape(f"{_name(dense)}.mlp.fc1.weight", 2)
            return ratio_for(hidden, width)
        shape = experts[f"{_name(blocks[0])}{EXPERTS}batched_fc1_w"].shape
        num_experts = self._router_of(blocks[0])[1]
        return ratio_for(shape[1] * max(ranks // num_experts, 1), shape[2])

    def _router_of(self, block: tuple[int, int]) -> tuple[Literal["token_choice", "cosine"], int, int]:
        gate = _name(block) + GATE
        if f"{gate}sim_matrix" in self.tensors:
            cosine_dim, num_experts = self._shape(f"{gate}sim_matrix", 2)
            return "cosine", num_experts, cosine_dim
        return "token_choice", self._shape(f"{gate}wg.weight", 2)[0], 0

    def _read_routers(self) -> None:
        routers = [self._router_of(block) for block in self.moe_blocks]
        self.router, self.num_experts, self.cosine_dim = routers[0]
        if len(set(routers)) > 1:
            raise UserError(f"{self.path}: its MoE layers have different routers or numbers of experts")

    def _read_slices(self, experts: dict[str, Tensor], ranks: int) -> Slices:
        """The slices of the first MoE layer. The importer compares the shapes of all layers."""
        name = f"{_name(self.moe_blocks[0])}{EXPERTS}batched_fc1_w"
        if name not in experts or experts[name].dim() != 3:
            raise UserError(f"{self.path}: lacks {name} of three axes; are its experts in files of ranks?")
        count, part, width = experts[name].shape
        hidden = int(width * self.mlp_ratio)
        if min(count, part) < 1 or self.num_experts % count or hidden % part:
            raise UserError(
                f"{self.path}: {name} has shape {tuple(experts[name].shape)}, which are no parts of "
                f"{self.num_experts} experts of hidden width {hidden}"
            )
        needed = (self.num_experts // count) * (hidden // part)
        if ranks != needed:
            advice = f"copy those of rank {ranks} to {needed - 1} too" if ranks < needed else "others are among them"
            raise UserError(f"{self.path}: its experts are in {needed} files of ranks, but {ranks} are there; {advice}")
        return Slices(count, hidden // part)

    def _attention(self, stage: int, name: str, axes: int) -> tuple[int, ...]:
        return self._shape(f"layers.{stage}.blocks.0.attn.{name}", axes)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"{self.path}: lacks {name}; is it a checkpoint of Swin-MoE?")
        return self.tensors[name]

    def _shape(self, name: str, axes: int) -> tuple[int, ...]:
        shape = tuple(self._tensor(name).shape)
        if len(shape) != axes or 0 in shape:
            raise UserError(f"{self.path}: {name} has shape {shape}, which should have {axes} axes")
        return shape


def _name(block: tuple[int, int]) -> str:
    return f"layers.{block[0]}.blocks.{block[1]}"
