"""Triton kernels that pass over a large float32 tensor once."""

import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.kernels.launches import launch
from vmoe.moe.kernels.sizes import cdiv

_PER_PROGRAM = 2048  # numbers per program


def scale(tensor: Tensor, factor: Tensor) -> None:
    """Multiplies the tensor by a factor (), in place. A factor of 1 neither reads nor writes the tensor."""
    size = tensor.numel()
    launch(_scale, (cdiv(size, _PER_PROGRAM),), (tensor, factor), (size, _PER_PROGRAM))


def move(average: Tensor, weight: Tensor, step: Tensor) -> None:
    """Adds step * (weight - average) to the average, with step ()."""
    size = average.numel()
    # a fused multiply-add would round otherwise than the formula's three operations
    launch(_move, (cdiv(size, _PER_PROGRAM),), (average, weight, step), (size, _PER_PROGRAM), enable_fp_fusion=False)


@triton.jit
def _scale(tensor, factor, size, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(tensor + at, tl.load(tensor + at, mask=at < size) * by, mask=at < size)


@triton.jit
def _move(average, weight, step, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    old = tl.load(average + at, mask=at < size)
    difference = tl.load(weight + at, mask=at < size) - old
    tl.store(average + at, old + difference * tl.load(step), mask=at < size)
