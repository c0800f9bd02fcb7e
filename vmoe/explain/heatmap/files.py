"""Writes the routing maps of many images: figures as PNG, a page with all figures, and their numbers as index.json."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from vmoe.checkpoints import TrainedModel
from vmoe.checkpoints.prediction import names_above
from vmoe.data import load_image
from vmoe.data.channels import displayed_line
from vmoe.data.image_files import none_readable
from vmoe.errors import UserError
from vmoe.evaluation.engine import eval_capacity_factor, named_factor, restored_settings, set_capacity
from vmoe.explain.heatmap.figure import PANEL, draw_layer, draw_overview
from vmoe.explain.heatmap.page import heatmap_page
from vmoe.explain.heatmap.routed import (
    RoutedImage,
    describe_layer,
    output_names,
    require_patch_routing,
    route_image,
    select_layers,
)
from vmoe.files import write_json, write_text
from vmoe.moe import moe_layers
from vmoe.text import counted, readable

_NAMED_CLASSES = 5


def write_heatmaps(
    checkpoint: TrainedModel,
    images: Sequence[str | Path],
    out: str | Path,
    layers: Sequence[str] | None = None,
    capacity_factor: float | None = None,
    command: str | None = None,
    versions: dict[str, str] | None = None,
    track: Callable[[Iterable, str], Iterable] = lambda images, description: images,
) -> dict:
    """Writes one figure per image, NAME-overview.png, which sets its MoE layers side by side.

    index.html shows all figures, and index.json holds the numbers.

    With `layers` each of them also has its own figure, NAME-LAYER.png, and only these are in the overview. A single
    layer needs no overview. NAME is the image file's stem, numbered if several images share it. Files of the same names
    are replaced.

    Args:
        checkpoint: A V-MoE.
        images: Image files.
        out: The folder, created when missing.
        layers: MoE layers with their own figures, by name or number of the block; "all" for all.
        capacity_factor: Capacity factor of the routing; inf drops nothing, None keeps the checkpoint's own.
        command: Shown at the bottom of the pages and in the index.
        versions: Versions of packages, by name; shown there too.
        track: Wraps the images in a progress bar.

    Returns:
        The content of `index.json`; `damaged` has a line on each file that could not be read.

    Raises:
        UserError: The model is dense, a layer does not exist, no image can be read, or the capacity is impossible.
    """
    model, out, images = checkpoint.model, Path(out), [Path(image) for image in images]
    require_patch_routing(model)
    shown = select_layers(model, layers)
    own_figures = shown if layers or len(shown) == 1 else []
    about = [f"checkpoint {checkpoint.path}", f"epoch {checkpoint.epoch}"]
    about += [] if checkpoint.channels is None else [f"picture: {displayed_line(checkpoint.channels)}"]
    about += [f"{package} {version}" for package, version in (versions or {}).items()]
    footer = [" · ".join(about), *([f"command: {command}"] if command else [])]
    with restored_settings(model), named_factor(capacity_factor):
        if capacity_factor is not None:
            set_capacity(model, capacity_factor)
        drawn, damaged = [], []
        for path, name in track(list(zip(images, output_names(images), strict=True)), "drawing"):
            try:
                pixels = load_image(path, checkpoint.bit_depth, checkpoint.channels)
            except UserError as error:
                damaged.append(str(error))
            else:
                drawn.append(_write_image(checkpoint, path, pixels, name, shown, own_figures, out, footer))
        if not drawn:
            raise none_readable(damaged)
        index = {
            "checkpoint": str(checkpoint.path),
            "epoch": checkpoint.epoch,
            "versions": versions,
            "command": command,
            "image_size": checkpoint.image_size,
            "capacity_factor": eval_capacity_factor(model),
            "images": drawn,
            "damaged": damaged,
        }
    write_json(out / "index.json", index)
    write_text(out / "index.html", heatmap_page(index))
    return index


def _write_image(
    checkpoint: TrainedModel,
    path: Path,
    pixels: np.ndarray,
    name: str,
    layers: list[str],
    own_figures: list[str],
    out: Path,
    footer: list[str],
) -> dict:
    prepared = checkpoint.image_size, checkpoint.mean, checkpoint.std
    image = route_image(checkpoint.model, pixels, *prepared, PANEL, checkpoint.crop)
    predicted = f"{_class(checkpoint, image.predicted)} ({image.probabilities.max():.0%})"
    of_several = {}
    if checkpoint.multi_label:
        (labels,) = names_above(image.probabilities[None], checkpoint.class_names, checkpoint.thresholds)
        of_several, predicted = {"labels": labels}, ", ".join(labels) or "no class"
    pages = []
    for layer in own_figures:
        pages.append(f"{name}-{layer}.png")
        title = f"Which expert takes which patch of {path.name}"
        facts = f"predicted: {predicted} · {layer}: {_layer_line(checkpoint.model, image, layer)}"
        draw_layer(image, layer, title, facts, footer).save(out / pages[-1])
    if len(layers) > 1:
        pages.append(f"{name}-overview.png")
        title = f"Which expert takes which patch of {path.name}, layer by layer"
        facts = f"predicted: {predicted} · first choices in {len(layers)} MoE layers · {layers[0]}: "
        facts += _layer_line(checkpoint.model, image, layers[0])
        draw_overview(image, layers, title, facts, footer).save(out / pages[-1])
    best = np.argsort(-image.probabilities, kind="stable")[:_NAMED_CLASSES]
    classes = [
        {"class": _class(checkpoint, i), "index": int(i), "probability": float(image.probabilities[i])} for i in best
    ]
    return {
        "file": readable(str(path)),
        "size": list(pixels.shape[1::-1]),
        "prediction": classes[0],
        "most_probable": classes,
        **of_several,
        "pages": pages,
        "layers": {layer: describe_layer(image.layers[layer]) for layer in layers},
    }


def _class(checkpoint: TrainedModel, index: int) -> str:
    return checkpoint.class_names[int(index)]


def _layer_line(model: nn.Module, image: RoutedImage, layer: str) -> str:
    """A line on a layer and its number of tokens."""
    rows, columns = image.layers[layer].grid
    moe = dict(moe_layers(model))[layer].config
    if moe.router == "soft":
        way = "Soft MoE: each adds to every patch"
    elif moe.router == "expert_choice":
        way = "each takes its best patches"
    else:
        way = f"each patch goes to {moe.top_k}"
    others = " and the " + ", ".join(names) if (names := image.layers[layer].prefix_names) else ""
    return f"{counted(moe.num_experts, 'expert')}, {way} · {rows} x {columns} = {rows * columns} patches{others}"
