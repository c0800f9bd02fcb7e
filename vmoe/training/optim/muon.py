"""One optimiser with Muon for a model's matrices, single or stacked in experts, and AdamW for all else.

Muon steps along the momentum after bringing all its singular values to about 1 (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/). All matrices of one shape go through one batched iteration; each expert
counts as a matrix. Steps are scaled by 0.2 * sqrt(max(out, in)) as in Moonlight (Liu et al. 2025,
https://arxiv.org/abs/2502.16982, section 2.2), so that AdamW's learning rate and weight decay fit. `torch.optim.Muon`
calls this scale "match_rms_adamw".

M matrices of one shape; E experts.
"""

import math
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vmoe.training.parallel.collectives import local

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPSILON = 1e-7
_ADAMW_EPSILON = 1e-8


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Brings the singular values of each matrix to between about 0.7 and 1.2 by Newton-Schulz iterations in `dtype`.

    (M, out, in) -> (M, out, in) of `dtype`.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(dtype)
    # of a matrix and its transpose the wide one has the smaller Gram matrix
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    # the iteration needs singular values of at most 1; the Frobenius norm bounds them
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPSILON)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for the groups with `method="muon"`, fused AdamW for those with `method="adamw"`.

    A `found_inf` tensor () of 1 on the optimiser blocks a step without host synchronisation, as in torch's fused
    optimisers: neither weights nor state change. With learning rates on the device a CUDA graph can capture a step.

    Args:
        groups: Parameter groups, each with params, method, lr and weight_decay. Muon takes (out, in) and (E, out, in);
            the latter may be sharded by expert.
        betas: AdamW's decay rates of the gradient's first and second moment.

    Raises:
        ValueError: A parameter for Muon has another number of axes.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets `found_inf` on this optimiser

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas, "fused": True, "capturable": False})
        for group in self._groups_of("muon"):
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(f"Muon takes matrices and stacks of them, not shape {tuple(parameter.shape)}")

    def create_state(self) -> None:
        """Creates the state that the first step would create, so that a checkpoint can fill it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["method"] == "muon":
                    self._state_of(parameter, "momentum_buffer")
                else:
                    self._state_of(parameter, "exp_avg", "exp_avg_sq")
                    self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Makes one update. Gradients must be unscaled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        self._step_muon(found_inf)
        for group in self._groups_of("adamw"):
            self._step_adamw(group, found_inf)
        return loss

    def _groups_of(self, method: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["method"] == method]

    def _step_muon(self, found_inf: Tensor | None) -> None:
        groups = [(group, _with_gradients(group)) for group in self._groups_of("muon")]
        directions = self._directions([parameter for _, parameters in groups for parameter in parameters], found_inf)
        for group, parameters in groups:
            if not parameters:
                continue
            steps = [directions[parameter] for parameter in parameters]
            parameters = [local(parameter) for parameter in parameters]
            shrink = 1 - group["lr"] * group["weight_decay"]
            if found_inf is not None:
                shrink = torch.where(found_inf > 0, 1.0, shrink)
            torch._foreach_mul_(parameters, shrink)
            steps = torch._foreach_mul(steps, -group["lr"])
            torch._foreach_add_(parameters, steps)

    def _directions(self, parameters: list[Tensor], found_inf: Tensor | None) -> dict[Tensor, Tensor]:
        """The step of each parameter (or of this rank's shard) for a learning rate of -1; zero if blocked."""
        directions = {}
        parameters = sorted(parameters, key=_matrix_shape)
        for shape, alike in groupby(parameters, key=_matrix_shape):
            alike = list(alike)
            updates = self._move_momenta(alike, found_inf)
            stacked = torch.cat([update.reshape(-1, *shape) for update in updates])
            stacked = orthogonalise(stacked, torch.bfloat16 if stacked.is_cuda else torch.float32)
            stacked = stacked.to(updates[0].dtype) * (0.2 * math.sqrt(max(shape)))
            if found_inf is not None:
                stacked = torch.where(found_inf > 0, 0.0, stacked)
            parts = stacked.split([update.shape[:-2].numel() for update in updates])
            directions |= {p: part.view_as(u) for p, part, u in zip(alike, parts, updates, strict=True)}
        return directions

    def _move_momenta(self, parameters: list[Tensor], found_inf: Tensor | None) -> list[Tensor]:
        """Moves the momenta towards the gradients, and returns Nesterov's look-ahead momenta."""
        gradients = [local(parameter.grad) for parameter in parameters]
        momenta = [local(self._state_of(parameter, "momentum_buffer")) for parameter in parameters]
        moved = torch._foreach_lerp(momenta, gradients, 1 - MOMENTUM)
        updates = torch._foreach_lerp(gradients, moved, MOMENTUM)
        if found_inf is not None:
            moved = [torch.where(found_inf > 0, *pair) for pair in zip(momenta, moved, strict=True)]
        torch._foreach_copy_(momenta, moved)
        return updates

    def _state_of(self, parameter: Tensor, *names: str) -> Any:
        state = self.state[parameter]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return itemgetter(*names)(state)

    def _step_adamw(self, group: dict[str, Any], found_inf: Tensor | None) -> None:
        parameters = _with_gradients(group)
        if not parameters:
            return
        means, squares = zip(*(self._state_of(p, "exp_avg", "exp_avg_sq") for p in parameters), strict=True)
        for parameter in parameters:
            self.state[parameter].setdefault("step", torch.zeros((), dtype=torch.float32, device=parameter.device))
        adamw(
            [local(parameter) for parameter in parameters],
            [local(parameter.grad) for parameter in parameters],
            [local(mean) for mean in means],
            [local(square) for square in squares],
            [],
            [self.state[parameter]["step"] for parameter in parameters],
            fused=True,
            capturable=group["capturable"],
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=_ADAMW_EPSILON,
            maximize=False,
        )


def _with_gradients(group: dict[str, Any]) -> list[Tensor]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    return tuple(parameter.shape[-2:])
