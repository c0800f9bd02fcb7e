"""AdamW with timm's parameter groups, and its learning rate as a function of the step."""

import math

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from vmoe.training.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that learn; those in `model.no_weight_decay()`, biases and norms are not decayed.

    It is fused: one kernel an update, and one that a flag on the device can block (see `vmoe.training.guard`).
    """
    names = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=names)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, total: int, warmup: int, config: OptimConfig) -> float:
    """The learning rate of update `step` (0-based) of `total`.

    Linear from lr / warmup up to lr over the first `warmup` updates, then half a cosine that ends in min_lr.
    """
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
