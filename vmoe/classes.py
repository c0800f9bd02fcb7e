"""Matches a model's outputs to a set's classes by name, in any order and number."""

import copy
import re
from collections import OrderedDict, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_SYNSET = re.compile(r"n\d{8}")
_WITH_SYNSET = re.compile(r".+ \((n\d{8})\)", re.DOTALL)


def only_numbers(names: Sequence[str]) -> bool:
    """Whether classes have no names: they are "0", "1", ..."""
    return list(names) == [str(number) for number in range(len(names))]


def find_outputs(theirs: Sequence[str], ours: Sequence[str]) -> list[int | None]:
    """The output of a model for each class of a set, by name.

    Numbers from 0 on are no names. A set with only numbers is matched by number if the model has the same number of
    classes; else its classes are unknown. If several classes have one name, the first of the model matches the first of
    the set. Folders of ImageNet have WordNet's numbers, such as n01440764; these match the number in a name such as
    "tench, Tinca tinca (n01440764)".

    Args:
        theirs: (C,) the model's classes, in the order of its outputs.
        ours: The set's classes.

    Returns:
        For each of `ours` an index below C, or None if the model does not know it.
    """
    if list(theirs) == list(ours) or (only_numbers(ours) and len(ours) == len(theirs)):
        return list(range(len(theirs)))
    if only_numbers(ours):
        return [None] * len(ours)
    places: dict[str, list[int]] = defaultdict(list)
    if all(map(_SYNSET.fullmatch, ours)):
        theirs = [found[1] if (found := _WITH_SYNSET.fullmatch(name)) else name for name in theirs]
    for index, name in enumerate(theirs):
        places[name].append(index)
    return [places[name].pop(0) if places[name] else None for name in ours]


def known_outputs(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """The result of `find_outputs` if the model knows all classes of the set, else None."""
    outputs = find_outputs(theirs, ours)
    return None if None in outputs else [index for index in outputs if index is not None]


def same_outputs(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """Like `known_outputs` for two models. A model with only numbers does not match one with names."""
    return None if only_numbers(theirs) != only_numbers(ours) else known_outputs(theirs, ours)


def with_outputs(model: nn.Module, outputs: Sequence[int]) -> nn.Module:
    """A view of a model with only these logits, in this order: (B, C) becomes (B, len(outputs)).

    Both share their layers and weights, by the same names. The model itself still gives all of its logits.
    """
    if list(outputs) == list(range(getattr(model, "num_classes", -1))):
        return model
    on_device: dict[torch.device, Tensor] = {}

    def select(module: nn.Module, arguments: tuple, logits: Tensor) -> Tensor:
        if logits.device not in on_device:  # copies the indices only once per device
            on_device[logits.device] = torch.tensor(outputs, device=logits.device)
        return logits[:, on_device[logits.device]]

    view = copy.copy(model)
    view._forward_hooks = OrderedDict(model._forward_hooks)
    view._compiled_call_impl = None  # it belongs to the model, without this hook
    view.register_forward_hook(select)
    return view
