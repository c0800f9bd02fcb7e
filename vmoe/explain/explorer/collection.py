"""One pass over the images with all counts of the explorer. Memory does not grow with the number of images.

B images; E experts; K choices per token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vmoe.errors import UserError
from vmoe.explain.explorer.association import Draws, GridCodes, LayerAssociation
from vmoe.explain.explorer.counts import Flow, LayerCounts, resized
from vmoe.explain.explorer.features import PatchFeatures, patch_features
from vmoe.explain.explorer.maps import LayerMaps, layer_maps
from vmoe.explain.explorer.sample import ImageSample
from vmoe.explain.explorer.subject import Subject
from vmoe.moe import moe_layers
from vmoe.routing import record_routing

Grid = tuple[int, int]
BLOCK = 256  # number of images that share a permutation


@dataclass(frozen=True)
class LayerFacts:
    """The facts about a layer that do not depend on images."""

    name: str
    router: str
    route: str
    num_experts: int
    top_k: int | None  # None for expert choice and Soft MoE
    grid: Grid
    prefix: int
    prefix_names: tuple[str, ...]


@dataclass(frozen=True)
class LayerCollection:
    """The counts of one layer."""

    facts: LayerFacts
    counts: LayerCounts
    association: LayerAssociation


@dataclass(frozen=True)
class Collection:
    """The counts of one pass."""

    images: int  # number of images
    correct: int | None  # number of correctly classified images; None without labels
    layers: list[LayerCollection]  # in forward order; empty for a dense model
    flows: list[Flow]  # from each layer to the next
    sample: dict[str, Any] | None  # some of the images, see `ImageSample.stacked`; None for a dense model


@torch.inference_mode()
def collect(
    subject: Subject,
    batches: Iterable,
    *,
    patch_kinds: int = 0,
    replicates: int = 100,
    sample: int = 300,
    seed: int = 0,
) -> Collection:
    """Runs a model over all batches and counts.

    Args:
        subject: The model.
        batches: Batches (images (B, 3, H, W), labels (B,), (B, C) of 0 and 1, or None, ...), normalised for the model
            and in random order. `patch_labels` in a batch are a feature too, if `patch_kinds` is given.
        patch_kinds: Number of patch labels.
        replicates: R, for bootstrap and null.
        sample: Number of images to keep.
        seed: Seed of replicates and sample.

    Raises:
        UserError: There is no image, images differ in size, or a logit is not finite.
    """
    device = subject.device
    tally = _Tally(subject, patch_kinds, replicates, ImageSample(sample, seed), seed)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    images, labels = 0, None
    for batch in batches:
        x = on_device(batch, device)
        labels = None if batch[1] is None else batch[1].to(device, non_blocking=True)
        logits, maps = routed(subject.model, x)
        if labels is not None:
            subject.require_labels(labels)
            correct += subject.is_right(logits, labels).sum()
        finite &= logits.isfinite().all()
        images += len(x)
        if maps:
            known = getattr(batch, "patch_labels", None) if patch_kinds else None
            tally.update(subject.pixels(x), labels, logits, maps, None if known is None else known.to(device))
    if images == 0:
        raise UserError("data: this split holds no images; choose another split or another data set")
    if not finite:
        raise UserError("CKPT: the model gives logits that are not finite; its training probably diverged")
    tally.finish()
    kept = tally.sample.stacked() if tally.layers else None
    return Collection(images, None if labels is None else int(correct), tally.layers, tally.flows, kept)


def on_device(batch: Sequence, device: torch.device) -> Tensor:
    """The images of a batch, (B, 3, H, W).

    Raises:
        UserError: They are something else, such as a NaFlex batch of padded patches.
    """
    images = batch[0]
    if not (isinstance(images, Tensor) and images.dim() == 4):
        raise UserError(
            "data: the explorer needs images of one size, (B, 3, H, W), not the padded patches of images of several "
            "sizes (NaFlex); resize the images: a NaFlex model takes them as well"
        )
    return images.to(device, non_blocking=True)


def routed(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, LayerMaps]]:
    """The logits of a batch and each MoE layer's maps, in forward order. A dense model has no maps."""
    layers = dict(moe_layers(model))
    if not layers:
        return model(images), {}
    with record_routing(model) as trace:
        logits = model(images)
    parts = {name: part.as_tokens() for name, part in trace.layers.items()}
    return logits, {name: layer_maps(part, layers[name].config.router) for name, part in parts.items()}


