"""Guidance of the routers of images towards super-classes: the loss, the routers' accuracy, and the model's accuracy
with perfect routers.

B images; C classes; E experts, one per super-class.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmoe.checkpoints import TrainedModel
from vmoe.data.super_classes import match_super_classes, read_super_classes
from vmoe.errors import UserError
from vmoe.evaluation.ensemble import Ensemble
from vmoe.moe import MoeConfig, MoeMlp, moe_layers

_GUIDED = ("token_choice", "cosine")


@dataclass(frozen=True)
class RouterFigures:
    """How well the routers of images find the super-class of an image, as the mean over the routers."""

    super_classes: list[str]  # (E,) by expert
    loss: float  # cross-entropy of the routers' probabilities, nats
    top1: float  # share of the images for which the super-class has the highest probability
    oracle_top1: float | None = None  # the model's top-1 with routers that are always right; None if not measured


class Guidance:
    """Cross-entropy of the routers' probabilities for an image against the super-class of its label.

    No module, so that a checkpoint's weights are those of the model alone.

    Args:
        super_classes: A file, "cifar100", or the content of a file by `read_super_classes`.
        model: A model that routes images.

    Attributes:
        names: (E,) names of the super-classes, by expert; empty before `match`.
        targets: (C, E) share of each class in each super-class.
        labels: (B,) labels of the next batch, which `right_routers` needs.
        sums: (2,) loss times images, and number of images with a right router, for the last batch.

    Raises:
        UserError: The model does not route images, or its router does not learn its choice.
    """

    def __init__(self, super_classes: str | Mapping[str, Any], model: nn.Module) -> None:
        layers = moe_layers(model)
        check_guided(layers[0][1].config if layers else None)
        self.model = model
        self.num_experts = layers[0][1].num_experts
        self.of_classes = read_super_classes(super_classes) if isinstance(super_classes, str) else super_classes
        self.names: list[str] = []
        self.targets = torch.zeros(0, self.num_experts)  # (C, E)
        self.labels: Tensor | None = None
        self.sums = torch.zeros(2)

    def match(self, class_names: Sequence[str]) -> None:
        """Sets the classes of the labels, by name.

        Raises:
            UserError: The super-classes are not for these classes, or not as many as experts.
        """
        matched = match_super_classes(self.of_classes, class_names, self.num_experts)
        self.names = matched.names
        self.targets = torch.tensor(matched.shares, device=self.targets.device)

    def to(self, device: torch.device) -> None:
        """Moves the targets to where the labels are."""
        self.targets, self.sums = self.targets.to(device), self.sums.to(device)

    def loss(self, labels: Tensor, shares: Tensor | None = None) -> Tensor:
        """The mean loss of the model's last forward pass, (), over images and routers. Updates `sums`.

        Args:
            labels: (B,) int64.
            shares: (B, C) shares of the classes, for mixed images; None takes the labels.
        """
        with torch.autocast(labels.device.type, enabled=False):  # targets in half precision would not sum to 1
            of_labels_BE = self.targets[labels]
            targets_BE = of_labels_BE if shares is None else shares.to(self.targets) @ self.targets
            logits = [layer.last_image_logits.to(self.targets) for layer in _deciding(self.model)]
            loss = torch.stack([F.cross_entropy(logits_BE, targets_BE) for logits_BE in logits]).mean()
            right = [(logits_BE.argmax(1) == of_labels_BE.argmax(1)).sum().to(loss) for logits_BE in logits]
        self.sums = torch.stack([loss.detach() * len(labels), torch.stack(right).mean()])
        return loss


def check_guided(moe: MoeConfig | None) -> None:
    """Refuses super-classes for a model with these MoE layers; None is a dense model.

    Raises:
        UserError: It does not route images, or its router does not learn its choice.
    """
    if moe is None or moe.route != "image":
        found = "this model is dense" if moe is None else f"moe.route is {moe.route}"
        raise UserError(
            f"loss.super_classes: guides a router of images, and {found}; give moe.route=image", everywhere=True
        )
    if moe.router not in _GUIDED:
        raise UserError(
            f"loss.super_classes: moe.router must be {' or '.join(_GUIDED)}, not {moe.router}", everywhere=True
        )


def require_guidance(model: TrainedModel, option: str) -> None:
    """Refuses an option that needs a guided router.

    Raises:
        UserError: The model has none.
    """
    if guidance_of(model) is None:
        raise UserError(
            f"{option}: {model.path} has no router that was guided towards super-classes; take a run with "
            "loss.super_classes and moe.route=image"
        )


def guidance_of(model: TrainedModel) -> Guidance | None:
    """The guidance of a model's training, for its classes; None without guidance, or if its experts have changed."""
    source = (model.config.get("loss") or {}).get("super_classes")
    if source is None or isinstance(model.model, Ensemble) or not _deciding(model):
        return None
    guidance = Guidance(source, model)
    names = list(guidance.of_classes)  # the set that the model is measured on may have only some of them
    try:
        guidance.match(names)
    except UserError:  # experts were pruned
        return None
    rows = {name: row for row, name in enumerate(names)}
    if not set(model.class_names) <= rows.keys():
        return None
    guidance.targets = guidance.targets[[rows[name] for name in model.class_names]]
    return guidance


@contextmanager
def right_routers(guidance: Guidance) -> Iterator[None]:
    """Makes the routers of images always right within the block.

    For each label in `guidance.labels`, the scores of the router's first choice and of the super-class's expert are
    exchanged. So nothing changes for an image with a right router.
    """
    layers = _deciding(guidance.model)
    own = [layer.router.scores for layer in layers]

    def corrected(scores: Any) -> Any:
        def scores_of(x_BD: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
            assert guidance.labels is not None
            logits_BE, x_BD = scores(x_BD, *others)
            first_B1 = logits_BE.argmax(1, keepdim=True)
            right_B1 = guidance.targets[guidance.labels].argmax(1, keepdim=True)
            highest_B1, of_right_B1 = logits_BE.gather(1, first_B1), logits_BE.gather(1, right_B1)
            return logits_BE.scatter(1, first_B1, of_right_B1).scatter(1, right_B1, highest_B1), x_BD

        return scores_of

    try:
        for layer, scores in zip(layers, own, strict=True):
            layer.router.scores = corrected(scores)
        yield
    finally:
        for layer in layers:
            vars(layer.router).pop("scores", None)


def _deciding(model: nn.Module) -> list[MoeMlp]:
    """The MoE layers that route images by a router of their own."""
    return [
        layer for _, layer in moe_layers(model) if layer.config.route == "image" and hasattr(layer.router, "scores")
    ]
