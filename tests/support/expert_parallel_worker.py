"""Compares MoE layers with and without expert parallelism on the same images, in two processes.

Each argument is a way to compute them: "cpu" in float64; "cuda" on two GPUs in float32, with the backend `fused`;
"interpreted" with that backend on the CPU, in Triton's interpreter.
"""

import copy
import sys

import torch
import torch.distributed as dist
from gloo_threads import gloo_threads
from timm.models.metaformer import StarReLU
from torch import nn
from torch.distributed.tensor import DTensor

from vmoe.moe import MoeConfig, MoeMlp, parallel
from vmoe.moe import layer as layer_module
from vmoe.moe.kernels import Kernels
from vmoe.moe.kernels.experts import fused, requirements
from vmoe.moe.parallel import DistributedExperts, shard_experts
from vmoe.training.parallel.collectives import connect, disconnect, new_mesh

LAYERS = {
    "capacity": {"capacity_factor": 0.6, "batch_priority": True},
    "without capacity": {"capacity_factor": None},
    "evaluated with a capacity": {"eval_capacity_factor": 0.5},
    "expert choice": {"router": "expert_choice", "noise_std": 0.0},
    "soft": {"router": "soft", "noise_std": 0.0},
    "shared experts": {"shared_experts": 1},
    "whole images": {"route": "image", "capacity_factor": None},
    "norm": {},
    "learned activation": {},
    "learned activation without capacity": {"capacity_factor": None},
}

INTERPRETED = Kernels(None, fused)  # whatever the device

handed: set[type] = set()  # types of tensors that backends get; kernels need tensors with memory
own_choice, own_kernels = parallel.choose_backend, layer_module.kernels_for


def choose_backend(x_TD: torch.Tensor, choices, mlp, name, kernels):
    """Makes the layer's own choice, and records the type of its tokens."""
    handed.add(type(x_TD))
    if kernels is INTERPRETED:
        return fused if requirements.missing_feature(mlp) is None and x_TD.shape[0] else own_choice(x_TD, choices, mlp)
    return own_choice(x_TD, choices, mlp, name, kernels)


def check(how: str, name: str, training: bool) -> None:
    """Compares results and gradients (of tokens and parameters) of a layer in one process and in two."""
    device = torch.device("cuda" if how == "cuda" else "cpu")
    dtype = torch.float64 if how == "cpu" else torch.float32
    tolerance = {} if how == "cpu" else {"rtol": 1e-4, "atol": 1e-5}
    torch.manual_seed(0)
    options = {"num_experts": 4, "group": 2, "noise_std": 0.0, "capacity_multiple_of": 1, **LAYERS[name]}
    options["group"] = "image" if options.get("router") in ("expert_choice", "soft") else 2
    norm = nn.LayerNorm if name == "norm" else None
    activation = StarReLU if name.startswith("learned") else nn.GELU
    layer = MoeMlp(
        8, 16, act_layer=activation, norm_layer=norm, moe=MoeConfig(**options), tokens=5, dtype=dtype, device=device
    ).to(device)  # timm creates activations without a device
    layer.train(training)
    mine = copy.deepcopy(layer)
    shard_experts(mine, new_mesh(device.type, (2,)))
    assert isinstance(mine.experts, DistributedExperts) and mine.experts.fc1.weight.to_local().shape[0] == 2
    counts = [4, 4] if training else [4, 3]  # evaluation's last batch may be smaller
    images = torch.randn(sum(counts), 5, 8, dtype=dtype, device=device)
    own = images.split(counts)[dist.get_rank()].clone().requires_grad_()
    images.requires_grad_()
    expected, result = layer(images), mine(own)
    torch.testing.assert_close(result, expected.split(counts)[dist.get_rank()], **tolerance)
    expected.square().sum().div(2).backward()  # the mean of both processes' losses
    result.square().sum().backward()
    torch.testing.assert_close(own.grad, 2 * images.grad.split(counts)[dist.get_rank()], **tolerance)
    gradients = dict(layer.named_parameters())
    for parameter_name, parameter in mine.experts.named_parameters():
        expected = gradients[f"experts.{parameter_name}"].grad
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        else:  # an activation's, which all processes keep whole: its gradients are averaged like all others
            assert parameter_name.startswith("act.")
            dist.all_reduce(gradient)
            gradient /= 2
        torch.testing.assert_close(gradient, expected, **tolerance)
    if dist.get_rank() == 0:
        print(f"{how}, {name}: as in one process")


parallel.choose_backend = choose_backend
for way in sys.argv[1:]:
    handed.clear()
    layer_module.kernels_for = (lambda tensor: INTERPRETED) if way == "interpreted" else own_kernels
    connect("cuda" if way == "cuda" else "cpu")
    for layer_name in LAYERS:
        check(way, layer_name, training=True)
        check(way, layer_name, training=False)
    assert handed == {torch.Tensor}, handed
disconnect()
print(f"threads of gloo: {gloo_threads()}")
