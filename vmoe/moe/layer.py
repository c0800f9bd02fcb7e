"""The MoE layer: route, assign, run the experts, combine.

B images of N tokens, T = B*N tokens of width D; G groups of S tokens; E experts; K choices per token; C capacity.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from vmoe.moe import losses, one_node
from vmoe.moe.assignment import Capacity, assign
from vmoe.moe.config import MoeConfig
from vmoe.moe.experts import Experts, ExpertSpec, SharedExpert
from vmoe.moe.exportable import LayerForm, why_layer_not_exportable
from vmoe.moe.groups import Groups
from vmoe.moe.image_routing import FollowingRouter, ImageRouting, choices_of_tokens
from vmoe.moe.kernels import PLAIN, Kernels, kernels_for
from vmoe.moe.kernels.operators import is_capturing, is_traced, is_transformed
from vmoe.moe.mlps import take_apart
from vmoe.moe.passes import Mark, is_backward
from vmoe.moe.routers import ROUTERS, SoftRouter
from vmoe.moe.routing import Routing, SlotRouting, SoftRouting


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


# computes the auxiliary loss and the statistics, which may be a tensor with all of them in a row
_Accounts = Callable[[], tuple[Tensor, Statistics | Tensor | None]]


class _OfPass(NamedTuple):
    """What the last forward pass left; a pass drops what an earlier one left, with its graph.

    Attributes:
        loss: The auxiliary loss.
        statistics: The statistics.
        unread: Computes both, where nobody has read them yet.
    """

    loss: Tensor | None = None
    statistics: Statistics | Tensor | None = None
    unread: _Accounts | None = None


class MoeMlp(nn.Module):
    """A sparse mixture of expert MLPs in the place of timm's `Mlp` (Riquelme et al. 2021, section 2).

    (B, ..., in_features) -> (B, ..., out_features): the first axis counts images, all between are an image's tokens. A
    dropped choice contributes zero, so a block's residual connection carries its token on.

    Args:
        in_features: D.
        hidden_features: Hidden width of the MLP that the layer replaces, `in_features` when not given. An expert's
            is H, `moe.expert_width` times that.
        out_features: `in_features` when not given.
        act_layer: Makes the activation of the hidden layer; a `Glu` takes a first layer twice as wide.
        norm_layer: Makes the LayerNorm behind the activation; each expert has its own.
        bias: Whether the two layers have biases.
        drop: Dropout rates of the hidden layer and of the output.
        use_conv: Tokens come channels first, (B, in_features, rows, columns), as for timm's convolutional MLPs.
        moe: The configuration; its `layers` is not used here.
        tokens: N, tokens per image; Soft MoE makes its slots for that many and needs it.
        device: Where the parameters are created.
        dtype: Their type.

    Attributes:
        config: The configuration.
        images: How images are routed, with `route="image"`; else None.
        last_image_logits: The router's logits of the last forward pass without noise, (B, E), with gradient, for losses
            on the router; None before it, and where images are not routed by this layer itself.
        auxiliary_scale: See `vmoe.set_auxiliary_scale`.
        recorders: Called with each routing decision and the input's shape; `vmoe.record_routing` puts its own here.
        dense_form: What `vmoe.sparsify` replaced; no such attribute in a layer made otherwise.

    Raises:
        ValueError: An argument is not allowed.
    """

    dense_form: Any

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
        tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = moe.hidden_width(hidden_features or in_features)
        out_features = out_features or in_features
        bias = bias if isinstance(bias, tuple) else (bias, bias)
        hidden_drop, output_drop = drop if isinstance(drop, tuple) else (drop, drop)
        hidden_drop = moe.expert_dropout or hidden_drop
        placement: dict[str, Any] = {"device": device, "dtype": dtype}

        self.config = moe
        self.use_conv = use_conv
        self.images = ImageRouting(moe.shared_router) if moe.route == "image" else None
        router = ROUTERS[moe.router]
        if router is SoftRouter:
            if tokens is None:
                raise ValueError('router="soft": its slots depend on the tokens of an image; give MoeMlp(tokens=...)')
            self.router = router(in_features, moe, tokens, **placement)
        else:
            self.router = router(in_features, moe, **placement)
        spec = ExpertSpec(in_features, hidden_features, out_features, act_layer(), norm_layer, bias, hidden_drop)
        self.experts = Experts(moe.num_experts, spec, moe.backend, moe.recompute_activation, **placement)
        self.shared: SharedExpert | None = None
        if moe.shared_experts:
            joint_width = moe.shared_experts * hidden_features
            self.shared = SharedExpert(spec._replace(hidden_features=joint_width, activation=act_layer()), **placement)
        self.drop2 = nn.Dropout(output_drop)
        self.out_features = out_features
        self.auxiliary_scale: Tensor | None
        # no parameter, and the training loop sets it: it belongs to no checkpoint
        self.register_buffer("auxiliary_scale", None, persistent=False)
        self._of_pass = _OfPass()
        self.last_image_logits: Tensor | None = None
        self.mark = Mark()
        self.recorders: tuple[Callable[[Routing | SlotRouting, torch.Size], None], ...] = ()
        self._was_in_steps = False
        if moe.experts_start == "equal":
            self._make_experts_equal()

    @classmethod
    def from_mlp(cls, mlp: nn.Module, moe: MoeConfig, tokens: int | None = None) -> "MoeMlp":
        """An MoE layer of the shape, activation, norm, dropout, device and type of a timm MLP, with weights of its own.

        Args:
            mlp: timm's `Mlp`, `GluMlp`, `SwiGLU` or one with the same names for its parts.
            moe: The configuration.
            tokens: N, tokens per image, for Soft MoE.

        Raises:
            ValueError: The MLP mixes tokens, or has a part that experts do not have.
        """
        parts = take_apart(mlp)
        layer = cls(
            parts.fc1.shape[1],
            parts.fc2.shape[1],
            parts.fc2.shape[0],
            act_layer=parts.copy_activation,
            norm_layer=parts.make_norm if parts.norm is not None else None,
            bias=(parts.bias1 is not None, parts.bias2 is not None),
            drop=parts.drop,
            use_conv=parts.use_conv,
            moe=moe,
            tokens=tokens,
            device=parts.fc1.device,
            dtype=parts.fc1.dtype,
        )
        return layer.train(mlp.training)

    @torch.no_grad()
    def copy_into_experts(self, mlp: nn.Module) -> None:
        """Makes every expert a copy of the dense MLP it was made from (Komatsuzaki et al. 2023, section 3).

        Shared experts start by adding nothing: their last layer is zero.
        """
        parts = take_apart(mlp)
        self.experts.fc1.fill(parts.fc1, parts.bias1)
        self.experts.fc2.fill(parts.fc2, parts.bias2)
        if parts.norm is not None:
            assert self.experts.norm is not None
            self.experts.norm.fill(parts.norm)
        if self.shared is not None:
            for parameter in self.shared.fc2.parameters():
                parameter.zero_()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.config.num_experts

    @property
    def statistics(self) -> Statistics | None:
        """`Statistics` of the last forward pass; None before it, and after one that torch.func transformed."""
        loss, statistics, _ = self._settled()
        if isinstance(statistics, Tensor):
            statistics = Statistics(statistics[:-4], *statistics[-4:].unbind())
            self._of_pass = _OfPass(loss, statistics)
        return statistics

    @property
    def last_auxiliary_loss(self) -> Tensor | None:
        """The weighted auxiliary loss of the last forward pass, (); None before it."""
        return self._settled().loss

    @last_auxiliary_loss.setter
    def last_auxiliary_loss(self, loss: Tensor | None) -> None:
        self._of_pass = self._settled()._replace(loss=loss)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Runs each token through its experts.

        Args:
            x: (B, ..., in_features), or (B, in_features, rows, columns) with `use_conv`.
            token_mask: (B, ...) bool, False for padding, which takes no capacity, carries no loss and gives zeros.
        """
        # not is_exporting(): torch.compile of torch 2.11 takes that for true
        if torch.jit.is_tracing() or (torch.compiler._is_exporting_flag and not self.training):
            return self._exported(x, token_mask)
        shape = x.shape
        if self.use_conv:
            x = x.movedim(1, -1)
        if self.images is not None and token_mask is None and self._takes_one_image(x):
            y = self._of_one_image(x.reshape(-1, x.shape[-1]), self.images).view(*x.shape[:-1], self.out_features)
            return y.movedim(-1, 1) if self.use_conv else y
        kernels = kernels_for(x)
        groups = self._groups(x) if self.images is None else None
        in_one = None
        if groups is not None and token_mask is None and not self._is_in_steps():
            in_one = one_node.Pass.of(self.router, self.experts, self.config, x, groups, kernels, self.training)
        accounts: _Accounts
        if in_one is not None:  # the steps below at once
            y, accounts = one_node.routed_experts(x, in_one)
            can_wait = True
        else:
            x_TD = x.reshape(-1, x.shape[-1])
            routing, of_tokens, routed_TD = self._route(x, x_TD, groups, token_mask, kernels)
            for record in self.recorders:
                record(routing, shape)
            y_TD = self.experts(routed_TD, of_tokens, kernels)  # dispatch, the expert MLPs, combine
            is_noisy = self.router.training and self.config.draws_noise
            accounts = self._accounts_of(routing, PLAIN if groups is None else kernels, is_noisy)
            # a recorder keeps less of a pass than the losses need, and Soft MoE's weights of slots are large
            can_wait = y_TD.is_cpu and not self.recorders and not isinstance(routing, SoftRouting)
            y = y_TD.view(*x.shape[:-1], self.out_features)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if token_mask is None else shared.masked_fill(~token_mask.reshape(*x.shape[:-1], 1), 0))
        y = self.drop2(self._account(accounts, y, can_wait))
        return y.movedim(-1, 1) if self.use_conv else y

    def _exported(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        """The same in operators that torch.export, torch.onnx.export and torch.jit.trace know, for any batch."""
        if self.training:
            raise RuntimeError("MoE layers are traced in evaluation mode only; call model.eval() first")
        reason = why_layer_not_exportable(self)
        if reason is not None:
            raise ValueError(f"an MoE layer cannot be exported: {reason}")
        return LayerForm(self, x).forward(x, token_mask)

    def _groups(self, x: Tensor) -> Groups:
        tokens = 1
        for extent in x.shape[1:-1]:
            tokens = tokens * extent
        moe = self.config
        if moe.ensemble > 1 and x.shape[0] % moe.ensemble:
            raise ValueError(
                f"ensemble={moe.ensemble}: a layer takes so many rows per image, one after the other, and was given "
                f"{x.shape[0]} rows; give it members.tile(x, {moe.ensemble})"
            )
        return Groups.of(x.shape[0], tokens, moe.rows_of_group)

    def _route(
        self, x: Tensor, x_TD: Tensor, groups: Groups | None, token_mask: Tensor | None, kernels: Kernels
    ) -> tuple[Routing | SlotRouting, Routing | SlotRouting, Tensor]:
        """Route and assign: the router's decision, with the choices that find no slot dropped; the same for the tokens,
        where `groups` is None and images are routed; and the tokens.
        """
        if groups is None:
            assert self.images is not None
            return *self._route_images(x, token_mask, self.images), x_TD
        moe = self.config
        valid_GS = groups.valid(None if token_mask is None else token_mask.reshape(-1), x.device)
        capacity = Capacity.of_pass(groups, valid_GS, moe, self.training)
        if moe.fills_slots:
            routing, x_TD = self.router(x_TD, groups, valid_GS, capacity, kernels)
        else:
            routing, x_TD = self.router(x_TD, groups, valid_GS, kernels)
            routing = assign(routing, capacity, moe.batch_priority, kernels)
        return routing, routing, x_TD

    def _is_in_steps(self) -> bool:
        """Whether the pass takes the steps one by one: for recorders, which see the decision, and in traced code.

        Activation checkpointing must repeat the same operators, but may do so after `vmoe.record_routing` or a dispatch
        mode such as FlopCounterMode has ended.
        """
        if torch.compiler.is_compiling():
            return True
        if is_backward():
            return self._was_in_steps
        is_in_steps = bool(self.recorders) or is_traced()
        if torch.is_grad_enabled() and self._was_in_steps != is_in_steps:
            self._was_in_steps = is_in_steps
        return is_in_steps

    def _route_images(self, x: Tensor, token_mask: Tensor | None, images: ImageRouting) -> tuple[Routing, Routing]:
        """The decisions for the images, which drop nothing, and what they mean for the tokens."""
        x_BND = x.flatten(1, -2)
        count, tokens, _ = x_BND.shape
        real_BN = None if token_mask is None else token_mask.reshape(count, tokens)
        groups = Groups.of(count, 1, self.config.routing_group)
        routing = images.route(self.router, x_BND, real_BN, groups)
        if not isinstance(self.router, FollowingRouter):
            self.last_image_logits = groups.merge(routing.logits_GSE)
        return routing, choices_of_tokens(routing, tokens, real_BN)

    def _takes_one_image(self, x: Tensor) -> bool:
        """Whether there is one image, and `_of_one_image` computes what the steps of `forward` do."""
        if is_traced() or x.shape[0] != 1 or not x.numel() or not x.is_cpu or self.recorders:
            return False
        is_evaluation = not (torch.is_grad_enabled() or self.training or self.router.training)
        return is_evaluation and self.experts.takes_one_image(x)

    def _of_one_image(self, x_TD: Tensor, images: ImageRouting) -> Tensor:
        """The forward pass on one image, (T, D) -> (T, O), in few calls: its tokens all have the same experts."""
        routing = images.route_one(self.router, x_TD[None])
        y_TD = self.experts.of_one_image(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        self.mark.set()
        left = self.__dict__  # nn.Module would look for parameters first, each time
        left["_of_pass"] = _OfPass(unread=self._accounts_of(routing, PLAIN, is_noisy=False))
        if not isinstance(self.router, FollowingRouter):
            left["last_image_logits"] = routing.logits_GSE[0]
        return self.drop2(y_TD) if self.drop2.p else y_TD

    def _accounts_of(self, routing: Routing | SlotRouting, kernels: Kernels, is_noisy: bool) -> _Accounts:
        is_counted = not isinstance(self.router, FollowingRouter)  # the losses of a decision count once
        # not a bound method: the layer may keep this, and would then hold itself when nobody else does
        return partial(_accounts_of, routing, self.config, is_noisy, kernels, is_counted)

    def _account(self, accounts: _Accounts, y: Tensor, can_wait: bool) -> Tensor:
        """Keeps the auxiliary loss and the statistics; changes no value of `y`.

        Evaluation without gradient keeps only what they are computed from, if that is possible and small (`can_wait`),
        and computes them if someone reads them: for one image they can take a tenth of the experts' time. A CUDA graph
        must compute them itself.
        """
        self.mark.set()
        can_wait = can_wait and not self.router.training and not torch.is_grad_enabled()
        if can_wait and not is_traced() and not is_capturing(y):
            self._of_pass = _OfPass(unread=accounts)
            return y
        loss, statistics = accounts()  # checkpointing may end a repeated pass in here
        self._of_pass = _OfPass(loss, statistics)
        if self.config.inject_auxiliary_loss and self.training:
            y = losses.inject_gradient(y, loss, self._checked_scale(y))
        return y

    def _settled(self) -> "_OfPass":
        """What the last pass left, with what `_account` put off computed."""
        if self._of_pass.unread is not None:
            with torch.no_grad(), temporarily_clear_interpreter_stack():  # that pass ran outside of torch.func
                self._of_pass = _OfPass(*self._of_pass.unread())
        return self._of_pass

    def expects_gradient(self) -> bool:
        """Whether the auxiliary loss of a training step should reach the router's parameters."""
        learns = any(parameter.requires_grad for parameter in self.router.parameters())
        return self.training and learns and not self.config.fills_slots

    def _checked_scale(self, y: Tensor) -> Tensor:
        if self.auxiliary_scale is not None:
            return self.auxiliary_scale
        if y.dtype == torch.float16:
            raise ValueError(
                "inject_auxiliary_loss=True in float16: the loss is scaled there, so call "
                "vmoe.set_auxiliary_scale(model, scaler_scale) before each step, or train in bfloat16"
            )
        return y.new_ones((), dtype=torch.float32)

    def _make_experts_equal(self) -> None:
        with torch.no_grad():
            for parameter in self.experts.stacked_parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))

    def _replicate_for_data_parallel(self) -> "MoeMlp":
        """A copy for another device; what it leaves behind never reaches this layer, so that nothing old may stay."""
        if self.config.shared_router:
            raise RuntimeError(
                "shared_router: nn.DataParallel runs copies of the layers, which would share one decision; use "
                "DistributedDataParallel"
            )
        self._of_pass, self.last_image_logits = _OfPass(), None
        replica = super()._replicate_for_data_parallel()
        replica.mark = Mark()
        return replica

    def __prepare_scriptable__(self) -> "MoeMlp":
        raise RuntimeError(
            "torch.jit.script does not know what MoE layers are made of; use torch.compile or torch.export, or a file "
            "of `vmoe export`"
        )

    def __getstate__(self) -> dict:
        # What a forward pass left behind belongs to its graph: it can be neither copied nor saved.
        return {**self.__dict__, "_of_pass": _OfPass(), "last_image_logits": None, "recorders": ()}


def _accounts_of(
    routing: Routing | SlotRouting, moe: MoeConfig, is_noisy: bool, kernels: Kernels, is_counted: bool
) -> tuple[Tensor, Statistics | None]:
    loss, importance, load, usage = losses.accounts_of(routing, moe, is_noisy, kernels, is_counted)
    return loss, None if is_transformed() else Statistics(*usage, importance, load)
