"""Benchmark of one MoE layer beside timm's dense `Mlp` on K times as many tokens: equal active FLOPs.

"experts" is dispatch, expert MLPs and combine for a given routing. "layer" is the whole MoeMlp with router, noise,
balance losses, and batch priority in groups of 8 images. Both are timed forward and backward, with float32 parameters
under autocast. "inference" is the forward pass alone with the weights in the low type.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config

from vmoe.bench import peers
from vmoe.bench.cases import LayerCase, given_routing
from vmoe.bench.timing import Log, Measurement, TimedJob, matmul_peak, silent, time_made_jobs
from vmoe.compiling import mend_compiler
from vmoe.moe import MoeConfig, MoeMlp, Routing
from vmoe.moe.experts import Experts, ExpertSpec

SQUARE_ON_GPU, SQUARE = 8192, 1024  # side of a square product, which any device computes fast


def benchmark_layer(
    case: LayerCase,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    only: list[str] | None = None,
    with_peers: bool = False,
    log: Log = silent,
) -> tuple[dict[str, Measurement], float]:
    """Times the jobs of `layer_jobs`, and with `with_peers` those of `vmoe.bench.peers`.

    `only` holds prefixes of the jobs to run beside the dense ones. Without it a GPU runs all jobs, and a CPU those that
    are not compiled, since a C++ compiler may be missing. Autocast is to `dtype` (float32: none).

    Returns:
        A measurement per job, and the best rate in FLOP/s of the dense layer's products and of a large square product.

    Raises:
        DeviceLost: A job left the device unusable.
    """
    torch.compiler.reset()  # drops the graphs of an earlier case
    mend_compiler()
    makers = layer_jobs(case, device, dtype)
    if with_peers:
        makers |= peer_jobs(case, device, dtype)
    makers = {name: make for name, make in makers.items() if _is_wanted(name, only, device)}
    square = SQUARE_ON_GPU if device.type == "cuda" else SQUARE
    peak = matmul_peak(device, dtype, [*case.product_shapes, (square, square, square)])
    with dynamo_config.patch(fail_on_recompile_limit_hit=True):  # else the job would silently run without compilation
        measured = time_made_jobs(makers, device, rounds, calls_at_once(device), log)
    for name, result in measured.items():
        if "CUDA graph" in name:
            result.peak_mib = None  # a graph takes its memory at capture, not in a replay
    return measured, peak


def calls_at_once(device: torch.device) -> int:
    """The number of calls of a layer between two readings of the clock."""
    return 4 if device.type == "cuda" else 1


def layer_jobs(case: LayerCase, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], TimedJob]]:
    """Makers of the jobs, by name; "X inference" is compared with "dense inference", all others with "dense"."""
    make, config = _LayerMaker(case, device, dtype), case.moe()
    dropless = case.moe(capacity_factor=None, batch_priority=False)
    jobs = {
        "dense": make.dense,
        "dense, compiled": lambda: make.dense(compiled=True),
        "experts": make.experts,
        "experts, casts kept": lambda: make.experts(keep_casts=True),
        "experts, recomputed": lambda: make.experts(recompute=True),
        "experts, dropless": lambda: make.experts(dropless=True),
        "layer": lambda: make.layer(config),
        "layer, casts kept": lambda: make.layer(config, keep_casts=True),
        "layer, no noise, no priority": lambda: make.layer(_plain(config)),
        "layer, dropless": lambda: make.layer(dropless),
        "layer, compiled": lambda: make.layer(config, compiled=True),
        "dense inference": lambda: make.dense(inference=True),
        "experts inference": lambda: make.experts(inference=True),
        "layer inference": lambda: make.layer(config, inference=True),
    }
    if device.type == "cuda":
        jobs["dense, CUDA graph"] = lambda: _Replay(make.dense(), device)
        jobs["layer, CUDA graph"] = lambda: _Replay(make.layer(config), device)
    else:
        del jobs["experts, recomputed"]  # only the GPU's kernels can recompute
    if dtype == torch.float32:
        for name in ("experts, casts kept", "layer, casts kept"):
            del jobs[name]  # in float32 there are no casts to keep
    return jobs


def peer_jobs(case: LayerCase, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], TimedJob]]:
    """Makers of other implementations of the experts with a given routing, each checked against float64 when made."""

    def make(peer: type[nn.Module]) -> TimedJob:
        peers.check(peer, case, device, dtype)
        return _LayerMaker(case, device, dtype).with_given_routing(peer(case, device))

    return {f"peer: {name}": lambda peer=peer: make(peer) for name, peer in peers.PEERS.items()}


@dataclass(frozen=True)
class _LayerMaker:
    """Makes jobs of one case on a device, in a type."""

    case: LayerCase
    device: torch.device
    dtype: torch.dtype

    def dense(self, *, inference: bool = False, compiled: bool = False) -> TimedJob:
        """Timm's Mlp on K times as many tokens."""
        mlp = Mlp(self.case.width, self.case.hidden).to(self.device)
        if compiled:
            mlp.compile(dynamic=False)
        x_TD = torch.randn(self.case.num_tokens * self.case.top_k, self.case.width, device=self.device)
        return _pass_over(mlp, x_TD, [], self.dtype, inference)

    def experts(
        self, *, keep_casts: bool = False, recompute: bool = False, dropless: bool = False, inference: bool = False
    ) -> TimedJob:
        """The experts with a given routing."""
        case = self.case
        spec = ExpertSpec(case.width, case.hidden, case.width, nn.GELU())
        experts = Experts(case.num_experts, spec, recompute_activation=recompute, device=self.device)
        if keep_casts:
            experts.keep_casts()
        return self.with_given_routing(experts, dropless=dropless, inference=inference)

    def with_given_routing(self, module: nn.Module, *, dropless: bool = False, inference: bool = False) -> TimedJob:
        """A job of a module that takes tokens and a routing."""
        routing = given_routing(self.case, self.device, dropless)
        if not inference:
            routing.weights_GSK.requires_grad_()
        x_TD = torch.randn(self.case.num_tokens, self.case.width, device=self.device)
        return _pass_over(module, x_TD, [routing], self.dtype, inference)

    def layer(
        self, config: MoeConfig, *, keep_casts: bool = False, inference: bool = False, compiled: bool = False
    ) -> TimedJob:
        """The whole layer."""
        layer = MoeMlp(self.case.width, self.case.hidden, moe=config, device=self.device)
        if keep_casts:
            layer.experts.keep_casts()
        if compiled:
            layer.compile(dynamic=False)
        x = torch.randn(self.case.images, self.case.tokens, self.case.width, device=self.device)
        return _pass_over(layer, x, [], self.dtype, inference)


