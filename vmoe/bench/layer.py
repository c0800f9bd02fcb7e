"""Benchmark of one MoE layer beside timm's dense `Mlp` on K times as many tokens: equal active FLOPs.

"experts": dispatch, expert MLPs and combine for a given routing. "layer": the whole MoeMlp with router, noise, balance
losses, batch priority in groups of 8 images. Forward and backward pass, parameters in float32 under autocast;
"inference" is the forward pass alone with the weights in the low type.
"""

from collections.abc import Callable

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config

from vmoe.bench import peers
from vmoe.bench.cases import LayerCase, given_routing
from vmoe.bench.timing import Measurement, Say, TimedJob, matmul_peak, reason_of_failure, release, time_jobs
from vmoe.moe import MoeConfig, MoeMlp
from vmoe.moe.experts import Experts, ExpertSpec

LAYER_CALLS_ON_GPU = 4  # between two readings of the clock
SQUARE_ON_GPU, SQUARE = 8192, 1024  # a product that any device is good at


def benchmark_layer(
    case: LayerCase,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    only: list[str] | None = None,
    with_peers: bool = False,
    say: Say | None = None,
) -> tuple[dict[str, Measurement], float]:
    """Times the jobs of `layer_jobs`, and with `with_peers` those of `vmoe.bench.peers`.

    Args:
        case: The sizes.
        device: Where to run.
        dtype: Of autocast, or float32 for none.
        rounds: How often each job is timed.
        only: Beginnings of the names of the jobs to run, beside the dense ones; None for all, but for the compiled ones
            off the GPU, where a compiler of C++ may be missing.
        with_peers: Whether to add the peers, each of which is checked first.
        say: Told what is being done.

    Returns:
        A measurement a job, and the best rate of the dense layer's matrix products and of a large square one in FLOP/s.

    Raises:
        DeviceLost: A job left the device unusable.
    """
    torch.compiler.reset()  # the graphs of an earlier case
    makers = layer_jobs(case, device, dtype)
    if with_peers:
        makers |= peer_jobs(case, device, dtype)
    makers = {name: make for name, make in makers.items() if _is_wanted(name, only, device)}
    square = SQUARE_ON_GPU if device.type == "cuda" else SQUARE
    peak = matmul_peak(device, dtype, [*case.product_shapes, (square, square, square)])
    jobs, failed = {}, {}
    for name, make in makers.items():
        if say is not None:
            say(f"making {name}")
        try:
            jobs[name] = make()
        except Exception as error:  # one variant that cannot be built must not end the others
            failed[name] = Measurement(error=reason_of_failure(name, error, device))
    with dynamo_config.patch(fail_on_recompile_limit_hit=True):  # else it would quietly not be compiled
        measured = time_jobs(jobs, device, rounds, LAYER_CALLS_ON_GPU if device.type == "cuda" else 1, say)
    for name, result in measured.items():
        if "CUDA graph" in name:
            result.peak_mib = None  # taken when it was captured, not when it is replayed
    jobs.clear()
    release(device)
    results = measured | failed
    return {name: results[name] for name in makers}, peak


