"""Freezes parts of a model by name, for fine-tuning and linear probes."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from timm.models import group_parameters
from torch import nn

from vmoe.moe import moe_layers

PARTS = ("backbone", "experts", "routers", "all_but_head")
_ADAPTERS = ".parametrizations.weight.0."  # part of the names of parameters that `vmoe.add_lora` adds


def freeze(model: nn.Module, what: str | Sequence[str]) -> nn.Module:
    """Freezes parts of a model: their parameters get no gradient, so no optimiser changes them.

        model = vmoe.freeze(vmoe.load("runs/photos"), ["backbone", "routers"])
        model = vmoe.freeze(vmoe.create_model("vit_small_patch16_224", pretrained=True), "all_but_head")

    If only the classifier learns, this is a linear probe. `vmoe.Classifier` then runs the rest of the model as in
    evaluation, without dropout, drop path and router noise.

    Args:
        model: A timm model, dense or with MoE layers. It is changed.
        what: One or several of: "experts" (with shared experts); "routers"; "backbone" (all except the classifier, the
            experts and the routers); "all_but_head" (all except the classifier); or a pattern of parameters' names,
            such as "blocks.[0-5].*".

    Returns:
        The model.

    Raises:
        ValueError: A part or a pattern has no parameter in this model, a part has adapters of `vmoe.add_lora`, or no
            parameter would learn.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for word in [what] if isinstance(what, str) else what:
        found = _named(model, names, word)
        if not found:
            raise ValueError(f"{word!r}: {_why_none(names, word)}")
        if word in PARTS and any(_ADAPTERS in name for name in found):
            raise ValueError(
                f"{word!r}: has low-rank adapters, which would not learn; beside adapters all is frozen already except "
                "the classifier and the routers, and their targets choose what gets them"
            )
        frozen |= found
    parameters = dict(model.named_parameters())
    if all(name in frozen or not parameter.requires_grad for name, parameter in parameters.items()):
        raise ValueError(f"{what!r}: leaves no parameter to learn")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return model


def classifier_names(model: nn.Module) -> list[str]:
    """The names of the modules that are a timm model's last layers."""
    timm_model: Any = model
    heads = timm_model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    return [name for name, module in model.named_modules() if any(module is head for head in heads)]


def layers_from_the_top(model: nn.Module) -> list[list[str]]:
    """The names of a timm model's parameters by layer: the classifier, the last block, ..., the embedding.

    Raises:
        ValueError: timm does not say which layers the model has.
    """
    matcher = getattr(model, "group_matcher", None)
    head = tuple(f"{name}." for name in classifier_names(model))
    if matcher is None or not head:
        raise ValueError("timm does not say in which order this model's layers are")
    layers = group_parameters(model, matcher())  # number of the layer -> names
    rest = [[name for name in layers[number] if not name.startswith(head)] for number in sorted(layers, reverse=True)]
    return [[name for name, _ in model.named_parameters() if name.startswith(head)], *filter(None, rest)]


def is_linear_probe(model: nn.Module) -> bool:
    """Whether only the classifier learns."""
    prefixes = tuple(f"{name}." for name in classifier_names(model))
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return bool(prefixes and learning) and all(name.startswith(prefixes) for name in learning)


def put_in_training_mode(model: nn.Module) -> None:
    """Sets training mode; in a linear probe for the classifier alone."""
    model.train()
    if is_linear_probe(model):
        model.eval()
        for name in classifier_names(model):
            model.get_submodule(name).train()


def _named(model: nn.Module, names: list[str], word: str) -> set[str]:
    """The names of the parameters that a word or pattern of `freeze` selects."""
    if word not in PARTS:
        return {name for name in names if fnmatchcase(name, word)}
    layers = [f"{name}." if name else "" for name, _ in moe_layers(model)]
    routers = tuple(f"{layer}router." for layer in layers)
    experts = tuple(f"{layer}{part}." for layer in layers for part in ("experts", "shared"))
    head = tuple(f"{name}." for name in classifier_names(model))
    if word in ("experts", "routers"):
        return {name for name in names if name.startswith(experts if word == "experts" else routers)}
    kept = head if word == "all_but_head" else (*head, *experts, *routers)
    return {name for name in names if not name.startswith(kept)} if head else set()


def _why_none(names: list[str], word: str) -> str:
    if word in ("experts", "routers"):
        return f"the model has no {word} with parameters"
    if word in PARTS:
        return "the model does not say which of its layers is the classifier; give patterns of parameters' names"
    return f"is none of {', '.join(PARTS)} and matches the name of no parameter, such as {names[0]} or {names[-1]}"
