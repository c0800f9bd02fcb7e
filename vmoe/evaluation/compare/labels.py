"""Short names for a study's arms, from the differences of their recipes: "dense", "E=8 K=2", "Soft MoE E=16"."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vmoe.moe import MoeConfig
from vmoe.moe.config import DECIDED_BY_ROUTER

_ROUTERS = {
    "token_choice": "",
    "expert_choice": "expert choice",
    "soft": "Soft MoE",
    "hash": "hash routing",
    "random": "random routing",
    "balanced": "balanced routing",
}
_WORDS = {
    "moe.expert_width": "width {}",
    "moe.shared_experts": "{} shared",
    "moe.capacity_factor": "C={}",
    "moe.eval_capacity_factor": "C={} at test",
    "moe.layers": "{}",
    "model.name": "{}",
    "data.name": "{}",
    "trainer.epochs": "{} epochs",
    "data.subset.fraction": "{} of the data",
}


def arm_labels(arms: Sequence[tuple[dict[str, Any], dict[str, Any] | None]]) -> list[str]:
    """A distinct label for each arm.

    A V-MoE's starts with its router (none for token choice), E and K. Other options of the MoE layers follow if they
    differ from the router's defaults and from other V-MoEs. All else follows if it is switched on and differs from most
    arms.

    Args:
        arms: For each arm its recipe by dotted name, and its `moe` section, None for a dense model.
    """
    moes = [None if moe is None else _default_moe(moe) | with_router_defaults(moe) for _, moe in arms]
    sparse = [moe for moe in moes if moe is not None]
    others = [{key: value for key, value in recipe.items() if key.partition(".")[0] != "moe"} for recipe, _ in arms]
    varied = _varied(others)
    labels: list[str] = []
    for moe, other in zip(moes, others, strict=True):
        parts = ["dense"] if moe is None else _moe_parts(moe, sparse)
        parts += [
            _option_text(key, other[key], varied) for key in varied if other.get(key) and _is_rare(key, other, others)
        ]
        labels.append(_unlike(" ".join(filter(None, parts)), labels))
    return labels


def with_router_defaults(moe: dict[str, Any]) -> dict[str, Any]:
    """A `moe` section with its router's defaults in place of None. Older runs stored these defaults themselves."""
    defaults = _default_moe(moe)
    open_fields = [name for name in DECIDED_BY_ROUTER if moe.get(name) is None and name in defaults]
    return moe | {name: defaults[name] for name in open_fields}


def _default_moe(moe: dict[str, Any]) -> dict[str, Any]:
    """The default options of MoE layers with this router."""
    try:
        return asdict(MoeConfig(router=moe.get("router", "token_choice")).resolved())
    except ValueError:  # a router of another version
        return {}


def _moe_parts(moe: dict[str, Any], sparse: list[dict[str, Any]]) -> list[str]:
    router = moe.get("router", "")
    parts = [_ROUTERS.get(router, router), f"E={moe.get('num_experts')}"]
    if router not in ("expert_choice", "soft"):
        parts.append(f"K={moe.get('top_k')}")
    default = _default_moe(moe)
    for name in _varied(sparse):
        is_shown = name not in ("router", "num_experts", "top_k") and name in moe
        if is_shown and moe[name] != default.get(name):
            parts.append(_option_text(f"moe.{name}", moe[name], ()))
    return parts


def _varied(sections: Sequence[dict[str, Any]]) -> list[str]:
    """The options with different values between sections, in order."""
    names = dict.fromkeys(name for section in sections for name in section)
    return [name for name in names if any(section.get(name) != sections[0].get(name) for section in sections)]


def _is_rare(key: str, section: dict[str, Any], sections: Sequence[dict[str, Any]]) -> bool:
    """Whether at most half of the sections have this value."""
    return 2 * sum(other.get(key) == section[key] for other in sections) <= len(sections)


def _option_text(key: str, value: Any, varied: Sequence[str]) -> str:
    """An option and its value, with enough of its dotted name to distinguish it from the other varied options."""
    *_, parent, name = ("", *key.split("."))
    if sum(other.rpartition(".")[2] == name for other in varied) > 1:
        name = f"{parent} {name}"
    name = name.replace("_", " ")
    if value is None or value is False:
        return f"no {name}"
    if value is True:
        return name
    text = ",".join(map(_value_text, value)) if isinstance(value, list | tuple) else _value_text(value)
    if key == "moe.layers" and not isinstance(value, str):
        return f"layers {text}"
    return _WORDS.get(key, f"{name} {{}}").format(text)


def _value_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _unlike(label: str, taken: Sequence[str]) -> str:
    numbered, count = label, 1
    while numbered in taken:
        count += 1
        numbered = f"{label} ({count})"
    return numbered
