"""A uniform sample of images with all that is known of them, kept while more stream by than memory holds.

n sampled images of S x S pixels; P prefix tokens and N places of a layer's grid; E experts; K choices.
"""

import heapq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmoe.explain.explorer.maps import LayerMaps


class ImageSample:
    """Reservoir sampling by random keys: the images with the largest stay (Efraimidis & Spirakis 2006).

    Args:
        size: n, how many images at most.
        seed: Of the keys.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: list[tuple[float, int, dict[str, Any]]] = []  # a heap, smallest key first
        self._seen = 0

    def update(
        self, pixels: Tensor, labels: Tensor | None, probabilities: Tensor, layers: dict[str, LayerMaps]
    ) -> None:
        """Offers a batch: pixels (B, 3, S, S) in [0, 1], labels (B,), probabilities (B, C) and each layer's maps."""
        keys = torch.rand(len(pixels), generator=self._generator).tolist()
        smallest = self._kept[0][0] if len(self._kept) >= self.size else -1.0
        wanted = [index for index, key in enumerate(keys) if key > smallest]
        wanted = sorted(wanted, key=keys.__getitem__, reverse=True)[: self.size]
        if wanted:
            rows = torch.tensor(wanted, device=pixels.device)
            known = torch.full_like(rows, -1) if labels is None else labels[rows]
            parts = _records(pixels[rows], known, probabilities[rows], layers, rows)
            for index, record in zip(wanted, parts, strict=True):
                entry = (keys[index], self._seen + index, record)
                if len(self._kept) < self.size:
                    heapq.heappush(self._kept, entry)
                else:
                    heapq.heappushpop(self._kept, entry)
        self._seen += len(pixels)

    def stacked(self) -> dict[str, Any]:
        """The sample in the order in which the images came, as the page takes it.

        Returns:
            "pixels" (n, S, S, 3) uint8; "label" (n,) int64, -1 where there is none; "predicted" (n,) int64;
            "confidence" (n,) float32; "number" (n,) the place in the stream; "layers", for each: "gates"
            (n, P + N, E) float16, "dispatch" the same or None, "chosen" (n, P + N, K) int16, "dropped"
            (n, P + N, K) bool or None, "entropy" (n, P + N) float16, "valid" (n, P + N) bool.
        """
        records = [(number, record) for _, number, record in sorted(self._kept, key=lambda entry: entry[1])]
        images = {
            name: np.stack([record[name] for _, record in records])
            for name in ("pixels", "label", "predicted", "confidence")
        }
        images["number"] = np.array([number for number, _ in records])
        images["layers"] = []
        for layer in range(len(records[0][1]["layers"])):
            parts = [record["layers"][layer] for _, record in records]
            images["layers"].append(
                {
                    name: None if parts[0][name] is None else np.stack([part[name] for part in parts])
                    for name in parts[0]
                }
            )
        return images


def _records(
    pixels: Tensor, labels: Tensor, probabilities: Tensor, layers: dict[str, LayerMaps], rows: Tensor
) -> list[dict[str, Any]]:
    confidence, predicted = probabilities.max(-1)
    columns: dict[str, Any] = {
        "pixels": (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy(),
        "label": labels.cpu().numpy(),
        "predicted": predicted.cpu().numpy(),
        "confidence": confidence.float().cpu().numpy(),
    }
    of_layers = [_layer_record(maps, rows) for maps in layers.values()]
    records = []
    for index in range(len(rows)):
        record = {name: values[index] for name, values in columns.items()}
        record["layers"] = [
            {name: None if values is None else values[index] for name, values in layer.items()} for layer in of_layers
        ]
        records.append(record)
    return records


def _layer_record(maps: LayerMaps, rows: Tensor) -> dict[str, np.ndarray | None]:
    def taken(values: Tensor | None, dtype: torch.dtype) -> np.ndarray | None:
        return None if values is None else values[rows.to(values.device)].to(dtype).cpu().numpy()

    return {
        "gates": taken(maps.gates, torch.float16),
        "dispatch": taken(maps.dispatch, torch.float16),
        "chosen": taken(maps.choices, torch.int16),
        "dropped": taken(maps.dropped, torch.bool),
        "entropy": taken(maps.entropy, torch.float16),
        "valid": taken(maps.valid, torch.bool),
    }
