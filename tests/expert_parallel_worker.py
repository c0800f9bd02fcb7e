"""Run by torchrun in two processes: MoE layers with and without expert parallelism on the same images.

With the argument "cuda" on two GPUs, in float32, where the kernels of the backend `fused` serve; with "interpreted"
these on the CPU, by Triton's interpreter.
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn

from vmoe.moe import MoeConfig, MoeMlp, parallel
from vmoe.moe.kernels import fused
from vmoe.moe.parallel import DistributedExperts, deal_out_experts
from vmoe.training.processes import connect, disconnect, new_mesh

LAYERS = {
    "capacity": {"capacity_factor": 0.6, "batch_priority": True},
    "without capacity": {"capacity_factor": None},
    "evaluated with a capacity": {"eval_capacity_factor": 0.5},
    "expert choice": {"router": "expert_choice", "noise_std": 0.0},
    "soft": {"router": "soft", "noise_std": 0.0},
    "shared experts": {"shared_experts": 1},
    "norm": {},
}


(HOW,) = sys.argv[1:]
DEVICE = torch.device("cuda" if HOW == "cuda" else "cpu")
DTYPE = torch.float64 if HOW == "cpu" else torch.float32
TOLERANCE = {} if HOW == "cpu" else {"rtol": 1e-4, "atol": 1e-5}
handed: set[type] = set()  # to backends; kernels read the memory, which a stand-in for a tensor does not have


def choose_backend(x_TD: torch.Tensor, choices, mlp, *others):
    """The layer's own choice, of whose tokens the type is kept."""
    handed.add(type(x_TD))
    if HOW == "interpreted" and fused.what_it_lacks(mlp) is None and x_TD.shape[0]:
        return fused
    return own_choice(x_TD, choices, mlp, *others)


own_choice, parallel.choose_backend = parallel.choose_backend, choose_backend
if HOW == "interpreted":
    parallel.fused_for = lambda tensor: fused


def check(name: str, training: bool) -> None:
    """Compares results, and the gradients of tokens and parameters, of a layer in one process and in two."""
    torch.manual_seed(0)
    options = {"num_experts": 4, "group": 2, "noise_std": 0.0, "capacity_multiple_of": 1, **LAYERS[name]}
    options["group"] = "image" if options.get("router") in ("expert_choice", "soft") else 2
    norm = nn.LayerNorm if name == "norm" else None
    layer = MoeMlp(8, 16, norm_layer=norm, moe=MoeConfig(**options), tokens=5, dtype=DTYPE, device=DEVICE)
    layer.train(training)
    mine = copy.deepcopy(layer)
    deal_out_experts(mine, new_mesh(DEVICE.type, (2,)))
    assert isinstance(mine.experts, DistributedExperts) and mine.experts.fc1.weight.to_local().shape[0] == 2
    counts = [4, 4] if training else [4, 3]  # evaluation's last batch may be smaller
    images = torch.randn(sum(counts), 5, 8, dtype=DTYPE, device=DEVICE)
    own = images.split(counts)[dist.get_rank()].clone().requires_grad_()
    images.requires_grad_()
    expected, result = layer(images), mine(own)
    torch.testing.assert_close(result, expected.split(counts)[dist.get_rank()], **TOLERANCE)
    expected.square().sum().div(2).backward()  # the mean of the processes' losses
    result.square().sum().backward()
    torch.testing.assert_close(own.grad, 2 * images.grad.split(counts)[dist.get_rank()], **TOLERANCE)
    gradients = dict(layer.named_parameters())
    for parameter_name, parameter in mine.experts.named_parameters():
        expected = gradients[f"experts.{parameter_name}"].grad
        torch.testing.assert_close(parameter.grad.full_tensor(), expected, **TOLERANCE)
    if dist.get_rank() == 0:
        print(f"{name}: as in one process")


connect(DEVICE.type)
for layer_name in LAYERS:
    check(layer_name, training=True)
    check(layer_name, training=False)
assert handed == {torch.Tensor}, handed
disconnect()