class _Tally:
    """All counts. Associations wait for a block of images, so that each image has a partner."""

    def __init__(
        self,
        subject: Subject,
        patch_kinds: int,
        replicates: int,
        sample: ImageSample,
        seed: int,
    ) -> None:
        self._configs = {name: layer.config for name, layer in moe_layers(subject.model)}
        self._subject = subject
        self._num_classes, self._patch_kinds = len(subject.class_names), patch_kinds
        self._replicates = replicates
        self._generator = torch.Generator(subject.device).manual_seed(seed)
        self.sample = sample
        self.layers: list[LayerCollection] = []
        self.flows: list[Flow] = []
        self._grids: dict[Grid, GridCodes] = {}
        self._waiting: list[tuple[Tensor | None, dict[Grid, PatchFeatures], Tensor | None, list[Tensor]]] = []

    def update(
        self,
        pixels: Tensor,
        labels: Tensor | None,
        logits: Tensor,
        maps: dict[str, LayerMaps],
        known: Tensor | None,
    ) -> None:
        if not self.layers:
            self._begin(maps, 0 if labels is None else self._num_classes)
        self._check_sizes(maps)
        features = {grid: patch_features(pixels, grid) for grid in self._grids}
        every = list(maps.values())
        for layer, part in zip(self.layers, every, strict=True):
            layer.counts.update(part, features[part.grid].colour)
        for flow, before, after in zip(self.flows, every, every[1:], strict=False):
            flow.update(before, after)
        several = self._subject.multi_label if labels is None else labels.dim() == 2
        if several:
            probabilities, found = logits.float().sigmoid(), self._subject.found(logits)
        else:
            probabilities, found = logits.float().softmax(-1), None
        self.sample.update(pixels, labels, probabilities, maps, found)
        self._waiting.append((labels, features, known, [part.patch_choices for part in every]))
        if sum(len(choices[0]) for *_, choices in self._waiting) >= BLOCK:
            self.finish()

    def finish(self) -> None:
        """Counts the waiting images."""
        if not self._waiting:
            return
        labels, features, known, choices = zip(*self._waiting, strict=True)
        self._waiting = []
        labels = None if labels[0] is None else torch.cat(labels)
        draws = Draws.of(self._replicates, sum(len(each[0]) for each in choices), self._generator)
        codes, patches = {}, {}
        for grid, encoder in self._grids.items():
            parts = [each[grid] for each in features]
            codes[grid] = encoder.encode(PatchFeatures(*(torch.cat(values) for values in zip(*parts, strict=True))))
            patches[grid] = None
            if known[0] is not None:
                of_patches = torch.cat(known)
                patches[grid] = resized(of_patches.flatten(1), tuple(of_patches.shape[1:]), grid).int()
        for layer, parts in zip(self.layers, zip(*choices, strict=True), strict=True):
            grid = layer.facts.grid
            layer.association.update(torch.cat(parts), labels, codes[grid], patches[grid], draws)

    def _check_sizes(self, maps: dict[str, LayerMaps]) -> None:
        """Checks that all images have the same grid, since tables have one position per patch of a grid."""
        for layer, part in zip(self.layers, maps.values(), strict=True):
            if part.grid != layer.facts.grid:
                raise UserError(
                    f"data: images differ in size: {layer.facts.name} had {layer.facts.grid} patches, then "
                    f"{part.grid}; resize all images to one size"
                )

    def _begin(self, maps: dict[str, LayerMaps], classes: int) -> None:
        """Makes the tables. The first batch gives their sizes."""
        for name, part in maps.items():
            config, device = self._configs[name], part.gates.device
            codes = self._grids.setdefault(part.grid, GridCodes(part.grid))
            top_k = None if config.fills_slots else config.top_k
            self.layers.append(
                LayerCollection(
                    LayerFacts(
                        name,
                        config.router,
                        config.route,
                        config.num_experts,
                        top_k,
                        part.grid,
                        part.prefix,
                        part.prefix_names,
                    ),
                    LayerCounts(part),
                    LayerAssociation(codes, config.num_experts, classes, self._patch_kinds, self._replicates, device),
                )
            )
        every = list(maps.values())
        self.flows = [Flow(before, after) for before, after in pairwise(every)]
