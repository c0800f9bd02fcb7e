"""The guard against NaN and inf: it blocks the update on the device at once, and the host reads the flag later.

A fused optimiser with a `found_inf` tensor of 1 changes neither weights nor state. torch's GradScaler uses this to skip
an overflowed update without synchronising. Here it blocks every update from the first bad one on, so the weights stay
as they were before.
"""

from typing import Any

import torch
from torch import Tensor

from vmoe.errors import UserError
from vmoe.training.parallel.collectives import largest

# At a loss scale this small the gradients overflow at any scale: it is no longer GradScaler's normal search.
_SMALLEST_SCALE = 1.0


class Guard:
    """Watches loss and gradient norm without host synchronisation. A CUDA graph can hold it: its tensors stay."""

    def __init__(self) -> None:
        self.bad_step = torch.tensor(-1.0)  # () the first update with a NaN or inf, or -1
        self.bad_input = torch.tensor(False)  # () whether images held a NaN or inf by then
        self._images_finite = torch.tensor(True)
        self._loss_finite = torch.tensor(True)

    def to(self, device: torch.device) -> None:
        for name in ("bad_step", "bad_input", "_images_finite", "_loss_finite"):
            setattr(self, name, getattr(self, name).to(device))

    def watch_forward(self, images: Tensor, loss: Tensor) -> None:
        """Records whether the images (B, 3, H, W) and the loss () of a batch are finite."""
        self._images_finite &= images.sum().isfinite()
        self._loss_finite &= loss.detach().isfinite()

    def check_update(
        self, optimizer: torch.optim.Optimizer, norm: Tensor, step: int | Tensor, scaler: Any = None
    ) -> None:
        """Blocks this update and all later ones if the loss or the gradients' norm () is not finite.

        With fp16's loss scaling an infinite norm is normal: the scaler skips such an update and halves the scale.

        Raises:
            UserError: The update is bad; at once only on the CPU, or if no flag can block the optimiser.
        """
        norm_fails = ~norm.isfinite()
        if scaler is not None:
            norm_fails = norm_fails & (scaler._scale < _SMALLEST_SCALE)
        fails = torch.stack([norm_fails | ~self._loss_finite, ~self._images_finite])
        is_bad, is_bad_input = largest(fails).unbind()  # over all ranks, so that they stop at the same step
        is_first = is_bad & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(is_first, step, self.bad_step))
        self.bad_input.copy_(torch.where(is_first, is_bad_input, self.bad_input))
        self._images_finite.fill_(True)
        self._loss_finite.fill_(True)
        if norm.device.type == "cpu" or not obeys_a_flag(optimizer):
            self.raise_if_bad(fp16=scaler is not None)
        if obeys_a_flag(optimizer):
            self.block(optimizer)

    def block(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes a fused optimiser skip its next update if a step was bad, or if a GradScaler already asks for that."""
        is_bad = (self.bad_step >= 0).float()
        found = getattr(optimizer, "found_inf", None)
        optimizer.found_inf = is_bad if found is None else torch.maximum(found, is_bad)

    def raise_if_bad(self, fp16: bool = False) -> None:
        """Reads the flag. On a GPU this synchronises.

        Raises:
            UserError: An update was bad. The message names it and the most likely cause.
        """
        step = int(self.bad_step.item())
        if step < 0:
            return
        if self.bad_input.item():
            cause = "the images hold NaN or inf: check the files, mean and std"
        elif fp16:
            cause = "fp16 overflows: use the precision bf16"
        else:
            cause = "the learning rate is likely too high: lower lr, warm up longer (warmup_epochs) or set clip_norm"
        raise UserError(
            f"step {step + 1}: the loss or its gradient became NaN or inf; {cause}. "
            "The model, and the last checkpoint where one was written, hold the weights from before that step",
            everywhere=True,
        )


def obeys_a_flag(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a tensor `found_inf` on the optimiser blocks its update, as in torch's fused optimisers."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)
