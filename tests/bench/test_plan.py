"""The planner beside real models: weights exactly, activations by what autograd keeps, traffic by the formula."""

import dataclasses
from enum import Enum

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from vmoe.bench.plan.hardware import Machine
from vmoe.bench.plan.layouts import MeshLayout, ParameterCounts, kept_parameters
from vmoe.bench.plan.planner import LayoutPlan, Traces, layouts_for, make_plans
from vmoe.bench.plan.trace import saved_bytes, trace_step
from vmoe.bench.plan.workload import Workload
from vmoe.checkpoints import build_model
from vmoe.moe import MoeConfig, auxiliary_loss
from vmoe.training.parallel import gradient_means
from vmoe.training.parallel.collectives import local
from vmoe.training.parallel.gradient_means import GradientMeans
from vmoe.training.parallel.sharding import shard_model

SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 4}
MOE = MoeConfig(layers=[0, 2], num_experts=8, top_k=2, group=2, batch_priority=True)
GPU = Machine.of("h100-80g")
CPU = dataclasses.replace(GPU, name="cpu")
_traces: dict[str, Traces] = {}


def workload(moe: MoeConfig | None = MOE, batch: int = 8, **changes) -> Workload:
    return Workload("vit_tiny_patch16_224", SMALL, moe, 10, 64, batch, **({"dtype": torch.float32} | changes))


def plans_of(
    layouts: list[MeshLayout], planned: Workload, machine: Machine = GPU, network: float = 50e9
) -> list[LayoutPlan]:
    """The plans of some layouts; tests share the traces, which know nothing of rates."""
    key = repr((planned._replace(batch=0, accumulate=1), machine.name))
    return make_plans(planned, layouts, machine, network, traces=_traces.setdefault(key, {}))


def plan_of(layout: MeshLayout, planned: Workload, machine: Machine = GPU) -> LayoutPlan:
    return plans_of([layout], planned, machine)[0]


def bytes_of(tensors) -> int:
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def real_model(moe: MoeConfig | None = MOE) -> torch.nn.Module:
    return build_model("vit_tiny_patch16_224", SMALL, moe, 10, 64).train()


@pytest.fixture
def four_processes():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("moe", [None, MOE])
def test_weights_gradients_and_moments_of_one_process(moe):
    model = real_model(moe)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    (F.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.zeros(2).long()) + auxiliary_loss(model)).backward()
    optimizer.step()
    memory = plan_of(MeshLayout("none", 1), workload(moe)).memory
    assert memory.parameters == bytes_of(model.parameters())
    assert memory.gradients == bytes_of(parameter.grad for parameter in model.parameters())
    assert memory.optimizer == bytes_of(s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize(
    ("expert_size", "dense"), [(1, "shard"), (2, "shard"), (4, "shard"), (2, "whole"), (4, "whole")]
)
def test_weights_of_the_first_of_four_processes(four_processes, expert_size, dense):
    model = real_model()
    counts = ParameterCounts.of(model)
    shard_model(model, 4, expert_size, "cpu", dense == "whole")
    layout = MeshLayout("fsdp" if expert_size == 1 else "expert", 4, expert_size, dense)
    assert 4 * kept_parameters(counts, layout) == bytes_of(model.parameters())


@pytest.mark.parametrize(
    ("moe", "dtype"),
    [
        (None, torch.bfloat16),
        (MOE, torch.float32),
        (MOE, torch.bfloat16),
        (dataclasses.replace(MOE, capacity_factor=None), torch.float32),
    ],
)
def test_activations_are_what_autograd_keeps(moe, dtype):
    model = real_model(moe)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), saved_bytes(weights) as saved:
        loss = F.cross_entropy(model(torch.randn(8, 3, 64, 64)), torch.zeros(8).long()) + auxiliary_loss(model)
    with torch.device("meta"):
        planned = real_model(moe)
    assert trace_step(planned, 8, 64, dtype, like_gpu=False).saved == pytest.approx(saved(), rel=0.1)
    assert loss.isfinite()


def test_tokens_on_their_way_by_the_formula():
    moe = dataclasses.replace(MOE, capacity_multiple_of=1)
    plain, exchanged = (
        plan_of(layout, workload(moe)).sent for layout in (MeshLayout("fsdp", 4), MeshLayout("expert", 4, 4))
    )
    tokens, width, layers = 2 * 17, 64, 2  # of a process
    of_tokens = layers * 4 * moe.top_k * moe.capacity_factor * tokens * width * 4 * 3 / 4
    experts = layers * 8 * (64 * 256 * 2 + 256 + 64)
    of_experts = 3 * 4 * experts * 3 / 4
    assert exchanged - (plain - of_experts) == pytest.approx(of_tokens, rel=0.05)  # capacities are whole numbers


