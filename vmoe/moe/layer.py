"""The MoE layer: route, assign, run the experts, combine.

B images of N tokens, T = B*N tokens of width D; G groups of S tokens; E experts; K choices a token; C capacity.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmoe.moe import losses
from vmoe.moe.assignment import assign, expert_capacity
from vmoe.moe.config import MoeConfig
from vmoe.moe.experts import Experts, SharedExpert
from vmoe.moe.groups import Groups
from vmoe.moe.routers import Routing, TokenChoiceRouter


class Statistics(NamedTuple):
    """How a forward pass used its experts; detached tensors on the layer's device.

    Attributes:
        load: Share of all choices that went to each expert, before drops, (E,); sums to 1.
        dropped: Share of the choices that found their expert full, ().
        entropy: Mean entropy of the tokens' gates in nats, ().
        importance_loss: Unweighted, ().
        load_loss: Unweighted, (); zero where the router drew no noise.
    """

    load: Tensor
    dropped: Tensor
    entropy: Tensor
    importance_loss: Tensor
    load_loss: Tensor


class MoeMlp(nn.Module):
    """A sparse mixture of expert MLPs in the place of timm's `Mlp` (Riquelme et al. 2021, section 2).

    (B, ..., in_features) -> (B, ..., out_features): the first axis counts images, all between are an image's tokens. A
    dropped choice contributes zero, so a block's residual connection carries its token on.

    Args:
        in_features: D.
        hidden_features: H, hidden width of one expert; `in_features` when not given.
        out_features: `in_features` when not given.
        act_layer: Makes the activation of the hidden layer.
        norm_layer: timm's norm between the layers of an MLP; experts do not have one, so only None is taken.
        bias: Whether the two layers have biases.
        drop: Dropout rates of the hidden layer and of the output.
        use_conv: Tokens come channels first, (B, in_features, rows, columns), as for timm's convolutional MLPs.
        moe: The configuration; its `layers` is not used here.
        device: Where the parameters are created.
        dtype: Their type.

    Attributes:
        config: The configuration.
        statistics: `Statistics` of the last forward pass; None before it.

    Raises:
        ValueError: An argument is not allowed.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        *,
        moe: MoeConfig,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if norm_layer is not None:
            raise ValueError(
                f"norm_layer={norm_layer!r}: experts have no norm between their layers; only None is allowed"
            )
        hidden_features = hidden_features or in_features
        out_features = out_features or in_features
        bias = bias if isinstance(bias, tuple) else (bias, bias)
        hidden_drop, output_drop = drop if isinstance(drop, tuple) else (drop, drop)
        hidden_drop = moe.expert_dropout or hidden_drop
        placement = {"device": device, "dtype": dtype}

        self.config = moe
        self.use_conv = use_conv
        self.router = TokenChoiceRouter(in_features, moe, **placement)
        self.experts = Experts(
            moe.num_experts, in_features, hidden_features, out_features, act_layer(), bias, hidden_drop, **placement
        )
        self.shared = None
        if moe.shared_experts:
            width = moe.shared_experts * hidden_features
            self.shared = SharedExpert(in_features, width, out_features, act_layer(), bias, hidden_drop, **placement)
        self.drop2 = nn.Dropout(output_drop)
        self.out_features = out_features
        # Not a parameter, and not worth a place in a checkpoint: see `set_auxiliary_scale`.
        self.register_buffer("_auxiliary_scale", None, persistent=False)
        self.statistics: Statistics | None = None
        self._auxiliary_loss: Tensor | None = None
        self._records: list[Routing] | None = None
        if moe.experts_start == "equal":
            self._make_experts_equal()

    @classmethod
    def from_mlp(cls, mlp: nn.Module, moe: MoeConfig) -> "MoeMlp":
        """An MoE layer of the shape, activation, dropout, device and type of timm's `Mlp`, with weights of its own.

        Raises:
            ValueError: The MLP has a norm between its layers.
        """
        if not isinstance(mlp.norm, nn.Identity):
            raise ValueError(f"{type(mlp.norm).__name__} between the layers of an MLP: experts have no norm there")
        fc1, fc2 = mlp.fc1, mlp.fc2
        layer = cls(
            fc1.weight.shape[1],
            fc1.weight.shape[0],
            fc2.weight.shape[0],
            act_layer=lambda: copy.deepcopy(mlp.act),
            bias=(fc1.bias is not None, fc2.bias is not None),
            drop=(mlp.drop1.p, mlp.drop2.p),
            use_conv=isinstance(fc1, nn.Conv2d),
            moe=moe,
            device=fc1.weight.device,
            dtype=fc1.weight.dtype,
        )
        return layer.train(mlp.training)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.config.num_experts

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Runs each token through its experts.

        Args:
            x: (B, ..., in_features), or (B, in_features, rows, columns) with `use_conv`.
            token_mask: (B, ...) bool, False for padding, which takes no capacity, carries no loss and gives zeros.
        """
        if self.use_conv:
            x = x.movedim(1, -1)
        x_TD = x.reshape(-1, x.shape[-1])
        groups = self._groups(x)
        valid_GS = groups.valid(None if token_mask is None else token_mask.reshape(-1), x.device)

        routing = self.router(x_TD, groups, valid_GS)
        routing = self._assign(routing)
        y_TD = self.experts(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self._shared_result(x_TD, token_mask)
        y_TD = self._account(routing, y_TD)

        y = self.drop2(y_TD.view(*x.shape[:-1], self.out_features))
        return y.movedim(-1, 1) if self.use_conv else y

    def _groups(self, x: Tensor) -> Groups:
        tokens = 1
        for extent in x.shape[1:-1]:
            tokens = tokens * extent
        return Groups.of(x.shape[0], tokens, self.config.group)

    def _assign(self, routing: Routing) -> Routing:
        """Drops the choices beyond the experts' capacity; without a capacity, those of padding."""
        moe, groups, valid_GS = self.config, routing.groups, routing.valid_GS
        factor = moe.capacity_factor if self.training else moe.eval_capacity_factor
        if factor is None or groups.size == 0:
            if valid_GS is None:
                return routing
            return routing._replace(kept_GSK=valid_GS[..., None].expand_as(routing.chosen_GSK))
        capacity, last_capacity = (
            expert_capacity(size * moe.top_k, moe.num_experts, factor, moe.capacity_rounding, moe.capacity_multiple_of)
            for size in (groups.size, groups.last)
        )
        return assign(routing, capacity, last_capacity, moe.batch_priority)

    def _shared_result(self, x_TD: Tensor, token_mask: Tensor | None) -> Tensor:
        y_TD = self.shared(x_TD)
        return y_TD if token_mask is None else y_TD.masked_fill(~token_mask.reshape(-1, 1), 0)

    def _account(self, routing: Routing, y_TD: Tensor) -> Tensor:
        """Keeps the auxiliary loss, the statistics and, when asked, the record; changes no value of `y_TD`."""
        is_noisy = self.training and self.config.noise_std > 0
        each = losses.auxiliary_losses(routing, self.config, is_noisy)
        self._auxiliary_loss = losses.weighted_sum(each, self.config)
        with torch.no_grad():
            zero = self._auxiliary_loss.new_zeros(())
            self.statistics = Statistics(
                *_usage(routing), each["importance"].detach(), each["load"].detach() if is_noisy else zero
            )
        if self._records is not None:
            self._records.append(routing)
        if self.config.inject_auxiliary_loss and self.training:
            y_TD = _InjectGradient.apply(y_TD, self._auxiliary_loss, self._checked_scale(y_TD))
        return y_TD

    def _checked_scale(self, y: Tensor) -> Tensor:
        if self._auxiliary_scale is not None:
            return self._auxiliary_scale
        if y.dtype == torch.float16:
            raise ValueError(
                "inject_auxiliary_loss=True in float16: the loss is scaled there, so call "
                "vmoe.set_auxiliary_scale(model, scaler_scale) before each step, or train in bfloat16"
            )
        return y.new_ones((), dtype=torch.float32)

    def _make_experts_equal(self) -> None:
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))

    def __getstate__(self) -> dict:
        # What a forward pass left behind belongs to its graph: it can be neither copied nor saved.
        return {**self.__dict__, "statistics": None, "_auxiliary_loss": None, "_records": None}


