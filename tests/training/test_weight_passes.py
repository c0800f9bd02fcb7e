"""Clipping and the average's update by Triton's kernels: bit for bit what torch's functions give."""

import pytest
import torch
from torch import nn

from vmoe.training.optim.average import WeightAverage
from vmoe.training.optim.weight_passes import scale_down

pytest.importorskip("triton", reason="the kernels need Triton")

from vmoe.training.optim import weight_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1,), (2048,), (3, 37, 41)]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("factor", [1.0, 0.3, 1 - 2**-24, float("nan")])
def test_scale_is_the_product(shape, factor):
    tensor = torch.randn(shape, device=DEVICE) * 1e-3
    by = torch.tensor(factor, device=DEVICE)
    expected = tensor * by
    weight_kernels.scale(tensor, by)
    assert torch.equal(tensor.view(torch.int32), expected.view(torch.int32)) or expected.isnan().all()
    assert torch.equal(tensor.isnan(), expected.isnan())


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("step", [0.0, 0.001, 0.37, 1.0])
def test_an_average_moves_by_the_formula(shape, step):
    average, weight = torch.randn(2, *shape, device=DEVICE)
    by = torch.tensor(step, device=DEVICE)
    difference = weight - average
    difference *= by
    expected = average + difference
    weight_kernels.move(average, weight, by)
    assert torch.equal(average, expected)


@pytest.mark.parametrize("largest_norm", [1e-3, 1e9, float("inf")])
def test_large_and_small_gradients_are_clipped_as_by_torch(largest_norm):
    shapes = [(1024, 1100), (3,), (), (7, 5)]
    parameters = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
    for parameter in parameters[:3]:
        parameter.grad = torch.randn_like(parameter)
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for parameter, twin in zip(parameters[:3], twins[:3], strict=True):
        twin.grad = parameter.grad.clone()
    norm = nn.utils.clip_grad_norm_(twins, largest_norm)
    scale_down(parameters, largest_norm, norm)
    assert parameters[3].grad is None
    assert all(torch.equal(p.grad, t.grad) for p, t in zip(parameters[:3], twins[:3], strict=True))


def test_large_and_small_weights_enter_the_average():
    model = nn.Sequential(nn.Linear(1100, 1024), nn.Linear(1024, 3)).to(DEVICE)
    average = WeightAverage(model, 0.9)
    average.to(torch.device(DEVICE))
    before = {name: weight.clone() for name, weight in average.weights.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update(torch.zeros((), device=DEVICE))
    for name, parameter in model.named_parameters():
        step = 1 - torch.tensor(0.1, device=DEVICE)
        assert torch.equal(average.weights[name], before[name] + (parameter.detach() - before[name]) * step), name
