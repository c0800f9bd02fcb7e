"""Benchmark of one MoE layer beside timm's dense `Mlp` on K times as many tokens: equal active FLOPs.

"experts": dispatch, expert MLPs and combine for a given routing. "layer": the whole MoeMlp with router, noise, balance
losses, batch priority in groups of 8 images. Forward and backward pass, parameters in float32 under autocast;
"inference" is the forward pass alone with the weights in the low type.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from vmoe.bench.timing import Job, Measurement, matmul_peak, measure
from vmoe.moe import MoeConfig, MoeMlp, Routing
from vmoe.moe.assignment import rank_in_flow
from vmoe.moe.experts import Experts
from vmoe.moe.groups import Groups


@dataclass(frozen=True)
class Case:
    """Sizes of a layer and its input.

    Attributes:
        width: D.
        hidden: H of an expert.
        num_experts: E.
        top_k: K.
        images: B.
        tokens: N, tokens an image.
        capacity_factor: Room for the given routing, and for the layer's.
    """

    width: int
    hidden: int
    num_experts: int
    top_k: int
    images: int
    tokens: int
    capacity_factor: float = 1.05

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.images * self.tokens

    @property
    def flops(self) -> int:
        """Of the forward and backward pass of the active experts."""
        return 3 * 4 * self.num_tokens * self.top_k * self.width * self.hidden


CASES = {
    "S16": Case(384, 1536, 32, 2, 256, 197),
    "B16": Case(768, 3072, 32, 2, 256, 197),
    "L16": Case(1024, 4096, 32, 2, 128, 197),
    "Ti-k1": Case(192, 768, 8, 1, 64, 65),
    "Ti-k2": Case(192, 768, 8, 2, 64, 65),
    "S32": Case(384, 1536, 32, 2, 32, 50),
    "S32-b128": Case(384, 1536, 32, 2, 128, 50),
}


def benchmark_layer(
    case: Case, device: torch.device, dtype: torch.dtype, rounds: int, only: list[str] | None = None
) -> tuple[dict[str, Measurement], float]:
    """Times the jobs of `layer_jobs` whose names begin with one of `only`.

    Returns:
        A measurement a job, and the best rate of the layer's own matrix products in FLOP/s.
    """
    torch.manual_seed(0)
    jobs = {name: make for name, make in layer_jobs(case, device, dtype).items() if _is_wanted(name, only)}
    rows = case.num_tokens * case.top_k
    peak = matmul_peak(device, dtype, [(rows, case.width, case.hidden), (rows, case.hidden, case.width)])
    made = {}
    failed = {}
    for name, make in jobs.items():
        try:
            made[name] = make()
        except Exception as error:  # one variant that cannot be built must not end the others
            failed[name] = Measurement(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    return {**measure(made, device, rounds, 4 if device.type == "cuda" else 1), **failed}, peak


def layer_jobs(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Job]]:
    """Makers of the jobs, by name; "X inference" is compared with "dense inference", all others with "dense"."""
    config = MoeConfig(
        num_experts=case.num_experts,
        top_k=case.top_k,
        capacity_factor=case.capacity_factor,
        eval_capacity_factor=case.capacity_factor,
        batch_priority=True,
        group=8,
    )
    place = (case, device, dtype)
    jobs = {
        "dense": lambda: _dense(*place),
        "experts": lambda: _experts(*place),
        "experts, casts kept": lambda: _experts(*place, keep_casts=True),
        "experts, dropless": lambda: _experts(*place, dropless=True),
        "layer": lambda: _layer(*place, config),
        "layer, casts kept": lambda: _layer(*place, config, keep_casts=True),
        "layer, no noise, no priority": lambda: _layer(*place, _plain(config)),
        "dense inference": lambda: _dense(*place, inference=True),
        "experts inference": lambda: _experts(*place, inference=True),
        "layer inference": lambda: _layer(*place, config, inference=True),
    }
    if device.type == "cuda":
        jobs["layer, CUDA graph"] = lambda: _in_graph(*place, config)
    return jobs


def given_routing(case: Case, device: torch.device, dropless: bool = False) -> Routing:
    """Every token to K distinct experts drawn at random, all experts equally often, all choices kept."""
    order = torch.randperm(case.num_tokens)[:, None] * case.top_k + torch.arange(case.top_k)
    chosen_GSK = (order % case.num_experts)[None].to(device)
    groups = Groups.of(1, case.num_tokens, "batch")
    gates_GSE = torch.zeros(1, case.num_tokens, case.num_experts, device=device)
    weights_GSK = torch.rand(chosen_GSK.shape, device=device) * 0.5 + 0.25
    routing = Routing(groups, None, gates_GSE, gates_GSE, gates_GSE, chosen_GSK, weights_GSK)
    if dropless:
        return routing
    capacity = int(case.capacity_factor * case.num_tokens * case.top_k / case.num_experts) + 1
    slots_GSK = rank_in_flow(chosen_GSK, None, case.num_experts)
    return routing._replace(kept_GSK=slots_GSK < capacity, slots_GSK=slots_GSK, capacity=capacity)


def _dense(case: Case, device: torch.device, dtype: torch.dtype, inference: bool = False) -> Job:
    mlp = Mlp(case.width, case.hidden).to(device)
    x_TD = torch.randn(case.num_tokens * case.top_k, case.width, device=device)
    return _job(mlp, x_TD, (), dtype, inference)


def _experts(
    case: Case, device: torch.device, dtype: torch.dtype, *, keep_casts=False, dropless=False, inference=False
) -> Job:
    experts = Experts(case.num_experts, case.width, case.hidden, case.width, nn.GELU(), device=device)
    if keep_casts:
        experts.keep_casts()
    routing = given_routing(case, device, dropless)
    if not inference:
        routing.weights_GSK.requires_grad_()
    return _job(experts, torch.randn(case.num_tokens, case.width, device=device), (routing,), dtype, inference)


def _layer(
    case: Case, device: torch.device, dtype: torch.dtype, config: MoeConfig, *, keep_casts=False, inference=False
) -> Job:
    layer = MoeMlp(case.width, case.hidden, moe=config, device=device)
    if keep_casts:
        layer.experts.keep_casts()
    x = torch.randn(case.images, case.tokens, case.width, device=device)
    return _job(layer, x, (), dtype, inference)


def _plain(config: MoeConfig) -> MoeConfig:
    return MoeConfig(
        num_experts=config.num_experts, top_k=config.top_k, capacity_factor=config.capacity_factor, noise_std=0.0
    )


def _job(module: nn.Module, x: Tensor, others: tuple, dtype: torch.dtype, inference: bool) -> Job:
    """A forward and backward pass, or a forward pass alone in eval mode with the weights in `dtype`."""
    if inference:
        module.to(dtype).eval()
        x = x.to(dtype)

        @torch.inference_mode()
        def infer():
            return module(x, *others)

        return infer
    x.requires_grad_()
    learned = [x, *module.parameters(), *(o.weights_GSK for o in others)]
    cotangent = torch.randn(x.shape, device=x.device, dtype=dtype)

    def step():
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            y = module(x, *others)
        for tensor in learned:
            tensor.grad = None
        loss = getattr(module, "last_auxiliary_loss", None)
        if loss is None:
            y.backward(cotangent)
        else:
            torch.autograd.backward([y, loss], [cotangent, torch.ones_like(loss)])

    return step


def _in_graph(case: Case, device: torch.device, dtype: torch.dtype, config: MoeConfig) -> Job:
    """The layer's step, captured once and replayed."""
    step = _layer(case, device, dtype, config)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _is_wanted(name: str, only: list[str] | None) -> bool:
    return name.startswith("dense") or only is None or any(name.startswith(wanted) for wanted in only)


def baseline_of(name: str) -> str:
    """The dense job that a job is compared with."""
    return "dense inference" if name.endswith("inference") else "dense"