def layer_jobs(case: LayerCase, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], TimedJob]]:
    """Makers of the jobs, by name; "X inference" is compared with "dense inference", all others with "dense"."""
    config = case.moe()
    place = (case, device, dtype)
    jobs = {
        "dense": lambda: _dense_job(*place),
        "dense, compiled": lambda: _dense_job(*place, compiled=True),
        "experts": lambda: _experts_job(*place),
        "experts, casts kept": lambda: _experts_job(*place, keep_casts=True),
        "experts, recomputed": lambda: _experts_job(*place, recompute=True),
        "experts, dropless": lambda: _experts_job(*place, dropless=True),
        "layer": lambda: _layer_job(*place, config),
        "layer, casts kept": lambda: _layer_job(*place, config, keep_casts=True),
        "layer, no noise, no priority": lambda: _layer_job(*place, _plain(config)),
        "layer, dropless": lambda: _layer_job(*place, case.moe(capacity_factor=None, batch_priority=False)),
        "layer, compiled": lambda: _layer_job(*place, config, compiled=True),
        "dense inference": lambda: _dense_job(*place, inference=True),
        "experts inference": lambda: _experts_job(*place, inference=True),
        "layer inference": lambda: _layer_job(*place, config, inference=True),
    }
    if device.type == "cuda":
        jobs["dense, CUDA graph"] = lambda: _Replay(_dense_job(*place), device)
        jobs["layer, CUDA graph"] = lambda: _Replay(_layer_job(*place, config), device)
    else:
        del jobs["experts, recomputed"]  # only the GPU's kernels do
    if dtype == torch.float32:
        for name in ("experts, casts kept", "layer, casts kept"):
            del jobs[name]  # nothing is cast
    return jobs


def peer_jobs(case: LayerCase, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], TimedJob]]:
    """Makers of other implementations of the experts with a given routing, each checked against float64 when made."""

    def make(peer: type[nn.Module]) -> TimedJob:
        peers.check(peer, case, device, dtype)
        return _given_routing_job(peer(case, device), case, device, dtype)

    return {f"peer: {name}": lambda peer=peer: make(peer) for name, peer in peers.PEERS.items()}


def _dense_job(case: LayerCase, device: torch.device, dtype: torch.dtype, inference=False, compiled=False) -> TimedJob:
    mlp = Mlp(case.width, case.hidden).to(device)
    if compiled:
        mlp.compile(dynamic=False)
    x_TD = torch.randn(case.num_tokens * case.top_k, case.width, device=device)
    return _pass_over(mlp, x_TD, (), dtype, inference)


def _experts_job(
    case: LayerCase, device: torch.device, dtype: torch.dtype, *, keep_casts=False, recompute=False, dropless=False,
    inference=False,
) -> TimedJob:  # fmt: skip
    spec = ExpertSpec(case.width, case.hidden, case.width, nn.GELU())
    experts = Experts(case.num_experts, spec, recompute_activation=recompute, device=device)
    if keep_casts:
        experts.keep_casts()
    return _given_routing_job(experts, case, device, dtype, dropless, inference)


def _given_routing_job(module: nn.Module, case: LayerCase, device, dtype, dropless=False, inference=False) -> TimedJob:
    routing = given_routing(case, device, dropless)
    if not inference:
        routing.weights_GSK.requires_grad_()
    return _pass_over(module, torch.randn(case.num_tokens, case.width, device=device), (routing,), dtype, inference)


def _layer_job(
    case: LayerCase, device: torch.device, dtype: torch.dtype, config: MoeConfig, *, keep_casts=False, inference=False,
    compiled=False,
) -> TimedJob:  # fmt: skip
    layer = MoeMlp(case.width, case.hidden, moe=config, device=device)
    if keep_casts:
        layer.experts.keep_casts()
    if compiled:
        layer.compile(dynamic=False)
    x = torch.randn(case.images, case.tokens, case.width, device=device)
    return _pass_over(layer, x, (), dtype, inference)


def _plain(config: MoeConfig) -> MoeConfig:
    return MoeConfig(
        num_experts=config.num_experts, top_k=config.top_k, capacity_factor=config.capacity_factor, noise_std=0.0
    )


def _pass_over(module: nn.Module, x: Tensor, others: tuple, dtype: torch.dtype, inference: bool) -> TimedJob:
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
        loss = getattr(module, "last_auxiliary_loss", None)
        if loss is None:
            y.backward(cotangent.to(y.dtype))
        else:
            torch.autograd.backward([y, loss], [cotangent.to(y.dtype), torch.ones_like(loss)])
        for tensor in learned:
            tensor.grad = None  # so that a call's memory holds its gradients

    return step


class _Replay:
    """A step captured in a CUDA graph; holds the step as well, whose module and tensors the graph reads and writes."""

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
