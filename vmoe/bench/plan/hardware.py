"""Rates of GPUs and networks: published peaks, and the share of them that training steps reach.

`vmoe.bench.plan.probes` measures the rates of a machine instead.
"""

from dataclasses import dataclass
from typing import NamedTuple

from vmoe.errors import UserError
from vmoe.memory import host_memory


class Gpu(NamedTuple):
    """A GPU's published figures."""

    memory: float  # GiB, as torch reports it
    bf16: float  # dense bfloat16 products, FLOP/s
    fp32: float  # float32 products outside the tensor cores, FLOP/s
    bandwidth: float  # of its memory, bytes/s
    link: float  # to the other GPUs of its machine, bytes/s in one direction
    source: str  # where the figures are from


class Network(NamedTuple):
    """A network between machines."""

    bandwidth: float  # a GPU's share, bytes/s in one direction
    source: str  # where the figure is from


GPUS = {
    "a100-40g": Gpu(39.4, 312e12, 19.5e12, 1.555e12, 300e9, "NVIDIA A100 data sheet (SXM4 40 GB)"),
    "a100-80g": Gpu(79.2, 312e12, 19.5e12, 2.039e12, 300e9, "NVIDIA A100 data sheet (SXM4 80 GB)"),
    "h100-80g": Gpu(79.2, 989e12, 67e12, 3.35e12, 450e9, "NVIDIA H100 data sheet (SXM5)"),
    "h200-141g": Gpu(139.8, 989e12, 67e12, 4.8e12, 450e9, "NVIDIA H200 data sheet (SXM)"),
    "b200-180g": Gpu(178.0, 2250e12, 80e12, 8.0e12, 900e9, "NVIDIA HGX B200 data sheet"),
    "l40s-48g": Gpu(44.4, 362e12, 91.6e12, 0.864e12, 32e9, "NVIDIA L40S data sheet; PCIe 4.0 x16"),
    "rtx4090-24g": Gpu(23.6, 165e12, 82.6e12, 1.008e12, 32e9, "NVIDIA Ada architecture white paper; PCIe 4.0 x16"),
}
NETWORKS = {
    "ib-800": Network(100e9, "InfiniBand XDR, an adapter of 800 Gbit/s a GPU"),
    "ib-400": Network(50e9, "InfiniBand NDR, an adapter of 400 Gbit/s a GPU"),
    "ib-200": Network(25e9, "InfiniBand HDR, an adapter of 200 Gbit/s a GPU"),
    "ib-100": Network(12.5e9, "InfiniBand EDR, an adapter of 100 Gbit/s a GPU"),
    "eth-100": Network(12.5e9 / 8, "Ethernet, one adapter of 100 Gbit/s for 8 GPUs"),
}
USUAL_NETWORK = "ib-400"
GPUS_PER_MACHINE = 8

# Shares of the published peaks, fitted to whole steps on one H100 and one H200 (docs/scaling_measured.md), torch 2.11
PRODUCTS = 0.79  # 758 and 785 of 989 TFLOP/s, the best rate of a ViT's products
COPY = 0.84  # 3.01 of 3.35 and 3.75 of 4.8 TB/s
ATTENTION = 0.042  # of the products' published peak: what ViT-B/16's and S/16's steps take beyond all else
# Of the rate of a copy
ELEMENTWISE = 0.94  # kernels between products
ADAMW = 0.67  # the fused update
UNHIDDEN = 0.5  # share of the products' own memory traffic that adds to their time
# Not measured: the share of a link that all-reduce and all-to-all usually reach
NETWORK = 0.8
LATENCY = 30e-6  # seconds per collective
GATHERING_CALLS = 60  # host time to gather a block's weights, in operators: roughly as on two H100s
HOST_CALL = 30e-6  # seconds in which the host issues an operator, forward or backward: 0.7 ms for a dense MLP's
USABLE = 0.94  # share of the memory that tensors can use; the rest is CUDA's own, or fragments
WORKSPACE = 32 * 2**20  # bytes of cuBLAS on Hopper


@dataclass(frozen=True)
class Machine:
    """Rates that a training step reaches on one GPU."""

    name: str  # of the GPU
    memory: float  # bytes that tensors can use
    products: float  # FLOP/s of bfloat16 products
    products32: float  # FLOP/s of float32 products
    attention: float  # FLOP/s of bfloat16 attention, both passes
    bandwidth: float  # bytes/s of a large copy; reads and writes both count
    elementwise: float  # bytes/s of the operators between products
    update: float  # bytes/s of the fused optimiser
    host_call: float  # seconds in which the host issues an operator
    link: float  # bytes/s to the other GPUs of its machine, in one direction
    count: int = GPUS_PER_MACHINE  # GPUs of a machine
    overlaps: bool = True  # whether weights and gradients can travel while a pass is computed
    is_measured: bool = False  # whether the rates are this GPU's own

    @classmethod
    def of(cls, name: str) -> "Machine":
        """The machine of a GPU in the table.

        Raises:
            UserError: The table has no such GPU.
        """
        if name == "cpu":
            return _this_cpu()
        if name not in GPUS:
            raise UserError(f"--gpu {name}: not in the table; there are {', '.join(GPUS)} and cpu")
        gpu = GPUS[name]
        copy = COPY * gpu.bandwidth
        rates = (PRODUCTS * gpu.bf16, PRODUCTS * gpu.fp32, ATTENTION * gpu.bf16, copy, ELEMENTWISE * copy, ADAMW * copy)
        return cls(name, USABLE * gpu.memory * 2**30, *rates, HOST_CALL, NETWORK * gpu.link)


def network_bandwidth(name: str) -> float:
    """Bytes/s between machines per GPU.

    Raises:
        UserError: The table has no such network.
    """
    if name not in NETWORKS:
        raise UserError(f"--network {name}: not in the table; there are {', '.join(NETWORKS)}")
    return NETWORK * NETWORKS[name].bandwidth


def gpu_of_this_machine() -> str:
    """The table's entry that is closest to this machine's GPU; "cpu" without a GPU."""
    import torch  # here: the names of GPUs and networks need no torch

    if not torch.cuda.is_available():
        return "cpu"
    properties = torch.cuda.get_device_properties(0)
    words = properties.name.lower().replace("-", " ").replace(" ", "")
    named = [name for name in GPUS if name.partition("-")[0] in words]
    return min(named or GPUS, key=lambda name: abs(GPUS[name].memory - properties.total_memory / 2**30))


def _this_cpu() -> Machine:
    """A rough estimate of this CPU, enough to compare layouts."""
    return Machine("cpu", USABLE * host_memory(), 5e10, 5e10, 2e10, 1e10, 5e9, 5e9, 1e-5, 1e9, overlaps=False)
