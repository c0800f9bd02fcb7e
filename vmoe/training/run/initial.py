"""A run's initial weights: random, or from another checkpoint (upcycled, sparse as they are, or averaged to dense)."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from timm.models import adapt_input_conv
from torch import Tensor, nn

from vmoe.checkpoints import TrainedModel, build_model, load_checkpoint, read_foreign_weights, timm_arguments
from vmoe.checkpoints.source import local_path
from vmoe.classes import known_outputs, only_numbers
from vmoe.errors import UserError
from vmoe.models import densify, sparsify
from vmoe.models.freezing import classifier_names
from vmoe.models.npz_weights import load_npz_weights
from vmoe.models.registry import fitted_weights
from vmoe.models.released import is_released
from vmoe.models.surgery import set_moe_drop_path
from vmoe.moe import MoeConfig, moe_layers
from vmoe.sizes import ImageSize, height_and_width
from vmoe.training.config import TrainConfig


def initial_model(
    config: TrainConfig, class_names: list[str], image_size: ImageSize, log: Callable[[str], object] = lambda line: None
) -> nn.Module:
    """The model of a run, with the weights of `config.init_from`: "pretrained", or a file of ours, timm's or an .npz.

    A name or an address may stand for the file: see `local_path`.

    "pretrained" takes timm's weights of the model and downloads them if needed. An .npz file is one of the original
    code. If the run has MoE layers, a dense checkpoint is upcycled: every routed expert starts as the MLP it replaces
    (https://arxiv.org/abs/2212.05055), and the router is random. A sparse checkpoint is used as it is; for a dense run
    its experts are averaged. The classifier's outputs are matched by class name. If the checkpoint lacks a class, the
    classifier is random (`known_outputs`). timm resamples the position embeddings for another image size. If class
    names differ, `log` gets a line on the classifier.

    Raises:
        UserError: The model cannot be built, or the checkpoint's weights do not fit it.
    """
    model = _starting_model(config, class_names, image_size, log)
    rate = config.model.moe_drop_path
    if rate is not None:
        try:
            set_moe_drop_path(model, rate)
        except ValueError as error:
            raise UserError(f"model.moe_drop_path={rate}: {error} in {config.model.name}; leave it out") from error
    return model


def _classifier_line(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """A line on the use of a checkpoint's classifier in a run with other class names."""
    if known_outputs(theirs, ours) is None:
        return "its classes are not this run's: the classifier starts fresh"
    if only_numbers(ours):
        return "its classes are taken by number, as the data do not name them"
    if len(theirs) == len(ours):
        return "its classes are this run's in another order: the classifier is taken by name"
    return f"knows this run's {len(ours)} classes among its {len(theirs)}: their part of the classifier is taken"


def _starting_model(
    config: TrainConfig, class_names: list[str], image_size: ImageSize, log: Callable[[str], object]
) -> nn.Module:
    name, kwargs, num_classes = config.model.name, config.model.kwargs, len(class_names)
    channels = config.data.channels
    if config.init_from is None:
        return build_model(name, kwargs, config.moe, num_classes, image_size, channels)
    if config.init_from == "pretrained" and is_released(name):
        config = dataclasses.replace(config, init_from=name)
    elif config.init_from == "pretrained":
        dense = build_model(name, {**kwargs, "pretrained": True}, None, num_classes, image_size, channels)
        return _upcycled(dense, config.moe, image_size)
    path = local_path(str(config.init_from))
    if path.suffix == ".npz" and path.is_file():
        return _from_npz(config, path, num_classes, image_size, log)
    foreign = read_foreign_weights(path)
    if foreign is not None:
        return _from_foreign(config, foreign, num_classes, image_size, log)
    start = load_checkpoint(path)
    if start.class_names != class_names:
        log(f"{start.path}: {_classifier_line(start.class_names, class_names)}")
    is_sparse = bool(moe_layers(start.model))
    model = build_model(name, kwargs, config.moe if is_sparse else None, num_classes, image_size, channels)
    _fit_to_images(start, model, image_size)
    if is_sparse and not moe_layers(model):
        _average_experts(start)
    weights = _with_stem(_weights(start, model, class_names), model, start.path, log)
    _load(model, weights, start.path, _same_as(config.init_from))
    return model if is_sparse else _upcycled(model, config.moe, image_size)


def _from_foreign(
    config: TrainConfig,
    weights: dict[str, Tensor],
    num_classes: int,
    image_size: ImageSize,
    log: Callable[[str], object],
) -> nn.Module:
    """The model with the weights of one of timm's files. They may be dense, or have these MoE layers."""
    path = str(config.init_from)
    is_sparse = any(".experts." in name for name in weights)
    moe = config.moe if is_sparse else None
    arguments = timm_arguments(config.model.kwargs)
    model = build_model(config.model.name, arguments, moe, num_classes, image_size, config.data.channels)
    own = model.state_dict()
    try:
        weights = fitted_weights(weights, model)
    except Exception as error:  # timm's converters of other formats may raise any type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--init_from {path}: are no weights for {config.model.name} ({reason})") from error
    classifier = [name for name in own if name.startswith(tuple(f"{each}." for each in classifier_names(model)))]
    is_taken = all(name in weights and weights[name].shape == own[name].shape for name in classifier)
    log(_nameless_classifier_line(path, is_taken, num_classes))
    if not is_taken:
        weights = {**weights, **{name: own[name] for name in classifier}}
    _load(model, _with_stem(weights, model, path, log), path)
    return model if is_sparse else _upcycled(model, config.moe, image_size)


def _from_npz(
    config: TrainConfig, path: Path, num_classes: int, image_size: ImageSize, log: Callable[[str], object]
) -> nn.Module:
    """The model with the weights of an .npz file of the original code. These files are dense."""
    arguments = timm_arguments(config.model.kwargs)
    model = build_model(config.model.name, arguments, None, num_classes, image_size, config.data.channels)
    try:
        is_taken = load_npz_weights(model, path)
    except ValueError as error:
        raise UserError(f"--init_from {path}: {error}") from error
    log(_nameless_classifier_line(path, is_taken, num_classes))
    return _upcycled(model, config.moe, image_size)


def _nameless_classifier_line(path: str | Path, is_taken: bool, num_classes: int) -> str:
    """A line on the use of the classifier of a file without class names."""
    if is_taken:
        return f"{path}: its {num_classes} classes are taken by number, as it does not name them"
    return f"{path}: its classifier is for other classes: this run's starts fresh"


def _fit_to_images(start: TrainedModel, model: nn.Module, image_size: ImageSize) -> None:
    """Resamples the position embeddings for a run's model, and keeps that model's window size if it has one.

    A model that timm cannot resize stays as it is; `_load` then reports the misfit.
    """
    resize: Callable[..., None] | None = getattr(start.model, "set_input_size", None)
    if resize is None:
        return
    window = _largest_window(model) if "window_size" in inspect.signature(resize).parameters else None
    arguments = {} if window is None else {"window_size": window}  # else timm scales windows with images
    if start.image_size != image_size or (window is not None and window != _largest_window(start.model)):
        resize(img_size=height_and_width(image_size), **arguments)


def _largest_window(model: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of a model's largest windows (small stages have smaller ones); None without windows."""
    sizes = [getattr(module, "window_size", None) for module in model.modules()]
    windows = [size for size in sizes if isinstance(size, tuple) and len(size) == 2]
    return (max(rows for rows, _ in windows), max(columns for _, columns in windows)) if windows else None


def _average_experts(start: TrainedModel) -> None:
    try:
        densify(start.model)
    except ValueError as error:
        raise UserError(f"--init_from {start.path}: {error}; give this run the checkpoint's moe section") from error


def _upcycled(dense: nn.Module, moe: MoeConfig | None, image_size: ImageSize) -> nn.Module:
    if moe is None:
        return dense
    try:
        return sparsify(dense, moe, init="upcycle", image_size=image_size)
    except ValueError as error:
        raise UserError(f"moe.{error}") from error


def _weights(start: TrainedModel, model: nn.Module, class_names: list[str]) -> dict[str, Tensor]:
    """The checkpoint's weights. The classifier gets its outputs for the run's classes, or stays if one is unknown."""
    weights = start.model.state_dict()
    classifier = tuple(f"{name}." for name in classifier_names(model))
    outputs = known_outputs(start.class_names, class_names)
    if outputs is None:
        weights = {name: value for name, value in weights.items() if not name.startswith(classifier)}
        weights |= {name: value for name, value in model.state_dict().items() if name.startswith(classifier)}
    elif outputs != list(range(len(start.class_names))):
        weights |= {name: value[outputs] for name, value in weights.items() if name.startswith(classifier)}
    return weights


def _with_stem(
    weights: dict[str, Tensor], model: nn.Module, path: Path, log: Callable[[str], object]
) -> dict[str, Tensor]:
    """Weights of a model of RGB for one of other channels: timm repeats (or sums) those of its first convolution."""
    known = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    own = model.state_dict()
    for stem in (known,) if isinstance(known, str) else known:
        name = f"{stem}.weight"
        here, there = own.get(name), weights.get(name)
        if here is None or there is None or there.dim() != 4 or there.shape[1] != 3 or here.shape[1] == 3:
            continue
        weights = {**weights, name: adapt_input_conv(here.shape[1], there)}
        how = "summed" if here.shape[1] == 1 else "repeated"
        log(f"{path}: its first convolution, of 3 channels, is {how} for {here.shape[1]} as timm does it")
    return weights


_SAME = "use the same model.name, model.kwargs and moe"


def _same_as(init_from: str | None) -> str:
    """The advice for weights that do not fit a run's model."""
    return f"give --model.name {init_from} and its moe" if init_from and is_released(init_from) else _SAME


def _load(model: nn.Module, weights: dict[str, Tensor], path: str | Path, advice: str = _SAME) -> None:
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here, there = (tuple(state[name].shape) if name in state else None for state in (own, weights))
        if here == there:
            continue
        if name.endswith(".router.mu") and None not in (here, there) and here[:2] == there[:2]:
            factor = moe_layers(model)[0][1].config.capacity_factor * there[2] / here[2]
            advice = f"--moe.capacity_factor {factor:g} keeps Soft MoE's slots"
        raise UserError(
            f"--init_from {path}: {name} is {there or 'absent'} there and {here or 'absent'} in this model; {advice}"
        )
    model.load_state_dict(weights)