def test_dense_gradients_are_averaged_once_an_update_and_not_gathered():
    layouts = [MeshLayout("expert", 4, 4), MeshLayout("expert", 4, 4, "whole")]
    dense = sum(parameter.numel() for name, parameter in real_model().named_parameters() if ".experts." not in name)
    for accumulate in (1, 2):
        sharded, whole = (plan_of(layout, workload(accumulate=accumulate)) for layout in layouts)
        tokens = sharded.sent - accumulate * 3 * 4 * dense * 3 / 4
        assert whole.sent == pytest.approx(tokens + 2 * 4 * dense * 3 / 4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_averaging_hides_behind_the_backward_pass_of_an_update_s_only_batch(accumulate):
    layout, planned = MeshLayout("expert", 4, 4, "whole"), workload(batch=4096, accumulate=accumulate)
    free, slow = (plan_of(layout, planned, dataclasses.replace(GPU, link=link)) for link in (1e30, 1e11))
    dense = sum(parameter.numel() for name, parameter in real_model().named_parameters() if ".experts." not in name)
    waited_for = slow.sent - (2 * 4 * dense * 3 / 4 if accumulate == 1 else 0)
    assert slow.times.network - free.times.network == pytest.approx(waited_for / 1e11)


def test_experts_are_gathered_only_where_they_are_sharded_further():
    whole, further = (plan_of(MeshLayout("expert", 4, size, "whole"), workload(batch=128)) for size in (4, 2))
    layer = 8 * (64 * 256 * 2 + 256 + 64) * 4
    assert further.memory.buffers - whole.memory.buffers == 5 * layer // 2  # of 2, as they arrive too; a gradient
    assert further.times.host > whole.times.host


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity_factor": None, "expert_dropout": 0.1},
        {"router": "soft", "group": "image"},
        {"router": "hash", "noise_std": 0.0},
    ],
)
def test_other_kinds_of_layers_are_planned(changes):
    moe = dataclasses.replace(MOE, **changes, importance_loss_weight=0.0, load_loss_weight=0.0, batch_priority=False)
    plans = plans_of([MeshLayout("fsdp", 4), MeshLayout("expert", 4, 2)], workload(moe))
    assert all(plan.missing is None and plan.times.step > 0 for plan in plans)


def test_peak_counts_old_gradients_beside_the_forward_pass():
    memory = plan_of(MeshLayout("none", 1), workload()).memory
    with torch.device("meta"):
        trace = trace_step(real_model(), 8, 64, torch.float32)
    forward = max(moment.live for moment in trace.moments if not moment.is_backward)
    assert memory.peak >= forward + memory.parameters + memory.gradients + memory.optimizer


def test_layouts_best_first_and_the_others_with_what_is_missing():
    tight = dataclasses.replace(GPU, memory=plan_of(MeshLayout("fsdp", 4), workload()).memory.peak + 1)
    plans = plans_of(layouts_for(4, MOE), workload(), tight)
    feasible = [plan for plan in plans if plan.missing is None]
    experts = {f"expert {size}{dense}" for size in (2, 4) for dense in ("", ", dense whole")}
    assert {str(plan.layout) for plan in plans} == {"ddp", "fsdp", *experts}
    assert plans[: len(feasible)] == feasible and str(plans[-1].layout) == "ddp"
    assert "too few" in plans[-1].missing


def test_a_slower_network_costs_experts_more():
    layouts = [MeshLayout("expert", 16, 8), MeshLayout("expert", 16, 16)]
    many = dataclasses.replace(MOE, num_experts=16)
    fast, slow = (
        {plan.layout.expert_size: plan.times.step for plan in plans_of(layouts, workload(many, 64), GPU, bandwidth)}
        for bandwidth in (50e9, 1e9)
    )
    assert slow[16] - fast[16] > slow[8] - fast[8] >= -1e-12  # sums are rounded


def test_more_processes_than_the_experts_width_divides_into():
    planned = workload(dataclasses.replace(MOE, num_experts=2), 2 * 384)
    plan = plan_of(MeshLayout("expert", 384, 2), planned)
    assert "cannot be sharded over 192 ranks" in plan.missing


@pytest.mark.parametrize(
    ("images", "bucket", "accumulate"), [(2, 2**14, 1), pytest.param(32, 2**24, 2, marks=pytest.mark.slow)]
)
def test_memory_with_the_dense_part_whole_is_as_torchs_tracker_sees_it(
    four_processes, monkeypatch, images, bucket, accumulate
):
    monkeypatch.setattr(gradient_means, "BUCKET", bucket)  # with few images it is the averaging that needs most
    with torch.device("meta"):
        model = real_model()
    shard_model(model, 4, 4, "cpu", dense_is_whole=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        inputs, labels = torch.randn(images, 3, 64, 64), torch.zeros(images, dtype=torch.int64)
        means = GradientMeans(model.parameters(), accumulate == 1)

        def update():
            for batch in range(accumulate):
                loss = F.cross_entropy(model(inputs), labels) + auxiliary_loss(model)
                if batch == 0:
                    optimizer.zero_grad()
                loss.backward()
                tracker.reset_mod_stats()
            means.finish()
            optimizer.step()

        tracker = MemTracker()
        update()  # the first time fake operators make tensors that they never make again
        for state in optimizer.state.values():
            state["step"] = torch.tensor(0.0)  # with the same step size: for another, torch 2.11 makes them again
        tracker.track_external(model, optimizer, inputs, labels)
        with tracker:
            update()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    planned = workload(batch=4 * images, accumulate=accumulate)
    memory = plan_of(MeshLayout("expert", 4, 4, "whole"), planned, CPU).memory
    assert memory.peak == pytest.approx(peak, rel=0.02)


def test_fsdp_memory_is_as_torchs_tracker_sees_it(four_processes):
    with torch.device("meta"):
        model = real_model(None)
    shard_model(model, 4, 1, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        tracker = FSDPMemTracker(model, optimizer)
        images, labels = torch.randn(32, 3, 64, 64), torch.zeros(32, dtype=torch.int64)
        tracker.track_inputs((images, labels))
        with tracker:
            for number in range(2):
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if number == 0:
                    tracker.reset_mod_stats()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    memory = plan_of(MeshLayout("fsdp", 4), workload(None, batch=128), CPU).memory
    seen = {kind.name: size for kind, size in peak.items() if isinstance(kind, Enum)}
    assert memory.parameters == seen["SHARDED_PARAM"]
    assert memory.optimizer == seen["OPT"] - 4 * len(optimizer.state)  # the steps' numbers
    assert memory.peak == pytest.approx(peak["Total"], rel=0.1)
