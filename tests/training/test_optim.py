"""Which parameters get which method, learning rate and weight decay."""

import io

import pytest
import timm
import torch

import vmoe
from vmoe import MoeConfig
from vmoe.errors import UserError
from vmoe.training.config import OptimConfig
from vmoe.training.optim.groups import build_optimizer, parameter_groups
from vmoe.training.optim.muon import Muon
from vmoe.training.optim.schedule import LearningRates
from vmoe.training.optim.timm_optimizers import checked_name

KWARGS = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 16, "num_classes": 3}


def vit(moe: MoeConfig | None = None, **kwargs) -> torch.nn.Module:
    return vmoe.create_model("vit_tiny_patch16_224", moe, **{**KWARGS, **kwargs})


def settings(model: torch.nn.Module, **options) -> dict[str, dict]:
    """The group of each parameter, by the parameter's name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(**options))
    result = {names[parameter]: group for group in groups for parameter in group["params"]}
    assert result.keys() == set(names.values())
    return result


@pytest.mark.parametrize("router", ["token_choice", "cosine", "soft"])
def test_muon_takes_matrices_of_layers_and_experts_and_adamw_the_rest(router):
    moe = MoeConfig(num_experts=4, router=router, shared_experts=1, capacity_factor=1.0)
    by_name = settings(vit(moe), name="muon", lr=2e-3, adamw_lr=1e-3)
    muons = {name for name, group in by_name.items() if group["method"] == "muon"}
    linears = ("attn.qkv", "attn.proj")
    dense = {f"blocks.{block}.{part}.weight" for block in (0, 2) for part in (*linears, "mlp.fc1", "mlp.fc2")}
    parts = (*linears, *(f"mlp.{kind}.{layer}" for kind in ("experts", "shared") for layer in ("fc1", "fc2")))
    assert muons == dense | {f"blocks.{block}.{part}.weight" for block in (1, 3) for part in parts}
    assert all(group["lr"] == (2e-3 if name in muons else 1e-3) for name, group in by_name.items())


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"])
def test_muon_finds_matrices_in_other_models(name):
    model = timm.create_model(name, num_classes=3)
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    assert isinstance(optimizer, Muon)
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    of_heads = {id(p) for head in heads for p in head.parameters()}
    muons = [p for group in optimizer.param_groups if group["method"] == "muon" for p in group["params"]]
    assert muons and not of_heads & {id(p) for p in muons}


def test_without_a_rate_of_its_own_adamw_takes_muon_s():
    assert {group["lr"] for group in settings(vit(), name="muon", lr=3e-3).values()} == {3e-3}


def test_layers_further_from_the_classifier_learn_slower():
    by_name = settings(vit(MoeConfig(num_experts=4)), lr=1.0, layer_decay=0.5)
    assert by_name["head.weight"]["lr"] == 1.0
    third, second = by_name["blocks.3.mlp.experts.fc1.weight"]["lr"], by_name["blocks.2.mlp.fc1.bias"]["lr"]
    assert third == 2 * second and third < 1
    assert by_name["patch_embed.proj.weight"]["lr"] < by_name["blocks.0.mlp.fc1.weight"]["lr"]


def test_experts_have_a_weight_decay_of_their_own():
    by_name = settings(vit(MoeConfig(num_experts=4, shared_experts=1)), weight_decay=0.1, expert_weight_decay=0.3)
    decays = {name: group["weight_decay"] for name, group in by_name.items()}
    assert decays["blocks.1.mlp.experts.fc1.weight"] == 0.3
    assert decays["blocks.1.mlp.experts.fc1.bias"] == 0
    assert decays["blocks.1.mlp.shared.fc1.weight"] == decays["blocks.0.mlp.fc1.weight"] == 0.1
    assert decays["pos_embed"] == 0
    adapted = vmoe.add_lora(vit(MoeConfig(num_experts=4)), rank=2)
    groups = parameter_groups(adapted, OptimConfig(weight_decay=0.1, expert_weight_decay=0.3))
    decay_of = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    up = {
        layer: adapted.get_parameter(f"blocks.{layer}.fc1.parametrizations.weight.0.up")
        for layer in ("0.mlp", "1.mlp.experts")
    }
    assert decay_of[up["0.mlp"]] == 0.1 and decay_of[up["1.mlp.experts"]] == 0.3


def rates(schedule: str, updates: int = 10, warmup: int = 2, decay: float = float("inf"), **options) -> list[float]:
    config = OptimConfig(lr=1.0, min_lr=0.01, schedule=schedule, **options)
    return [LearningRates(config, updates, warmup, decay).rate(step) for step in range(updates)]


def test_schedules_by_hand():
    assert rates("constant") == [0.5, *[1.0] * 9]
    assert rates("step", decay=3, decay_rate=0.5) == [0.5, 1.0, 1.0, *[0.5] * 3, *[0.25] * 3, 0.125]
    assert rates("step", decay=1, decay_rate=0.1)[3:] == [0.01] * 7  # never below min_lr
    falling = [1.0, 0.7525, 0.505, 0.2575, 0.01]  # in a line over the last four
    assert rates("warmup_stable_decay", decay=4) == pytest.approx([0.5, *[1.0] * 4, *falling])
    late = rates("warmup_stable_decay", updates=5, decay=99)  # not a jump after the warm-up
    assert late == pytest.approx([0.5, 1.0, 0.67, 0.34, 0.01])
    up_and_down = rates("one_cycle", updates=8, warmup=4)
    expected = [0.04 + 0.96 * share for share in (0.1464466, 0.5, 0.8535534, 1)]
    assert up_and_down == pytest.approx([*expected, 1.0, *(0.01 + 0.99 * share for share in (0.75, 0.25, 0))])


def test_an_endless_fit_s_rate_stays():
    for schedule in ("cosine", "constant", "step", "warmup_stable_decay", "one_cycle"):
        assert LearningRates(OptimConfig(lr=1.0, schedule=schedule), warmup=2).rate(10**6) == 1.0


def test_a_plateau_s_rate_falls_from_an_update_on():
    config = OptimConfig(lr=1.0, min_lr=0.05, schedule="plateau")
    found = [LearningRates(config).rate(step, falls=[3, 5]) for step in range(7)]
    assert found == [1.0, 1.0, 1.0, 0.1, 0.1, 0.05, 0.05]


SOME = ("lion", "adafactor", "lamb", "sgd")
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in timm.optim.list_optimizers() if name not in SOME]


@pytest.mark.parametrize("name", [*SOME, *MORE])
def test_timm_s_optimisers_resume_exactly_or_are_refused(name):
    images, labels = torch.randn(6, 4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    try:
        checked_name(f"timm:{name}")
    except UserError:
        assert any(part in name for part in ("muon", "kron", "adahessian", "fused", "bnb"))
        return

    def train(batches, state=None) -> dict:
        torch.manual_seed(0)
        model = vit(MoeConfig(num_experts=2, layers="last-1", noise_std=0.0), depth=2, embed_dim=8)
        optimizer = build_optimizer(model, OptimConfig(name=f"timm:{name}", layer_decay=0.9))
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        for batch in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), labels).backward()
            optimizer.step()
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    whole, resumed = train(images), train(images[3:], train(images[:3]))
    assert all(torch.equal(resumed["model"][key], value) for key, value in whole["model"].items())


def test_stacked_experts_are_factored_one_by_one_by_adafactor():
    """Its row and column means are of each expert's matrix."""
    model = vit(MoeConfig(num_experts=4, layers="last-1"))
    optimizer = build_optimizer(model, OptimConfig(name="timm:adafactor"))
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    weight = model.blocks[3].mlp.experts.fc1.weight
    assert optimizer.state[weight]["exp_avg_sq_row"].shape == weight.shape[:2]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"name": "timm:lyon"}, "timm has no such optimiser; did you mean timm:lion"),
        ({"name": "timm:muon"}, "optim.name=muon takes expert by expert"),
        ({"name": "timm:kron"}, "random numbers that no checkpoint holds"),
        ({"name": "timm:lion", "kwargs": {"nonsense": 1}}, "kwargs=.*cannot be made with them .*nonsense"),
        ({"name": "timm:lion", "kwargs": {"momentum": 0.5}}, "timm:lion takes no momentum"),
        ({"name": "timm:lion", "kwargs": {"layer_decay": 0.5}}, "timm:lion takes no layer_decay"),
    ],
)
def test_optimisers_that_are_refused(options, line):
    with pytest.raises(UserError, match=line):
        build_optimizer(vit(), OptimConfig(**options))
