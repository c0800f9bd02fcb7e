"""Launches of Triton kernels that cost the host little.

Triton looks at each argument in each call. That takes the host several times as long as the launch, and eager code with
few tokens waits for it. Here the compiled kernel is looked up by few facts, and an argument is not looked at again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

MAX_LAUNCHES = 4096  # data of ever new sizes must not fill the memory
_launches: dict[tuple, Callable[..., None]] = {}


def launch(
    kernel: JITFunction,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | TensorDescriptor | None, ...],
    numbers: tuple[int | float | str, ...],
    **options: int,
) -> None:
    """Does what `kernel[grid](*tensors, *numbers, **options)` does.

    Args:
        kernel: A function decorated with `triton.jit`.
        grid: The number of programs along each axis.
        tensors: Its first arguments: contiguous tensors on one device, blocks of such, or None.
        numbers: All its other arguments. The same argument must have the same type in each call.
        options: Triton's own, such as `num_warps`.
    """
    first = tensors[0]
    assert first is not None
    device = (first.base if isinstance(first, TensorDescriptor) else first).get_device()
    if device >= 0 and device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, **options)
    if not isinstance(kernel, JITFunction):  # Triton's interpreter
        kernel[grid](*tensors, *numbers, **options)
        return None
    places: list[TensorDescriptor | int | None] = []
    facts: list[object] = [id(kernel), device, grid, numbers, *options.values()]
    for each in tensors:
        if each is None:
            places.append(None)
            facts.append(None)
            continue
        is_blocks = type(each) is TensorDescriptor
        base = each.base if is_blocks else each
        address = base.data_ptr()
        # Triton compiles for other addresses otherwise, and has an error for tensors elsewhere: their addresses alone
        # would end in an illegal access, after which the process cannot use the GPU
        if address % 16 or base.get_device() != device:
            kernel[grid](*tensors, *numbers, **options)
            return None
        # a launch asks the driver about each tensor, but not about addresses
        places.append(each if is_blocks else address)
        facts.append(base.dtype)
    key = tuple(facts)
    known = _launches.get(key)
    if known is None:
        if len(_launches) >= MAX_LAUNCHES:
            _launches.clear()
        _launches[key] = _launch_of(kernel[grid](*tensors, *numbers, **options), grid)
        return None
    known(torch._C._cuda_getCurrentRawStream(device), *places, *numbers)
    return None


def _launch_of(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Launches a kernel that Triton has compiled and loaded."""
    x, y, z = grid + (1,) * (3 - len(grid))
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    with_hooks, hooks = compiled[x, y, z], knobs.runtime

    def launch_again(stream: int, *arguments: object) -> None:
        # Triton's own call makes a record of each launch for its hooks, which only profilers set
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            with_hooks(*arguments, stream=stream)
        else:
            run(x, y, z, stream, function, metadata, None, None, None, *arguments)

    return launch_again
