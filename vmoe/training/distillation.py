"""Knowledge distillation: a trained teacher's predictions are a part of the student's loss.

B images, C classes.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmoe.checkpoints import load_checkpoint
from vmoe.classes import known_outputs, with_outputs
from vmoe.data import ImageDataModule
from vmoe.errors import UserError
from vmoe.models.members import of_rows
from vmoe.training.config import DistillConfig, LossConfig


class Teacher:
    """A model that does not learn. It is no nn.Module, so no checkpoint, optimiser or average of weights includes it.

    Args:
        model: (B, 3, H, W) images -> (B, C) logits.
        config: The weight and the temperature of its predictions.
        distance: The distance () of the student's softened logits (B, C) to the teacher's: `softmax_distance`, or
            `sigmoid_distance` where an image may have several classes.
    """

    def __init__(
        self, model: nn.Module, config: DistillConfig, distance: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = config
        self._distance = distance or softmax_distance

    def to(self, device: torch.device) -> None:
        """Moves the model to the student's device."""
        self.model.to(device)

    def mixed_into(self, loss: Tensor, images: Tensor, logits: Tensor) -> Tensor:
        """The student's loss with its distance to the teacher (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

        (1 - weight) * loss + weight * T^2 * KL(teacher || student), with the temperature T in both softmaxes. The
        teacher gets the same augmented and mixed images as the student (Beyer et al. 2022,
        https://arxiv.org/abs/2106.05237).

        Args:
            loss: () the student's loss by the labels.
            images: (B, 3, H, W), the student's.
            logits: (B, C) the student's; for an ensemble (B*M, C), with the rows of an image's members together.
        """
        with torch.no_grad():
            wanted = self.model(images).float()
        wanted = of_rows(wanted, len(logits) // len(wanted))
        temperature, weight = self.config.temperature, self.config.weight
        distance = self._distance(logits.float() / temperature, wanted / temperature)
        return (1 - weight) * loss + weight * temperature**2 * distance


def softmax_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(theirs || ours) of the softmaxes of logits (B, C), the mean over the images, ()."""
    return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True)


def sigmoid_distance(ours: Tensor, theirs: Tensor, sum_classes: bool = False) -> Tensor:
    """KL(theirs || ours) of the sigmoids of logits (B, C), (): the mean over the images, and the mean over the classes.

    With `sum_classes` it is the sum over the classes.
    """
    has_it = theirs.sigmoid()
    per_class = has_it * (F.logsigmoid(theirs) - F.logsigmoid(ours))
    per_class = per_class + (1 - has_it) * (F.logsigmoid(-theirs) - F.logsigmoid(-ours))
    return (per_class.sum(-1) if sum_classes else per_class).mean()


def load_teacher(config: DistillConfig, data: ImageDataModule, loss: LossConfig) -> Teacher | None:
    """The teacher that a run's config names, or None.

    Where an image may have several classes, the distance is reduced over the classes as the loss by the labels is:
    summed with the asymmetric loss, else averaged.

    Raises:
        UserError: It is no checkpoint, or it is for other images or classes than the run's.
    """
    if config.teacher is None:
        return None
    if not data.multi_label and loss.name == "bce":
        raise UserError("loss.name=bce: must be cross_entropy with distill.teacher, which compares softmaxes")
    checkpoint = load_checkpoint(config.teacher)
    if checkpoint.multi_label != data.multi_label:
        several, one = "several classes per image", "one class per image"
        theirs, ours = (several, one) if checkpoint.multi_label else (one, several)
        raise UserError(f"distill.teacher={config.teacher}: knows {theirs} and these images have {ours}; give another")
    outputs = known_outputs(checkpoint.class_names, data.class_names)
    if outputs is None:
        theirs, ours = (", ".join(names)[:80] for names in (checkpoint.class_names, data.class_names))
        raise UserError(
            f"distill.teacher={config.teacher}: its class_names is {theirs} and this run has {ours}; give "
            "it data of the teacher's classes"
        )
    for what, theirs, ours in (
        ("image_size", checkpoint.image_size, data.image_size),
        ("crop", checkpoint.crop, data.config.crop),
        ("channels", checkpoint.channels, data.channels),
        ("mean", list(checkpoint.mean), list(data.mean)),
        ("std", list(checkpoint.std), list(data.std)),
    ):
        if theirs != ours:
            raise UserError(
                f"distill.teacher={config.teacher}: its {what} is {theirs} and this run has {ours}; give it "
                f"--data.{what} of the teacher"
            )
    distance = partial(sigmoid_distance, sum_classes=loss.name == "asymmetric") if data.multi_label else None
    return Teacher(with_outputs(checkpoint.model, outputs), config, distance)