def set_eval_capacity_factor(model: nn.Module, factor: float | None) -> None:
    """Sets the capacity factor that all MoE layers of `model` use at evaluation; None drops nothing.

    Raises:
        ValueError: The factor is not positive.
    """
    for _, layer in moe_layers(model):
        layer.config = dataclasses.replace(layer.config, eval_capacity_factor=factor)


def moe_layers(model: nn.Module) -> list[tuple[str, MoeMlp]]:
    """The MoE layers of `model` with their names, in forward order; a compiled model's names are the original's."""
    model = getattr(model, "_orig_mod", model)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoeMlp)]


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The weighted auxiliary losses of the last forward pass, summed over the MoE layers: add it to the task's loss.

    Returns:
        A scalar through which gradients flow; zero for a dense model.

    Raises:
        RuntimeError: There was no forward pass, or its graph is gone (reentrant activation checkpointing).
    """
    total = None
    for name, layer in moe_layers(model):
        loss = layer._auxiliary_loss
        if loss is None:
            raise RuntimeError(f"{name}: no auxiliary loss yet; call the model first")
        if (
            layer.training
            and torch.is_grad_enabled()
            and layer.router.gate.weight.requires_grad
            and not loss.requires_grad
        ):
            raise RuntimeError(
                f"{name}: the auxiliary loss has lost its graph, as under reentrant activation checkpointing; "
                "use MoeConfig(inject_auxiliary_loss=True), which needs no auxiliary_loss()"
            )
        total = loss if total is None else total + loss.to(total.device)
    if total is None:
        parameter = next(model.parameters(), None)
        return torch.zeros((), device=None if parameter is None else parameter.device)
    return total


def set_auxiliary_scale(model: nn.Module, scale: float | Tensor) -> None:
    """Scales the gradients that `inject_auxiliary_loss` adds, as the training loop scales its loss.

    Args:
        model: A model with MoE layers.
        scale: The loss scale, divided by the steps of a gradient accumulation. A tensor is kept by reference, so that a
            GradScaler's own (`scaler._scale`) stays up to date.
    """
    for _, layer in moe_layers(model):
        device = layer.router.gate.weight.device
        layer._auxiliary_scale = torch.as_tensor(scale, dtype=torch.float32, device=device)


class _InjectGradient(torch.autograd.Function):
    """The identity of `y`, whose backward pass also gives `loss` the gradient `scale`."""

    @staticmethod
    def forward(y: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, loss, scale = inputs
        ctx.save_for_backward(scale)
        ctx.loss_dtype = loss.dtype

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        (scale,) = ctx.saved_tensors
        return grad_y, scale.to(ctx.loss_dtype), None


def _usage(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """Load (E,), dropped share () and mean gate entropy () over the real tokens."""
    gates_GSE, valid_GS = routing.gates_GSE, routing.valid_GS
    valid_GS1 = torch.ones_like(gates_GSE[..., :1]) if valid_GS is None else valid_GS[..., None].to(gates_GSE.dtype)
    tokens = valid_GS1.sum().clamp_min(1)
    top_k = routing.chosen_GSK.shape[-1]
    ones_GSK = valid_GS1.expand(-1, -1, top_k)
    load_E = gates_GSE.new_zeros(gates_GSE.shape[-1]).scatter_add(
        0, routing.chosen_GSK.reshape(-1), ones_GSK.reshape(-1)
    )
    kept = tokens * top_k if routing.kept_GSK is None else routing.kept_GSK.sum()
    entropy = (torch.special.entr(gates_GSE).sum(-1, keepdim=True) * valid_GS1).sum() / tokens
    return load_E / (tokens * top_k), 1 - kept / (tokens * top_k), entropy
