"""Measures the rates of this machine's GPU. Each is measured on the kind of work that the planner counts with it."""

import dataclasses
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.bench.plan.hardware import Machine
from vmoe.bench.plan.trace import trace_loss, trace_step
from vmoe.bench.timing import TimedJob, copy_bandwidth, matmul_peak, release, time_calls
from vmoe.checkpoints import build_model

_TOKENS = (256, 197, 768)  # images, tokens and width: a ViT-B/16
_HEAD_WIDTH = 64
_UPDATED = (64, 2**20)  # tensors, and the elements of each


def measure_machine(machine: Machine, device: torch.device) -> Machine:
    """The machine with rates measured on this GPU. The network is not measured."""
    on_gpu = device.type == "cuda"
    images, tokens, width = _TOKENS if on_gpu else (2, 197, 192)
    rows = images * tokens
    shapes = [(rows, width, 4 * width), (rows, 4 * width, width)]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rates = {
        "products": matmul_peak(device, dtype, [*shapes, (8192, 8192, 8192)] if on_gpu else shapes),
        "products32": matmul_peak(device, torch.float32, shapes),
        "bandwidth": copy_bandwidth(device),
        "attention": _attention_rate(device, dtype, images, tokens, width // _HEAD_WIDTH),
        "elementwise": _elementwise_rate(device, dtype, images, tokens, width),
        "update": _update_rate(device, *(_UPDATED if on_gpu else (4, 2**18))),
        "host_call": _host_call(device, dtype),
    }
    release(device)
    return dataclasses.replace(machine, **rates, is_measured=True)


def _seconds(job: TimedJob, device: torch.device) -> float:
    for _ in range(2):
        job()
    return statistics.median(time_calls(job, device, 3) for _ in range(5)) / 1e3


def _attention_rate(device: torch.device, dtype: torch.dtype, images: int, tokens: int, heads: int) -> float:
    shape = (images, heads, tokens, _HEAD_WIDTH)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    upstream = torch.randn(shape, device=device, dtype=dtype)

    def both_passes():
        torch.autograd.grad(F.scaled_dot_product_attention(query, key, value), (query, key, value), upstream)

    return 14 * tokens * query.numel() / _seconds(both_passes, device)


class _Between(nn.Module):
    """The operators between a block's products: norm, cast, GELU, and the sum with the residual stream."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.norm(x).to(self.dtype))


def _elementwise_rate(device: torch.device, dtype: torch.dtype, images: int, tokens: int, width: int) -> float:
    shape = (images, tokens, width)
    with torch.device("meta"):
        module = nn.Sequential(*(_Between(width, dtype) for _ in range(4)))
    works = trace_loss(module, lambda: module(torch.empty(shape, requires_grad=True)).sum(), torch.float32).work
    module = nn.Sequential(*(_Between(width, dtype) for _ in range(4))).to(device)
    x = torch.randn(shape, device=device, requires_grad=True)

    def both_passes():
        torch.autograd.grad(module(x).sum(), (x, *module.parameters()))

    return sum(work.bytes for work in works) / _seconds(both_passes, device)


def _update_rate(device: torch.device, count: int, size: int) -> float:
    parameters = [nn.Parameter(torch.zeros(size, device=device)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    update = torch.optim.AdamW(parameters, fused=True).step
    return 7 * 4 * count * size / _seconds(update, device)


def _host_call(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds per operator of the host: a step on one image takes as long as the host needs to issue it."""
    size = ("vit_tiny_patch16_224", {"depth": 4}, None, 10, 32)
    with torch.device("meta"):
        model = build_model(*size)
    calls = sum(work.calls for work in trace_step(model, 1, 32, dtype).work)
    with device:
        model = build_model(*size).train()
        image, label = torch.randn(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(image), label)
        loss.backward()
        model.zero_grad()

    return _seconds(step, device) / calls
