"""What others attach to experts and routers has its effect: pruning, parametrizations, adapters, hooks."""

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize, prune

import vmoe
from vmoe import MoeConfig
from vmoe.export.layer import exportable_copy
from vmoe.moe.parallel import shard_experts


def tokens() -> Tensor:
    return torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Adapter(nn.Module):
    """As PEFT's LoRA of a parameter: adds to the weight while the wrapped module is called with an input."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.randn_like(base.weight))

    def forward(self, x: Tensor, *inputs) -> Tensor:
        parametrize.register_parametrization(self.base, "weight", Plus(self.delta))
        try:
            return self.base(x, *inputs)
        finally:
            parametrize.remove_parametrizations(self.base, "weight", leave_parametrized=False)


class Plus(nn.Module):
    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = [delta]  # no parameter of this module

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta[0]


PLACES = [
    ("experts.fc1", {"backend": "auto"}),
    ("experts.fc2", {"backend": "padded"}),
    ("experts.fc1", {"router": "soft"}),
    ("router.gate", {}),
    ("router.gate", {"router": "cosine"}),
    ("router.projection", {"router": "cosine"}),
    ("router.gate", {"router": "expert_choice"}),
    ("router.gate", {"router": "sigmoid"}),
]


def at_place(place: str, knobs: dict) -> tuple[vmoe.MoeMlp, nn.Module]:
    torch.manual_seed(0)
    knobs = {"num_experts": 3, "noise_std": 0.0, "capacity_factor": 1.0, **knobs}
    more = {"tokens": 5} if knobs.get("router") == "soft" else {}
    layer = vmoe.MoeMlp(6, 8, moe=MoeConfig(**knobs), dtype=torch.float64, **more).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, layer.get_submodule(place)


@pytest.mark.parametrize(("place", "knobs"), PLACES, ids=str)
def test_pruning_follows_the_weights(place, knobs):
    """A hook prunes anew before each pass, since training has changed the weights."""
    layer, module = at_place(place, knobs)
    prune.random_unstructured(module, "weight", 0.5)
    with torch.no_grad():
        module.weight_orig.mul_(1.5)
    y = layer(tokens())
    y.square().sum().backward()
    assert (module.weight_orig.grad[module.weight_mask == 0] == 0).all() and module.weight_orig.grad.any()
    plain, same = at_place(place, knobs)
    with torch.no_grad():
        same.weight.copy_(module.weight_orig * module.weight_mask)
    torch.testing.assert_close(y, plain(tokens()))


@pytest.mark.parametrize(("place", "knobs"), PLACES, ids=str)
def test_adapters_and_parametrizations(place, knobs):
    layer, module = at_place(place, knobs)
    adapter = Adapter(module)
    expected, parametrized = at_place(place, knobs)
    parametrize.register_parametrization(parametrized, "weight", Plus(adapter.delta))
    plain, same = at_place(place, knobs)
    with torch.no_grad():
        same.weight.add_(adapter.delta)
    layer.set_submodule(place, adapter)
    y = layer(tokens())
    torch.testing.assert_close(y, plain(tokens()))
    torch.testing.assert_close(y, expected(tokens()))
    y.square().sum().backward()
    assert adapter.delta.grad.any()
    if "router" in place:
        with torch.autocast("cpu", torch.bfloat16):  # scores stay in full precision
            torch.testing.assert_close(layer(tokens()), y)


def test_adapters_are_merged_into_what_is_made_of_the_model():
    model = vmoe.create_model(
        "vit_tiny_patch16_224", MoeConfig(num_experts=2, layers="last-1", renormalize=True), img_size=32, depth=2
    ).eval()
    layer = model.blocks[1].mlp
    layer.experts.set_submodule("fc1", Adapter(layer.experts.fc1))
    dense = vmoe.densify(copy.deepcopy(model), how="expert", expert=1)
    torch.testing.assert_close(dense.blocks[1].mlp.fc1.weight, layer.experts.layers()[0][0][1])


@pytest.mark.parametrize("place", ["experts.fc1", "experts.act", "experts", "router.gate", "router"])
def test_forward_hooks_run(place):
    layer, module = at_place(place, {})
    seen = []
    expected = layer(tokens())
    module.register_forward_hook(lambda *_: seen.append(place))
    torch.testing.assert_close(layer(tokens()), expected)
    assert seen


def test_kept_casts_keep_no_weights_of_passes_before():
    layer, module = at_place("experts.fc1", {})
    layer.float()
    prune.random_unstructured(module, "weight", 0.5)
    layer.experts.keep_casts()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(tokens().float())
        pruned = weakref.ref(module.weight)
        layer(tokens().float())
    assert pruned() is None


def normed_layer(**knobs) -> vmoe.MoeMlp:
    torch.manual_seed(0)
    layer = vmoe.MoeMlp(6, 8, norm_layer=nn.LayerNorm, moe=MoeConfig(num_experts=3, noise_std=0.0, **knobs)).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def prune_and_train(module: nn.Module, layer: nn.Module, x: Tensor) -> None:
    """Leaves a weight with a graph of its own, and an original that has changed since."""
    prune.random_unstructured(module, "weight", 0.5)
    layer(x).sum().backward()
    with torch.no_grad():
        module.weight_orig.mul_(1.5)


@pytest.mark.parametrize("place", ["experts.fc1", "experts.norm"])
def test_a_pruned_layer_is_exported_as_it_stands_after_training(place):
    layer, x = normed_layer(), tokens().float()
    prune_and_train(layer.get_submodule(place), layer, x)
    exported = exportable_copy(nn.Sequential(layer))
    torch.testing.assert_close(exported(x), layer(x))


def test_a_pruned_norm_is_densified():
    model = vmoe.create_model(
        "vit_tiny_patch16_224", MoeConfig(num_experts=2, layers="last-1"), img_size=32, depth=2, scale_mlp_norm=True
    )
    norm = model.blocks[1].mlp.experts.norm
    prune_and_train(norm, model, torch.randn(1, 3, 32, 32))
    dense = vmoe.densify(model.eval(), how="expert", expert=1)
    expected = (norm.weight_orig * norm.weight_mask)[1]
    torch.testing.assert_close(dense.blocks[1].mlp.norm.weight, expected)


def test_hooks_of_a_layer_go_with_its_export_and_those_it_would_leave_out_are_refused():
    layer, x = normed_layer(router="expert_choice"), tokens().float()
    layer.register_forward_hook(lambda module, inputs, y: 2 * y)
    torch.testing.assert_close(exportable_copy(nn.Sequential(layer))(x), layer(x))
    for part in (layer.experts, layer.router):
        handle = part.register_forward_hook(lambda *_: None)
        for export in (lambda: exportable_copy(nn.Sequential(layer)), lambda: torch.jit.trace(layer, x)):
            with pytest.raises(ValueError, match=r"forward hooks on its .* would be left out; remove them first"):
                export()
        handle.remove()


class LowRank(nn.Module):
    """As LoRA by a parametrization, with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(1, 6)), nn.Parameter(torch.randn(8, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def test_parameters_of_what_is_attached_have_no_axis_of_experts():
    layer = normed_layer()
    own = layer.experts.stacked_parameters()
    parametrize.register_parametrization(layer.experts.fc1, "weight", LowRank())
    assert {id(p) for p in layer.experts.stacked_parameters()} == {id(p) for p in own}


def test_experts_with_something_attached_are_not_dealt_out():
    class ThreeProcesses:
        def size(self) -> int:
            return 3

    layer = normed_layer()
    prune.random_unstructured(layer.experts.fc1, "weight", 0.5)
    with pytest.raises(ValueError, match="pruning, parametrizations, adapters or hooks cannot be sharded") as error:
        shard_experts(layer, ThreeProcesses())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("transform", [grad, vmap])
def test_losses_of_an_evaluation_may_be_read_first_within_torch_func(transform):
    layer, x = normed_layer().eval(), tokens().float()
    with torch.no_grad():
        layer(x)
    expected = layer.last_auxiliary_loss.clone(), layer.statistics
    with torch.no_grad():
        layer(x)
    read = []
    transform(lambda value: read.append(layer.last_auxiliary_loss + value) or value.sum())(torch.zeros(2))
    assert len(read) == 1
    torch.testing.assert_close((layer.last_auxiliary_loss, layer.statistics), expected, rtol=0, atol=0)


def test_torch_func_in_training_leaves_nothing_behind():
    layer, x = normed_layer(router="sigmoid").train(), tokens().float()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict, x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum() + vmoe.auxiliary_loss(layer)

    by_image = vmap(grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    torch.testing.assert_close(
        [value.sum(0) for value in by_image.values()],
        [sum(pair) for pair in zip(*(grad(loss)(parameters, one[None]).values() for one in x), strict=True)],
    )
    assert layer.statistics is None and not layer.router.choices.any()
    with pytest.raises(RuntimeError, match="no auxiliary loss yet"):
        vmoe.auxiliary_loss(layer)
