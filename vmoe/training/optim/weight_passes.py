"""Passes over all weights or gradients.

A V-MoE has many weights for its work, so these passes' memory traffic takes much of a step. On a GPU with Triton,
kernels of ours pass over large tensors with the least traffic. torch's functions pass over all others. Both give the
same results, bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vmoe.moe.kernels import TRITON, kernels_for

if TRITON.routing is not None:
    from vmoe.training.optim import weight_kernels

_LARGE_TENSOR = 2**20  # numbers; for fewer the host needs longer to launch a kernel than the GPU needs to run it


def scale_down(parameters: Sequence[nn.Parameter], largest_norm: float, norm: Tensor) -> None:
    """Scales gradients of norm () down to `largest_norm`, as torch's clip_grads_with_norm_ does.

    A large gradient is neither read nor written if its factor is 1.
    """
    large = [parameter for parameter in parameters if parameter.grad is not None and _is_large(parameter.grad)]
    factor = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in large:
        weight_kernels.scale(parameter.grad, factor.to(parameter.grad.device))
    done = set(large)
    nn.utils.clip_grads_with_norm_([p for p in parameters if p not in done], largest_norm, norm)


def move_towards(averages: Sequence[Tensor], weights: Sequence[Tensor], step: Tensor) -> None:
    """Adds step * (weight - average) to each average, with step ()."""
    others = []
    for average, weight in zip(averages, weights, strict=True):
        if _is_large(average) and _is_large(weight):
            weight_kernels.move(average, weight, step)
        else:
            others.append((average, weight))
    if others:
        averages, weights = zip(*others, strict=True)
        difference = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(difference, step)
        torch._foreach_add_(averages, difference)


def _is_large(tensor: Tensor) -> bool:
    """Whether the kernels take the tensor."""
    is_simple = tensor.dtype == torch.float32 and tensor.is_contiguous()
    return is_simple and tensor.numel() >= _LARGE_TENSOR and kernels_for(tensor).routing is not None
