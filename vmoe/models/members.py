"""An ensemble within one model (E3): repeats an image's rows for its members, and averages their predictions.

B images; M members; C classes.
"""

from typing import Any

from torch import Tensor, nn

from vmoe.errors import UserError
from vmoe.models.families import meta_images, on_meta, run_on_meta
from vmoe.models.padding import PADDED_FAMILIES
from vmoe.moe import MoeMlp, moe_layers
from vmoe.moe.members import mean_prediction, tile
from vmoe.moe.mlps import class_key


class TileRows:
    """A hook before the block of the first MoE layer: (B, ...) -> (B*M, ...)."""

    def __init__(self, ensemble: int) -> None:
        self.ensemble = ensemble

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple, dict]:
        x, *others = inputs
        return (tile(x, self.ensemble), *others), named


class MeanPrediction:
    """A hook after the model. In evaluation: (B*M, C) logits -> (B, C), the logarithm of the mean probabilities.

    In training all rows stay, with those of an image's members together, since each member learns separately. A model
    without a classifier returns the mean of its members' features in evaluation.

    Attributes:
        keeps: Whether to fill `kept`.
        kept: (M, B, C) logarithms of the members' probabilities in the last pass.
    """

    def __init__(self, ensemble: int) -> None:
        self.ensemble = ensemble
        self.keeps = False
        self.kept: Tensor | None = None

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if model.training:
            return output
        if getattr(model, "num_classes", None) == 0:
            return output.unflatten(0, (-1, self.ensemble)).mean(1)
        if self.keeps:
            self.kept = output.float().log_softmax(-1).unflatten(0, (-1, self.ensemble)).transpose(0, 1)
        return mean_prediction(output, self.ensemble)


def ensemble_size(model: nn.Module) -> int:
    """M, the number of a model's members; 1 without an ensemble."""
    return next((layer.config.ensemble for _, layer in moe_layers(model)), 1)


def of_rows(values: Tensor, ensemble: int) -> Tensor:
    """Repeats labels of images, (B, ...), for the rows of an ensemble in training: (B*M, ...)."""
    return values if ensemble == 1 else tile(values, ensemble)


def refuse_ensemble(model: nn.Module, what: str) -> None:
    """Refuses an ensemble for a job that needs a single model.

    Args:
        model: The model.
        what: The start of the message: the option or file, and the reason.

    Raises:
        UserError: The model is an ensemble.
    """
    if ensemble_size(model) > 1:
        raise UserError(f"{what} (the model has moe.ensemble={ensemble_size(model)}); take a single model")


def add_member_hooks(model: nn.Module, layers: dict[str, MoeMlp]) -> None:
    """Adds the hooks of an ensemble to a model with `layers` in forward order. Other models do not change."""
    if not layers or ensemble_size(model) == 1:
        return
    ensemble, first = ensemble_size(model), next(iter(layers))
    block = model.get_submodule(first.rpartition(".")[0])
    if isinstance(block, nn.Sequential):  # the MLP's own norm and the layer
        block = model.get_submodule(first.rpartition(".")[0].rpartition(".")[0])
    block.register_forward_pre_hook(TileRows(ensemble), with_kwargs=True)
    model.register_forward_hook(MeanPrediction(ensemble))
    if hasattr(model, "forward_intermediates"):
        vars(model)["forward_intermediates"] = _refuse_intermediates


def _refuse_intermediates(*_: Any, **__: Any) -> None:
    raise UserError(
        "forward_intermediates: an ensemble (moe.ensemble) has rows of its members from its first MoE layer on, and "
        "timm would mix them; call forward_features, or take a single model"
    )


def check_ensemble(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> None:
    """Refuses families that pass more than tokens between blocks, since members could not have their own.

    Raises:
        ValueError: The model is of such a family.
    """
    ensemble, family = ensemble_size(model), type(model).__module__.rpartition(".")[2]
    refused = f"ensemble={ensemble}: {type(model).__name__} ({family}) cannot be one"
    if any(class_key(module).startswith(PADDED_FAMILIES) for module in model.modules()):
        raise ValueError(f"{refused}: it takes padded images, which have masks; use another backbone")
    twin = on_meta(model).eval()
    add_member_hooks(twin, dict(moe_layers(twin)))
    images = meta_images(model, image_size)
    try:
        rows = len(run_on_meta(twin, images))
    except Exception as error:  # whatever a model's own code raises
        raise ValueError(f"{refused}: more than the tokens passes from block to block; use another backbone") from error
    if rows != len(images):
        raise ValueError(f"{refused}: it gives {rows} rows for {len(images)} images; use another backbone")
