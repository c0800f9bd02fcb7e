"""Ensembles within one model: what its passes give, what they cost, which families can be one, and who refuses one."""

import copy
import dataclasses

import pytest
import timm
import torch

import vmoe
from vmoe.compress.pruning import check_routers
from vmoe.data import Batch
from vmoe.errors import UserError
from vmoe.evaluation.features import extract_features
from vmoe.export.steered import SteeredModel
from vmoe.models.cost import count_parameters, flops_per_image
from vmoe.training.parallel.sample_draws import SampleDraws

MOE = vmoe.MoeConfig(layers="last-1", num_experts=4, top_k=1, ensemble=2)


def tiny(moe: vmoe.MoeConfig | None = MOE, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    kwargs = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5} | kwargs
    return vmoe.create_model("vmoe_vit", moe or False, **kwargs).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_evaluation_gives_the_mean_of_what_the_members_give_in_training(images):
    model = tiny(vmoe.MoeConfig(layers="last-2", num_experts=4, top_k=1, ensemble=2, capacity_factor=None, noise_std=0))
    predicted = model(images)
    of_members = model.train()(images)
    assert predicted.shape == (3, 5) and of_members.shape == (6, 5)
    assert not torch.equal(of_members[0], of_members[1])
    expected = of_members.softmax(-1).unflatten(0, (3, 2)).mean(1)
    torch.testing.assert_close(predicted.exp(), expected)
    torch.testing.assert_close(copy.deepcopy(model).eval()(images), predicted)


def test_without_a_classifier_it_gives_the_mean_of_the_features(images):
    assert tiny(num_classes=0)(images).shape == (3, 16)


def test_a_member_s_blocks_cost_what_they_do_once_per_member():
    single, dense = (
        flops_per_image(tiny(moe), 8) for moe in (vmoe.MoeConfig(layers="last-1", num_experts=4, top_k=1), None)
    )
    last_block = dense - flops_per_image(tiny(None, depth=3), 8)
    router = single - dense
    head = 2 * 16 * 5
    assert flops_per_image(tiny(), 8) == single + last_block + router + head
    total, active = count_parameters(tiny())
    expert = sum(parameter.numel() for parameter in tiny().blocks[3].mlp.experts.parameters()) // 4
    assert total - active == 2 * expert  # each member's token meets one of its two


def test_a_swin_can_be_one():
    moe = vmoe.MoeConfig(layers="last-1", num_experts=4, top_k=1, ensemble=2)
    small = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    model = vmoe.sparsify(timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **small), moe).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_padded_images_are_refused():
    with pytest.raises(ValueError, match=r"ensemble=2: NaFlexVit .* padded images"):
        vmoe.create_model("naflexvit_base_patch16_gap", MOE, embed_dim=32, depth=4, num_heads=2)


def test_a_recorded_image_has_the_choices_of_all_members(images):
    model = tiny()
    with vmoe.record_routing(model) as trace:
        model(images)
    layer = trace.layers["blocks.3.mlp"]
    assert layer.chosen.shape == (3, 5, 2) and layer.gates.shape == (3, 5, 4)
    torch.testing.assert_close(layer.gates.sum(-1), torch.ones(3, 5))
    assert torch.equal((layer.chosen // 2).sort(-1).values, torch.tensor([0, 1]).expand(3, 5, 2))
    assert (layer.combine_weights.diff(dim=-1) <= 0).all()


REFUSALS = {
    "densify": vmoe.densify,
    "probe": lambda model: extract_features(model, []),
    "prune": check_routers,
    "sample draws": lambda model: SampleDraws(0).install(model),
    "demo page": SteeredModel,
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_serves_single_models_alone_says_so(name):
    with pytest.raises(ValueError, match="ensemble=2"):
        REFUSALS[name](tiny())


def test_intermediate_features_of_members_are_not_mixed(images):
    model = copy.deepcopy(tiny())
    with pytest.raises(UserError, match="rows of its members"):
        model.forward_intermediates(images)


def test_an_exported_program_takes_any_batch(images):
    model = tiny()
    batch = ({0: torch.export.Dim("batch", min=2, max=16)},)
    program = torch.export.export(model, (images,), dynamic_shapes=batch).module()
    more = torch.cat([images, images.flip(-1)])
    torch.testing.assert_close(program(more), model(more))


def test_a_capacity_at_evaluation_is_not_exported(images):
    model = tiny(dataclasses.replace(MOE, eval_capacity_factor=1.0, group="image"))
    with pytest.raises(ValueError, match="ensemble=2 with a capacity at evaluation"):
        torch.export.export(model, (images,))


@pytest.mark.parametrize("mixed", [False, True])
def test_the_training_loss_is_the_mean_over_the_members(images, mixed):
    moe = dataclasses.replace(MOE, noise_std=0, capacity_factor=None)
    model, labels = tiny(moe), torch.tensor([0, 3, 4])
    shares = torch.softmax(torch.randn(3, 5), -1) if mixed else None
    task = vmoe.Classifier(model)
    loss = task._loss(Batch(images, labels, [], targets=shares))
    logits = model.train()(images)
    targets = labels if shares is None else shares
    of_members = [torch.nn.functional.cross_entropy(logits[member::2], targets) for member in range(2)]
    torch.testing.assert_close(loss, sum(of_members) / 2 + vmoe.auxiliary_loss(model))
    assert task.train_sums[-1] == 3  # images


def test_several_classes_per_image_are_refused():
    with pytest.raises(ValueError, match=r"multi_label: .*ensemble=2"):
        vmoe.Classifier(tiny(), multi_label=True)
