"""Traces one training step without memory or arithmetic: its operators, their costs, and the memory over time.

The model runs forward and backward on fake tensors under a dispatch mode. `vmoe.bench.plan.fake_kernels` has the
operators that differ on a GPU, so no GPU is needed.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vmoe.bench.plan.fake_kernels import FakeKernels
from vmoe.models.families import own_channels
from vmoe.models.members import ensemble_size, of_rows
from vmoe.moe import auxiliary_loss, moe_layers
from vmoe.sizes import ImageSize, height_and_width

_ALIGNMENT = 512  # bytes: torch's allocator rounds up to it
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")


class OperatorWork(NamedTuple):
    """The work of one operator."""

    kind: str  # "products", "attention" or "other"
    dtype: torch.dtype  # type of its products
    flops: float  # floating-point operations; a multiply-add counts 2
    bytes: float  # bytes read and written
    calls: int  # operators that the host issues for it
    is_backward: bool  # whether it belongs to the backward pass


class Moment(NamedTuple):
    """Bytes in use after an operator, beyond the weights."""

    live: int  # all of them
    gradients: int  # bytes of the gradients of parameters
    of_experts: int  # bytes of the gradients of experts
    is_backward: bool  # whether it is in the backward pass


@dataclass
class Trace:
    """A step of one process."""

    work: list[OperatorWork] = field(default_factory=list)  # every operator
    moments: list[Moment] = field(default_factory=list)  # every moment at which memory grew
    saved: int = 0  # bytes that the forward pass keeps for the backward pass, without the weights
    # bytes of each exchange of tokens between processes, in both passes, as if all tokens left this process
    sent: list[int] = field(default_factory=list)


def trace_step(
    model: nn.Module, images: int, image_size: ImageSize, dtype: torch.dtype, targets: int | None = None,
    expert_size: int | None = None, like_gpu: bool = True,
) -> Trace:  # fmt: skip
    """Traces forward pass, loss with the balance losses, and backward pass.

    Args:
        model: A model on the meta device. Its tensors become fake ones, so it cannot be used afterwards.
        images: B of this process.
        image_size: Side in pixels, or (height, width).
        dtype: Type of autocast; float32 uses none.
        targets: Number of classes if targets are shares of the classes (mixing); None for labels.
        expert_size: Number of processes over which experts are sharded; None without expert parallelism.
        like_gpu: Whether to use the operators of an NVIDIA GPU instead of a CPU's.

    Returns:
        The trace. Its figures include gradients, but not the weights and the optimiser's state.
    """

    def loss() -> Tensor:
        batch = torch.empty(images, own_channels(model), *height_and_width(image_size))
        labels = torch.empty(images, dtype=torch.int64) if targets is None else torch.empty(images, targets)
        return F.cross_entropy(model(batch), of_rows(labels, ensemble_size(model))) + auxiliary_loss(model)

    return trace_loss(model, loss, dtype, expert_size, like_gpu)


def trace_loss(
    model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype, expert_size: int | None = None,
    like_gpu: bool = True,
) -> Trace:  # fmt: skip
    """Traces any scalar `loss` of the model as `trace_step` does."""
    trace = Trace()
    with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        _make_fake(model, expert_size)
        model.train()
        recorder = _StepRecorder(trace, model)
        with FakeKernels(model, recorder.charge, trace.sent.append, expert_size, like_gpu), recorder:
            with recorder.saving():
                value = loss()
            recorder.is_backward = True
            value.backward()
    return trace


def _make_fake(model: nn.Module, expert_size: int | None) -> None:
    """Gives every parameter and buffer a fake tensor, with this process's experts only."""
    own = {part for _, layer in moe_layers(model) for part in layer.experts.modules()} if expert_size else set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            shape = list(parameter.shape)
            if module in own:
                shape[0] //= expert_size
            fake = nn.Parameter(torch.empty(shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad)
            module._parameters[name] = fake
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _StepRecorder(TorchDispatchMode):
    """Records every operator's work and every storage's lifetime."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        super().__init__()
        self.trace = trace
        self.is_backward = False
        self._live = self._gradients = self._of_experts = 0
        self._known: set[int] = set()
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._weights |= {buffer.untyped_storage()._cdata for buffer in model.buffers()}
        self._experts = {id(p) for _, layer in moe_layers(model) for p in layer.experts.stacked_parameters()}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._count_gradient)

    def charge(self, kind: str, dtype: torch.dtype, flops: float, moved: float, calls: int = 1) -> None:
        """Adds the work of an operator."""
        self.trace.work.append(OperatorWork(kind, dtype, flops, moved, calls, self.is_backward))

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Adds up the bytes that autograd keeps within the context."""
        with saved_bytes(self._weights) as saved:
            yield
        self.trace.saved = saved()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._note_work(func, args, kwargs, result, taken, given)
        for tensor in given:
            self._note_storage(tensor)
        return result

    def _note_work(self, func: Any, args: tuple, kwargs: dict, result: Any, taken: list, given: list) -> None:
        packet = func._overloadpacket
        storages = {tensor.untyped_storage()._cdata for tensor in taken}
        is_view = given and not func._schema.is_mutable and given[0].untyped_storage()._cdata in storages
        if is_view or packet.__name__ in _ALLOCATIONS or not given:
            return
        flops = 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
        moved = sum(map(_bytes_touched, taken)) + sum(map(_bytes_touched, given))
        self.charge("products" if flops else "other", given[0].dtype, flops, moved)

    def _note_storage(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._weights:
            return
        size = -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        self._known.add(key)
        weakref.finalize(storage, self._release, key, size).atexit = False
        self._live += size
        self.trace.moments.append(Moment(self._live, self._gradients, self._of_experts, self.is_backward))

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size

    def _count_gradient(self, parameter: Tensor) -> None:
        size = parameter.grad.untyped_storage().nbytes()
        self._gradients += size
        self._of_experts += size if id(parameter) in self._experts else 0


@contextmanager
def saved_bytes(weights: set[int]) -> Iterator[Callable[[], int]]:
    """Counts the bytes that autograd keeps within the context, each storage once.

    Args:
        weights: `_cdata` of the storages that do not count.

    Yields:
        A function that returns the bytes so far.
    """
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def _bytes_touched(tensor: Tensor) -> int:
    """Bytes of a tensor's own elements. Broadcast axes count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()
