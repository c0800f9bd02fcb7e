"""Every knob of an MoE layer, under its name in the paper (Riquelme et al. 2021, https://arxiv.org/abs/2106.05974)."""

import re
from dataclasses import dataclass, fields, replace
from typing import Literal

ROUTER_NAMES = ("token_choice", "sigmoid", "cosine", "expert_choice", "soft", "hash", "random", "balanced")
BACKEND_NAMES = ("auto", "fused", "cpu", "padded", "segments")
# Fields whose None stands for a value that the router decides
DECIDED_BY_ROUTER = ("capacity_rounding", "capacity_multiple_of", "group", "noise_std")
_PATTERN = re.compile(r"(every|last)-([1-9][0-9]*)")


@dataclass(frozen=True)
class MoeConfig:
    """What an MoE layer computes and which layers of a model are MoE layers. Valid once constructed.

    A field that is None stays None, so that `dataclasses.replace` with another router takes that router's defaults;
    `resolved` gives the values that it stands for.

    Args:
        layers: Which MLPs become MoE layers, counted 0-based in forward order: "every-n" takes n-1, 2n-1, ...
            ("every-2" is the paper's blocks 1, 3, 5, ...), "last-n" the last n of those of "every-2", a list takes
            exactly these, an empty list none (a dense model).
        num_experts: E, the number of experts of a layer.
        top_k: K, how many experts a token is sent to. Without meaning for "expert_choice" and "soft".
        router: How tokens and experts are matched. "token_choice": each token takes its top-K experts (section 2.2).
            "sigmoid": the same by sigmoid gates with biases that balance the load (DeepSeek-V3). "cosine": by cosine
            similarity. "expert_choice": each expert takes its top tokens of an image. "soft": Soft MoE, slots that mix
            all tokens of an image. "hash" (by position) and "random": controls that learn nothing. "balanced": a
            forced fair load, for benchmarks.
        route: What is routed. "patch": each token by itself. "image": an image as a whole, with one decision that all
            its tokens follow (Mobile V-MoE, https://arxiv.org/abs/2309.04354). The router then sees an image's class
            token or, in a model without one, the mean of its tokens. Nothing is dropped, so that both capacity factors
            must be null.
        shared_router: One decision per image for all MoE layers of a model, made by the router of the first one, as in
            Mobile V-MoE; needs route "image".
        capacity_factor: C in the paper: an expert takes at most capacity_factor * K * tokens / E tokens of a routing
            group in training (section 2.3); null drops nothing. For "expert_choice" and "soft", the slots an expert
            has: capacity_factor * tokens / E an image. Padding is not counted among the tokens; only the slots of
            "soft" are as many in every image.
        eval_capacity_factor: The same at evaluation; null drops nothing, so that a prediction does not depend on the
            rest of the batch. For "expert_choice" and "soft", null is training's.
        capacity_rounding: How a fractional capacity becomes whole: "ceil", "round" (half to even), or Tutel's rule,
            "tutel": K * floor(capacity_factor * ceil(tokens / E)). null is the original's: "round" for "expert_choice"
            and "soft", else "ceil". "expert_choice" and "soft" do not take "tutel".
        capacity_multiple_of: A capacity is then raised to a multiple of this. null is the original's: 1 for
            "expert_choice" and "soft", else 4.
        batch_priority: Full experts drop the tokens with the smallest gates (Batch Prioritized Routing, section 4.1)
            rather than the last ones.
        group: Tokens compete for capacity within a group: "image", "batch", or a number of consecutive images. null is
            8; "expert_choice" and "soft" always take image by image. Where images are routed, the balance losses are
            computed within a group, and null is 64.
        noise_std: The router's logits get normal noise of standard deviation noise_std / E in training (section 2.2),
            for "soft" of standard deviation noise_std; in an ensemble E counts a member's experts. null is 1 for
            "token_choice", "cosine" and "expert_choice", else 0.
        renormalize: Whether a token's K combine weights are scaled to sum to 1. The paper's are not.
        expert_width: Hidden width of an expert, shared ones too, relative to that of the MLP it replaces; the width is
            rounded to a multiple of 8. K experts of width 1 / K cost what the dense MLP does.
        expert_dropout: Dropout rate inside the experts' hidden layer; where above 0 it replaces the MLP's own.
        experts_start: Whether the experts of a layer start from "different" weights or from "equal" ones.
        shared_experts: Number of experts that take every token, beside the routed ones (DeepSeekMoE,
            https://arxiv.org/abs/2401.06066).
        removed_experts: How many experts `vmoe prune --keep-classes` has removed. The router still scores them, so that
            the gates of the others stay what they were, but no image is sent to them. Needs route "image".
        ensemble: M, the members of an ensemble within one model (E3, https://arxiv.org/abs/2110.03360). From the block
            of the first MoE layer on, each image is computed once per member. A member has num_experts / M experts and
            a router of its own, and no expert is shared. 1 is a single model.
        soft_scale: Where Soft MoE's learned scale of the cosine logits starts. The paper's is 1; from 10 on slots
            differ early in training, which short training needs.
        bias_update_rate: How far the biases of the "sigmoid" router move in an update.
        cosine_dim: Dimensions of the space in which the "cosine" router compares tokens and experts. null is the
            smaller of 256 and the width of a token.
        cosine_bias: Whether the projection of the tokens into that space has a bias, as Tutel's has.
        importance_loss_weight: Weight of the importance loss (appendix A.2). "expert_choice" and "soft" are balanced by
            themselves and have no auxiliary loss.
        load_loss_weight: Weight of the load loss (appendix A.2). It is defined by the router's noise: without noise, so
            also at evaluation, it is absent.
        gshard_loss_weight: Weight of GShard's balance loss (https://arxiv.org/abs/2006.16668, algorithm 1).
        z_loss_weight: Weight of the router z-loss (ST-MoE, https://arxiv.org/abs/2202.08906, equation 5).
        inject_auxiliary_loss: The layer adds the gradient of its auxiliary loss to the backward pass by itself, so that
            a training loop that knows nothing of MoE trains it well. Such a loop must not add the loss again.
        backend: What computes the experts: "fused" (Triton's kernels and library products, NVIDIA GPUs), "cpu",
            "padded" (batched products, needs a capacity), "segments" (any device, any experts) or "auto", the fastest
            that can. Where the named one cannot serve, another does, with a warning.
        recompute_activation: The "fused" backend computes the experts' activations once more in the backward pass
            instead of keeping them: less memory, a little slower.

    Raises:
        ValueError: A field's value is not allowed; the message names the field, its value and what is allowed.
    """

    layers: str | list[int] = "every-2"
    num_experts: int = 8
    top_k: int = 2
    router: Literal["token_choice", "sigmoid", "cosine", "expert_choice", "soft", "hash", "random", "balanced"] = (
        "token_choice"
    )
    route: Literal["patch", "image"] = "patch"
    shared_router: bool = False
    capacity_factor: float | None = 1.05
    eval_capacity_factor: float | None = None
    capacity_rounding: Literal["ceil", "round", "tutel"] | None = None
    capacity_multiple_of: int | None = None
    batch_priority: bool = False
    group: Literal["image", "batch"] | int | None = None
    noise_std: float | None = None
    renormalize: bool = False
    expert_width: float = 1.0
    expert_dropout: float = 0.0
    experts_start: Literal["different", "equal"] = "different"
    shared_experts: int = 0
    removed_experts: int = 0
    ensemble: int = 1
    soft_scale: float = 1.0
    bias_update_rate: float = 0.001
    cosine_dim: int | None = None
    cosine_bias: bool = False
    importance_loss_weight: float = 0.005
    load_loss_weight: float = 0.005
    gshard_loss_weight: float = 0.0
    z_loss_weight: float = 0.0
    inject_auxiliary_loss: bool = False
    backend: Literal["auto", "fused", "cpu", "padded", "segments"] = "auto"
    recompute_activation: bool = False

    def __post_init__(self) -> None:
        _check_layers(self.layers)
        self._need_choice("router", ROUTER_NAMES)
        self._need_choice("route", ("patch", "image"))
        self._need_choice("capacity_rounding", ("ceil", "round", "tutel"), or_null=True)
        self._need_choice("experts_start", ("different", "equal"))
        self._need_choice("backend", BACKEND_NAMES)
        counts = {
            "num_experts": 1,
            "top_k": 1,
            "capacity_multiple_of": 1,
            "shared_experts": 0,
            "removed_experts": 0,
            "ensemble": 1,
        }
        for name, smallest in counts.items():
            may_be_null = name in DECIDED_BY_ROUTER and getattr(self, name) is None
            is_allowed = may_be_null or (_is_int(self, name) and getattr(self, name) >= smallest)
            self._need(name, is_allowed, f"a whole number >= {smallest}")
        self._need(
            "top_k", self.fills_slots or self.top_k <= self.num_experts, f"at most num_experts={self.num_experts}"
        )
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            in_range = value is None or (_is_number(value) and 0 < value <= 1000)
            self._need(name, in_range, "> 0 and at most 1000, or null to drop nothing")
        for field in fields(self):
            if field.name == "bias_update_rate" or field.name.endswith("_loss_weight"):
                self._need(field.name, _is_number(getattr(self, field.name)) and getattr(self, field.name) >= 0, ">= 0")
            elif field.type is bool:
                self._need(field.name, isinstance(getattr(self, field.name), bool), "true or false")
        is_size = self.cosine_dim is None or (_is_int(self, "cosine_dim") and self.cosine_dim >= 1)
        self._need("cosine_dim", is_size, "a whole number >= 1, or null")
        self._need("soft_scale", _is_number(self.soft_scale) and self.soft_scale > 0, "> 0")
        self._need("expert_width", _is_number(self.expert_width) and 0 < self.expert_width <= 16, "> 0 and at most 16")
        self._need("expert_dropout", _is_number(self.expert_dropout) and 0 <= self.expert_dropout < 1, "in [0, 1)")
        noise = self.noise_std
        self._need("noise_std", noise is None or (_is_number(noise) and noise >= 0), ">= 0")
        is_count = type(self.group) is int and self.group >= 1
        is_group = self.group in ("image", "batch", None) or is_count
        self._need("group", is_group, '"image", "batch" or a number of images')
        self._check_combination()

    def resolved(self) -> "MoeConfig":
        """The same layers, with the values that None stands for written out."""
        rounding, multiple = self.rounding
        return replace(
            self,
            capacity_rounding=rounding,
            capacity_multiple_of=multiple,
            group=self.routing_group,
            noise_std=self.noise,
        )

    def _check_combination(self) -> None:
        """Refuses options that the router cannot follow."""
        if self.ensemble > 1:
            self._check_ensemble()
        self._check_route()
        router = f'with router="{self.router}"'
        if self.fills_slots:
            self._need("group", self.routing_group in ("image", 1), f'"image" {router}: it never looks at other images')
            self._need("capacity_factor", self.capacity_factor is not None, f"a number {router}: it sets the slots")
            rounds_exactly = self.capacity_rounding != "tutel"
            self._need("capacity_rounding", rounds_exactly, f'"ceil" or "round" {router}: no token chooses experts')
            self._need("batch_priority", not self.batch_priority, f"false {router}: experts choose by gate anyway")
            self._need("renormalize", not self.renormalize, f"false {router}")
        if self.router == "soft":
            fits = self.eval_capacity_factor in (None, self.capacity_factor)
            self._need("eval_capacity_factor", fits, f"null {router}: the slots are part of its parameters")
        elif not self.draws_noise_by_default:
            self._need("noise_std", self.noise == 0, f"0 {router}")
        if self.router != "cosine":
            self._need("cosine_dim", self.cosine_dim is None, f"null {router}: it compares no cosines")
            self._need("cosine_bias", not self.cosine_bias, f"false {router}: it compares no cosines")
        if self.router in ("sigmoid", "hash", "random"):
            self._need("z_loss_weight", self.z_loss_weight == 0, f"0 {router}: it has no softmax logits")

    def _check_route(self) -> None:
        if self.route == "patch":
            self._need("shared_router", not self.shared_router, 'false with route="patch": each token has its decision')
            self._need("removed_experts", self.removed_experts == 0, '0 with route="patch"')
            return
        by_image = 'with route="image"'
        chooses = self.router in ("token_choice", "sigmoid", "cosine", "random", "balanced")
        self._need("router", chooses, f'"token_choice", "sigmoid", "cosine" or "random" {by_image}: images choose')
        for name in ("capacity_factor", "eval_capacity_factor"):
            self._need(name, getattr(self, name) is None, f"null {by_image}: no image is dropped")
        self._need("batch_priority", not self.batch_priority, f"false {by_image}: no image is dropped")
        self._need("group", self.group not in ("image", 1), f'"batch" or a number of images above 1 {by_image}')
        self._need("ensemble", self.ensemble == 1, f"1 {by_image}")
        scores = self.router in ("token_choice", "cosine")
        self._need("removed_experts", scores or not self.removed_experts, f'0 with router="{self.router}"')

    def _check_ensemble(self) -> None:
        members = f"with ensemble={self.ensemble}"
        self._need("ensemble", self.num_experts % self.ensemble == 0, f"a divisor of num_experts={self.num_experts}")
        self._need("router", self.router == "token_choice", f'"token_choice" {members}')
        own = self.experts_of_member
        self._need("top_k", self.top_k <= own, f"at most {own} {members}: a member has so many of the experts")
        self._need("shared_experts", self.shared_experts == 0, f"0 {members}: members share no expert")

    @property
    def experts_of_member(self) -> int:
        """How many of the experts a token may choose among: E, or E / M in an ensemble."""
        return self.num_experts // self.ensemble

    @property
    def fills_slots(self) -> bool:
        """Whether experts have a fixed number of slots an image, rather than tokens choosing experts."""
        return self.router in ("expert_choice", "soft")

    @property
    def routing_group(self) -> Literal["image", "batch"] | int:
        """Within what tokens compete: `group`, or the router's own."""
        if self.group is not None:
            return self.group
        if self.route == "image":
            return 64
        return "image" if self.fills_slots else 8

    @property
    def rows_of_group(self) -> Literal["image", "batch"] | int:
        """`routing_group` in rows of a layer's input, which has a row per image or, in an ensemble, M of them.

        So a group has the same images of all members. They do not compete, since their experts are disjoint.
        """
        group = self.routing_group
        if self.ensemble == 1 or group == "batch":
            return group
        return self.ensemble * (1 if group == "image" else group)

    @property
    def draws_noise_by_default(self) -> bool:
        """Whether the paper of the router adds noise to its logits."""
        return self.router in ("token_choice", "cosine", "expert_choice")

    @property
    def noise(self) -> float:
        """`noise_std`, or the router's own."""
        if self.noise_std is not None:
            return self.noise_std
        return 1.0 if self.draws_noise_by_default else 0.0

    @property
    def draws_noise(self) -> bool:
        """Whether the router's logits get noise in training."""
        return self.logit_noise > 0

    @property
    def logit_noise(self) -> float:
        """The noise's standard deviation where it is for each of E experts: noise_std / E, E those of a member."""
        return self.noise / self.experts_of_member

    def capacity_factor_of_pass(self, is_training: bool) -> tuple[str, float | None]:
        """Name and value of the capacity factor in a training or an evaluation pass; None drops nothing.

        Where experts have slots, training's serves at evaluation too if evaluation has none.
        """
        name = "capacity_factor" if is_training else "eval_capacity_factor"
        if self.fills_slots and self.eval_capacity_factor is None:
            name = "capacity_factor"
        return name, getattr(self, name)

    @property
    def rounding(self) -> tuple[Literal["ceil", "round", "tutel"], int]:
        """How a capacity becomes whole, for `expert_capacity`."""
        own: Literal["ceil", "round"] = "round" if self.fills_slots else "ceil"
        return self.capacity_rounding or own, self.capacity_multiple_of or (1 if self.fills_slots else 4)

    @property
    def experts_per_token(self) -> float:
        """How many experts work for a token on average: K, or the slots a token where experts have slots.

        In an ensemble so many work for each member's copy of the token.
        """
        if not self.fills_slots:
            return self.top_k
        assert self.capacity_factor is not None  # as `_check_combination` made sure
        return self.capacity_factor

    def hidden_width(self, mlp_width: int) -> int:
        """H, the hidden width of an expert in the place of an MLP of hidden width `mlp_width`."""
        if self.expert_width == 1:
            return mlp_width
        return max(8, 8 * round(self.expert_width * mlp_width / 8))

    def _need(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")

    def _need_choice(self, name: str, allowed: tuple[str, ...], or_null: bool = False) -> None:
        holds = getattr(self, name) in allowed or (or_null and getattr(self, name) is None)
        self._need(name, holds, " or ".join(f'"{choice}"' for choice in allowed))

    def select_layers(self, count: int) -> list[int]:
        """Which of `count` MLPs, in forward order, become MoE layers.

        Returns:
            Sorted 0-based indices.

        Raises:
            ValueError: `layers` names an MLP that the model does not have, or more than it has.
        """
        if isinstance(self.layers, list):
            if self.layers and max(self.layers) >= count:
                raise ValueError(
                    f"layers={self.layers}: the model has {count} MLPs, so indices go from 0 to {count - 1}"
                )
            return sorted(self.layers)
        kind, n = self.layers.split("-")  # as `_check_layers` made sure
        chosen = list(range(int(n) - 1, count, int(n))) if kind == "every" else list(range(1, count, 2))[-int(n) :]
        if not chosen or (kind == "last" and len(chosen) < int(n)):
            raise ValueError(
                f"layers={self.layers!r}: the model has too few MLPs, {count} in all; give a smaller n, or a list"
            )
        return chosen


def _check_layers(layers: str | list[int]) -> None:
    is_pattern = isinstance(layers, str) and _PATTERN.fullmatch(layers) is not None
    is_indices = isinstance(layers, list) and all(type(index) is int and index >= 0 for index in layers)
    if not (is_pattern or is_indices):
        raise ValueError(f'layers={layers!r}: must be "every-n", "last-n" or a list of indices >= 0')
    if is_indices and len(set(layers)) < len(layers):
        raise ValueError(f"layers={layers!r}: names an index twice")


def _is_int(config: MoeConfig, name: str) -> bool:
    return type(getattr(config, name)) is int


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) in (int, float) and abs(value) < float("inf")
