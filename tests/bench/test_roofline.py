"""What must be computed and moved, by hand; and which kernels the stages are."""

import re
from pathlib import Path

import pytest
import torch

import vmoe
from vmoe.bench.cases import LayerCase
from vmoe.bench.roofline import KERNELS, draw_roofline, layer_floors, layer_work, stage_of, stage_work
from vmoe.bench.timing import Measurement

CASE = LayerCase(width=2, hidden=5, num_experts=3, top_k=2, images=1, tokens=7)  # T=7, R=14


def test_work_of_a_layer():
    # forward and backward: 3 * 2 products * 2 * 14 rows * 2 * 5
    assert layer_work(CASE, "experts", torch.bfloat16).flops == 3 * 2 * 2 * 14 * 10
    # x, its gradient, weights and theirs in float32; y and its gradient in bfloat16
    assert layer_work(CASE, "layer", torch.bfloat16).bytes == 2 * 4 * (14 + 60) + 2 * 2 * 14
    # the dense twin has one expert's weights and K times the tokens
    assert layer_work(CASE, "dense", torch.bfloat16).bytes == 2 * 4 * (28 + 20) + 2 * 2 * 28
    inference = layer_work(CASE, "experts inference", torch.bfloat16)
    assert (inference.flops, inference.bytes) == (2 * 2 * 14 * 10, 2 * (14 + 14 + 60))


def test_work_of_the_stages():
    work = stage_work(CASE, torch.bfloat16)
    # each of the six products touches rows of both widths; four read or two write all weights
    assert work["products"].bytes == 2 * 6 * (28 + 70) + 2 * 4 * 30 + 4 * 2 * 30
    assert work["products"].flops == CASE.flops
    assert work["GELU"].bytes == 2 * 2 * 70 and work["GELU, gradient"].bytes == 3 * 2 * 70
    assert work["dispatch"].bytes == 4 * 14 + 2 * 28


def test_floor_is_the_slower_of_computing_and_moving():
    results = {
        "dense": Measurement(times=[2.0]),
        "layer": Measurement(error="no"),
        "peer: loop": Measurement(times=[1.0]),
    }
    work = layer_work(CASE, "dense", torch.float32)
    (row,) = layer_floors(results, CASE, torch.float32, peak=work.flops * 1e3, bandwidth=work.bytes * 2e3)
    assert row["floor_ms"] == pytest.approx(1.0) and row["over_floor"] == pytest.approx(2.0)
    (row,) = layer_floors(results, CASE, torch.float32, peak=work.flops * 1e3, bandwidth=work.bytes * 5e2)
    assert row["floor_ms"] == pytest.approx(2.0)
    figure = draw_roofline([row, {"name": "all else", "ms": 1.0}], 1e9, 1e9, "title")
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["dense", "all else"]


def test_kernels_have_their_stages():
    assert stage_of("_activate") == "GELU" and stage_of("_activation_gradient") == "GELU, gradient"
    assert stage_of("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNN") == "products"
    assert (
        stage_of("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>") == "weights cast"
    )
    assert stage_of("_histogram") == "all else"


def test_kernels_of_the_stages_exist():
    folder = Path(vmoe.__file__).parent / "moe" / "kernels" / "experts" / "fused"
    source = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    assert set(KERNELS) <= set(re.findall(r"@triton\.jit(?:\(.*\))?\ndef (\w+)", source))
