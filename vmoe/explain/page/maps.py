"""Packs the routing of the sampled images for the page.

n images of N tokens (prefix tokens first, then patches row by row); E experts. `top` experts per token are kept: its
choices, best first, then those with the largest other gates.
"""

from typing import Any

import numpy as np

from vmoe.explain.page.packing import pack, pack_integers

_FEW_IMAGES = 100  # down to this number of images, reduce gates per patch first
_FEW_GATES = 4


def maps_that_fit(layers: list[dict], images: list[dict], count: int, budget: int) -> tuple[int, list[int]]:
    """The number of images, and of gates per token in each layer, that fit into `budget` characters.

    Args:
        layers: The report's layers.
        images: Their gates and choices.
        count: The number of images.
        budget: Characters of base64.
    """
    most = max(layer["num_experts"] for layer in layers)
    limits = sorted({most, *(limit for limit in (32, 16, 8, _FEW_GATES) if limit < most)}, reverse=True)
    for limit in limits:
        tops = [_top(layer, limit) for layer in layers]
        an_image = sum(map(_characters, images, layers, tops))
        fitting = min(count, int(budget // an_image))
        if fitting >= min(count, _FEW_IMAGES):
            break
    return fitting, tops


def _top(layer: dict, limit: int) -> int:
    return min(layer["num_experts"], max(limit, (layer["top_k"] or 1) + 1))


def _characters(maps: dict, layer: dict, top: int) -> float:
    """The characters of one image in a layer."""
    sides = 1 if maps.get("dispatch") is None else 2
    a_gate = 2 if layer["num_experts"] <= 256 else 3
    return maps["gates"].shape[1] * (sides * top * a_gate + 3) * 4 / 3 + 1


def pack_layer(layer: dict, maps: dict, top: int, count: int) -> dict[str, Any]:
    """Packs one layer's routing of the first `count` images."""
    names = ("gates", "dispatch", "chosen", "dropped", "entropy", "valid")
    gates, dispatch, chosen, dropped, entropy, valid = (
        None if maps.get(name) is None else np.asarray(maps[name][:count]) for name in names
    )
    if valid is not None:
        gates = np.where(valid[..., None], gates, 0)
    if layer["kind"] == "slots":  # with expert choice a token that no expert took counts as dropped
        chosen, dropped = None, gates.astype(np.float32).sum(-1, keepdims=True) == 0
    if valid is not None:
        dropped = dropped & valid[..., None]
    return {
        "chosen": 0 if chosen is None else chosen.shape[-1],
        "weights": _largest_gates(gates, chosen, top),
        "dispatch": None if dispatch is None else _largest_gates(dispatch, None, top),
        # bit k: choice k was dropped; only the first 8 choices fit
        "dropped": pack_integers(np.packbits(dropped[..., :8], axis=-1, bitorder="little")[..., 0], 8),
        "entropy": pack(entropy, 8),
    }


def _largest_gates(gates: np.ndarray, chosen: np.ndarray | None, top: int) -> dict[str, Any]:
    """The choices of each token, then its other experts by gate: (n, N, top) experts and their gates."""
    gates = gates.astype(np.float32)
    rank = gates.copy()
    for choice in range(0 if chosen is None else chosen.shape[-1])[::-1]:
        expert = chosen[..., choice, None].astype(np.int64)
        boost = np.nanmax(gates, initial=1.0) + chosen.shape[-1] - choice
        own = np.take_along_axis(gates, np.maximum(expert, 0), axis=-1)
        np.put_along_axis(rank, np.maximum(expert, 0), np.where(expert < 0, own, boost), axis=-1)  # -1: no choice
    experts = np.argsort(-rank, axis=-1, kind="stable")[..., :top]
    return {
        "experts": pack_integers(experts, 8 if gates.shape[-1] <= 256 else 16),
        "gates": pack(np.take_along_axis(gates, experts, axis=-1), 8),
    }