def _plain(config: MoeConfig) -> MoeConfig:
    return MoeConfig(
        num_experts=config.num_experts, top_k=config.top_k, capacity_factor=config.capacity_factor, noise_std=0.0
    )


def _pass_over(module: nn.Module, x: Tensor, others: list[Routing], dtype: torch.dtype, inference: bool) -> TimedJob:
    """A forward and backward pass. With `inference`, a forward pass in eval mode with the weights in `dtype`."""
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
        loss = getattr(module, "last_auxiliary_loss", None)
        if loss is None:
            y.backward(cotangent.to(y.dtype))
        else:
            torch.autograd.backward([y, loss], [cotangent.to(y.dtype), torch.ones_like(loss)])
        for tensor in learned:
            tensor.grad = None  # so that the memory of a call includes its gradients

    return step


class _Replay:
    """A step captured in a CUDA graph; it holds the step, since the graph reads and writes its module and tensors."""

    def __init__(self, step: TimedJob, device: torch.device) -> None:
        self.step = step
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()

    def __call__(self) -> None:
        self.graph.replay()


def _is_wanted(name: str, only: list[str] | None, device: torch.device) -> bool:
    if only is None:
        return device.type == "cuda" or "compiled" not in name
    return name in ("dense", "dense inference") or any(name.startswith(wanted) for wanted in only)


def baseline_of(name: str) -> str:
    """The dense job that a job is compared with."""
    return "dense inference" if name.endswith("inference") else "dense"
