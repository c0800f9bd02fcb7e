"""A uniform sample of images with their routing, from a stream that is larger than memory.

n sampled images of S x S pixels; P prefix tokens and N positions of a layer's grid; E experts; K choices.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmoe.explain.explorer.maps import LayerMaps

_OF_LAYER = ("gates", "dispatch", "chosen", "dropped", "entropy", "valid")


class ImageSample:
    """Reservoir sampling by random keys: the images with the largest keys stay (Efraimidis & Spirakis 2006).

    Args:
        size: n, the largest number of images.
        seed: Seed of the keys.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = np.empty(0, np.float32)
        self._kept: dict[str, np.ndarray] = {}  # in the order of the stream
        self._seen = 0

    def update(
        self,
        pixels: Tensor,
        labels: Tensor | None,
        probabilities: Tensor,
        layers: dict[str, LayerMaps],
        found: Tensor | None = None,
    ) -> None:
        """Offers a batch.

        Args:
            pixels: (B, 3, S, S) in [0, 1].
            labels: (B,), or (B, C) of 0 and 1 for several classes; None without labels.
            probabilities: (B, C).
            layers: Each layer's maps.
            found: (B, C) bool, the predicted classes; None with one class per image.
        """
        keys = torch.rand(len(pixels), generator=self._generator).numpy()
        places = self._largest(keys)
        if len(self._keys) >= self.size:
            places = places[keys[places] > self._keys.min()]
        if len(places):
            rows = torch.from_numpy(places).to(pixels.device)
            new = _arrays(pixels, labels, probabilities, layers, rows, found) | {"number": self._seen + places}
            every = np.concatenate([self._keys, keys[places]])
            stay = self._largest(every)
            self._keys = every[stay]
            self._kept = {
                name: np.concatenate([self._kept.get(name, values[:0]), values])[stay] for name, values in new.items()
            }
        self._seen += len(pixels)

    def _largest(self, keys: np.ndarray) -> np.ndarray:
        """The indices of the largest keys, in stream order."""
        return np.sort(np.argsort(-keys, kind="stable")[: self.size])

    def stacked(self) -> dict[str, Any]:
        """The sample in the order of the stream, in the page's form.

        Returns:
            "pixels" (n, S, S, 3) uint8; "label" (n,) int64, -1 without a label; "predicted" (n,) int64; both
            (n, C) bool with several classes; "confidence" (n,) float32 of the most probable class; "number" (n,) the
            index in the stream; "layers", for each: "gates" (n, P + N, E) float16, "dispatch" the same or None,
            "chosen" (n, P + N, K) int16, "dropped" (n, P + N, K) bool or None, "entropy" (n, P + N) float16, "valid"
            (n, P + N) bool.
        """
        return with_layers(self._kept)


def with_layers(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A sample as one level of arrays, "layers/0/gates" and so on -> with its layers as a list."""
    images: dict[str, Any] = {name: values for name, values in arrays.items() if "/" not in name}
    count = 1 + max(int(name.split("/")[1]) for name in arrays if "/" in name)
    images["layers"] = [{name: arrays.get(f"layers/{index}/{name}") for name in _OF_LAYER} for index in range(count)]
    return images


def without_layers(images: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `with_layers`, without entries that are None."""
    flat = {name: value for name, value in images.items() if name != "layers"}
    for index, layer in enumerate(images["layers"]):
        flat |= {f"layers/{index}/{name}": value for name, value in layer.items() if value is not None}
    return flat


def _arrays(
    pixels: Tensor,
    labels: Tensor | None,
    probabilities: Tensor,
    layers: dict[str, LayerMaps],
    rows: Tensor,
    found: Tensor | None,
) -> dict[str, np.ndarray]:
    """The kept arrays of the images in some rows of a batch."""
    confidence, predicted = probabilities[rows].max(-1)
    if found is not None:
        predicted = found[rows]
    if labels is not None and labels.dim() == 2:
        labels = labels > 0
    kept = {
        "pixels": (pixels[rows] * 255).round().byte().permute(0, 2, 3, 1),
        "label": torch.full_like(rows, -1) if labels is None else labels[rows],
        "predicted": predicted,
        "confidence": confidence.float(),
    }
    for index, maps in enumerate(layers.values()):
        parts = (
            (maps.gates, torch.float16), (maps.dispatch, torch.float16), (maps.choices, torch.int16),
            (maps.dropped, torch.bool), (maps.entropy, torch.float16), (maps.valid, torch.bool),
        )  # fmt: skip
        for name, (values, dtype) in zip(_OF_LAYER, parts, strict=True):
            if values is not None:
                kept[f"layers/{index}/{name}"] = values[rows.to(values.device)].to(dtype)
    return {name: values.cpu().numpy() for name, values in kept.items()}
