"""Where a run's weights start: fresh, or from the checkpoint of another run (upcycling, going on, going back to
dense).
"""

from pathlib import Path

from torch import Tensor, nn

from vmoe.checkpoints import Checkpoint, build_model, load_checkpoint
from vmoe.errors import UserError
from vmoe.models import densify, sparsify
from vmoe.moe import MoeConfig, moe_layers
from vmoe.training.config import TrainConfig


def initial_model(config: TrainConfig, class_names: list[str], image_size: int) -> nn.Module:
    """The model of a run, with the weights that `config.init_from` asks for: "pretrained" or a checkpoint of ours.

    "pretrained" takes the weights that timm has for the model, which it downloads when they are not there. A dense
    checkpoint is upcycled where the run has MoE layers: every expert starts as the MLP it replaces
    (https://arxiv.org/abs/2212.05055), the router fresh. The experts of a sparse checkpoint are averaged where the run
    is dense. The classifier starts fresh unless the classes are the checkpoint's.

    Raises:
        UserError: the model cannot be built, or the checkpoint's weights do not fit it.
    """
    name, kwargs, num_classes = config.model.name, config.model.kwargs, len(class_names)
    if config.init_from is None:
        return build_model(name, kwargs, config.moe, num_classes, image_size)
    if config.init_from == "pretrained":
        dense = build_model(name, {**kwargs, "pretrained": True}, None, num_classes, image_size)
        return _upcycled(dense, config.moe, image_size)
    start = load_checkpoint(config.init_from)
    if moe_layers(start.model):
        model = build_model(name, kwargs, config.moe, num_classes, image_size)
        if not moe_layers(model):
            densify(start.model)
        _load(model, _weights(start, model, class_names), start.path)
        return model
    model = build_model(name, kwargs, None, num_classes, image_size)
    _load(model, _weights(start, model, class_names), start.path)
    return _upcycled(model, config.moe, image_size)


def _upcycled(dense: nn.Module, moe: MoeConfig | None, image_size: int) -> nn.Module:
    if moe is None:
        return dense
    try:
        return sparsify(dense, moe, init="upcycle", image_size=image_size)
    except ValueError as error:
        raise UserError(f"moe.{error}") from error


def _weights(start: Checkpoint, model: nn.Module, class_names: list[str]) -> dict[str, Tensor]:
    """The checkpoint's weights; of the classifier the model's own where the classes are others."""
    weights = start.model.state_dict()
    if start.class_names != class_names:
        classifier = tuple(f"{name}." for name in _classifiers(model))
        weights = {name: value for name, value in weights.items() if not name.startswith(classifier)}
        weights |= {name: value for name, value in model.state_dict().items() if name.startswith(classifier)}
    return weights


def _classifiers(model: nn.Module) -> list[str]:
    """The names of a timm model's last layers."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    return [name for name, module in model.named_modules() if any(module is head for head in heads)]


def _load(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here, there = (tuple(state[name].shape) if name in state else None for state in (own, weights))
        if here != there:
            raise UserError(
                f"--init_from {path}: {name} is {there or 'absent'} there and {here or 'absent'} in this model; "
                "use the same model.name, model.kwargs, data.image_size and experts"
            )
    model.load_state_dict(weights)
