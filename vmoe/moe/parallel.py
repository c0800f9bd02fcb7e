"""Expert parallelism: the experts of a layer are sharded over ranks. Tokens are sent to them and back.

Each rank routes its own tokens as without sharding. Only `Experts` is replaced, by a class that reaches other ranks.

E experts of a layer, E / P on each of P ranks; T tokens of width D; R rows of a buffer in which each expert's tokens
lie together, in the order of the experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import (
    AsyncCollectiveTensor,
    all_to_all_single,
    all_to_all_single_autograd,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from vmoe.moe.attached import is_bare
from vmoe.moe.experts import ExpertLinear, ExpertNorm, Experts, choose_backend, compute_dtype
from vmoe.moe.groups import Groups
from vmoe.moe.kernels import Kernels, kernels_for
from vmoe.moe.kernels.experts import padded, rows, segments
from vmoe.moe.kernels.interface import Choices, Mlp
from vmoe.moe.layer import MoeMlp
from vmoe.moe.routing import Routing, SlotRouting


def shard_experts(layer: MoeMlp, mesh: DeviceMesh) -> None:
    """Shards a layer's experts over the ranks of `mesh`, in order of rank. All ranks must hold the same layer before.

    The experts' gradients become means over the ranks. All experts share a learned activation, so it stays whole: its
    gradients must still be averaged over the ranks, as those of all other replicated parameters.

    Args:
        layer: Its expert parameters become DTensors, sharded by expert.
        mesh: One dimension of P ranks; with one rank nothing changes.

    Raises:
        ValueError: E is no multiple of P, or the experts have pruning, parametrizations, adapters or hooks.
    """
    if mesh.size() == 1:
        return
    if layer.num_experts % mesh.size():
        raise ValueError(
            f"num_experts={layer.num_experts}: cannot be sharded over {mesh.size()} ranks; use a multiple of it"
        )
    if not all(is_bare(module, ExpertLinear) or is_bare(module, ExpertNorm) for module in layer.experts.stacked()):
        raise ValueError(
            "experts with pruning, parametrizations, adapters or hooks cannot be sharded over ranks; remove them "
            "(prune.remove, parametrize.remove_parametrizations) or use another strategy than expert parallelism"
        )
    for module in layer.experts.stacked():
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            setattr(module, name, nn.Parameter(own, requires_grad=parameter.requires_grad))
    layer.experts.__class__ = DistributedExperts
    layer.experts.mesh = mesh


class DistributedExperts(Experts):
    """Experts with parameters sharded over the ranks of `mesh`. `shard_experts` makes them."""

    mesh: DeviceMesh

    def forward(self, x_TD: Tensor, routing: Routing | SlotRouting, kernels: Kernels | None = None) -> Tensor:
        """(T, D) -> (T, out). All ranks of the mesh must call it."""
        dtype = compute_dtype(x_TD)
        kernels = kernels_for(x_TD) if kernels is None else kernels
        mlp = self._local_mlp(dtype, x_TD)
        if not isinstance(routing, Routing):
            x_RD = routing.dispatch(x_TD.to(dtype))
            # at evaluation batches may differ in size between ranks, so only training has equal shares
            if self.training:
                return routing.combine(self._even(x_RD, mlp, kernels))
            num_experts = self.mesh.size() * mlp.weight1.shape[0]
            counts_E = torch.full((num_experts,), x_RD.shape[0] // num_experts, device=x_RD.device)
            return routing.combine(self._uneven(x_RD, counts_E, mlp, kernels))
        choices = Choices.of(routing)
        num_experts = routing.gates_GSE.shape[-1]
        if self.training and choices.capacity is not None:
            return self._by_capacity(x_TD, choices, num_experts, mlp, kernels)
        layout = segments.segment_layout(choices, num_experts)
        counts_E = layout.ends_E.long().diff(prepend=layout.ends_E.new_zeros(1).long())
        y_RD = self._uneven(rows.dispatch(x_TD.to(dtype), layout), counts_E, mlp, kernels)
        return rows.combine(y_RD, choices.combine_weights_TK(), layout)

    def _by_capacity(self, x_TD: Tensor, choices: Choices, num_experts: int, mlp: Mlp, kernels: Kernels) -> Tensor:
        fused = kernels.experts
        if fused is not None and choose_backend(x_TD, choices, mlp, self.backend, kernels) is fused:
            x_RD, share_rows = fused.dispatch_by_capacity(x_TD, choices, num_experts, mlp.dtype)
            return fused.combine_by_capacity(self._even(x_RD, mlp, kernels), choices, share_rows)
        layout = padded.padded_layout(choices, num_experts)
        y_RD = self._even(rows.dispatch(x_TD.to(mlp.dtype), layout), mlp, kernels)
        return rows.combine(y_RD, choices.combine_weights_TK(), layout)

    def _even(self, x_RD: Tensor, mlp: Mlp, kernels: Kernels) -> Tensor:
        """(R, D) -> (R, O). Each expert has an equal share of the rows, of the same size on all ranks.

        So sizes are known beforehand, and the host never synchronises.
        """
        processes, own = self.mesh.size(), mlp.weight1.shape[0]
        splits = [x_RD.shape[0] // processes] * processes
        slots = splits[0] // own
        x_RD = self._exchange(x_RD, splits, splits)  # now ordered by rank, own expert, slot
        choices = Choices(
            chosen_TK=torch.arange(own, device=x_RD.device).repeat_interleave(slots).repeat(processes)[:, None],
            weights_TK=torch.ones(len(x_RD), 1, device=x_RD.device),
            kept_TK=torch.ones(len(x_RD), 1, dtype=torch.bool, device=x_RD.device),
            slots_TK=torch.arange(slots, device=x_RD.device).repeat(processes * own)[:, None],
            groups=Groups(processes, own * slots, own * slots, own * slots),
            capacity=slots,
        )
        y_RD = self._own_experts(x_RD, choices, mlp, kernels)
        return self._exchange(y_RD, splits, splits)

    def _uneven(self, x_RD: Tensor, counts_E: Tensor, mlp: Mlp, kernels: Kernels) -> Tensor:
        """(R, D) -> (R, O). Expert e has `counts_E[e]` rows; the rows after the last expert's get zeros.

        The ranks exchange the counts, for which the host synchronises once.
        """
        processes, own = self.mesh.size(), mlp.weight1.shape[0]
        even = [own] * processes
        arriving_PE = all_to_all_single(counts_E, even, even, self.mesh.get_group()).view(processes, own)
        sent, arriving = torch.stack([counts_E.view(processes, own).sum(1), arriving_PE.sum(1)]).tolist()
        without_expert = x_RD.shape[0] - sum(sent)
        x_RD = self._exchange(x_RD[: sum(sent)], arriving, sent)
        expert_R = torch.arange(own, device=x_RD.device).repeat(processes).repeat_interleave(arriving_PE.flatten())
        choices = Choices(
            chosen_TK=expert_R[:, None],
            weights_TK=torch.ones(len(x_RD), 1, device=x_RD.device),
            kept_TK=None,
            slots_TK=None,
            groups=Groups(1, len(x_RD), len(x_RD), len(x_RD)),
            capacity=None,
        )
        y_RD = self._own_experts(x_RD, choices, mlp, kernels)
        y_RD = self._exchange(y_RD, sent, arriving)
        return F.pad(y_RD, [0, 0, 0, without_expert])

    def _own_experts(self, x_RD: Tensor, choices: Choices, mlp: Mlp, kernels: Kernels) -> Tensor:
        """Runs each row through its expert. The backend is chosen as in a layer that is not sharded."""
        backend = choose_backend(x_RD, choices, mlp, self.backend, kernels)
        return backend.expert_mlp(x_RD, choices, mlp).to(x_RD.dtype)

    def _exchange(self, x_RD: Tensor, arriving: list[int], sent: list[int]) -> Tensor:
        return _Arrived.apply(all_to_all_single_autograd(x_RD.contiguous(), arriving, sent, self.mesh.get_group()))

    def _local_mlp(self, dtype: torch.dtype, x_TD: Tensor) -> Mlp:
        """This rank's experts, as plain tensors."""
        mlp = self._mlp(dtype, x_TD)
        local = {part: self._local(getattr(mlp, part)) for part in ("weight1", "bias1", "weight2", "bias2")}
        # local shards are new tensors in each pass, so a kept cast would never match
        mlp = mlp._replace(cast=lambda weight: weight.detach().to(dtype), keeps_casts=False)
        if mlp.norm is None:
            return mlp._replace(**local)
        weights = {name: self._local(parameter) for name, parameter in mlp.norm.named_parameters()}
        norm = mlp.norm
        return mlp._replace(**local, norm=lambda *inputs: torch.func.functional_call(norm, weights, inputs))

    def _local(self, parameter: DTensor | None) -> Tensor | None:
        # an expert sums the gradients of P ranks, and each rank's loss is a mean over its own batch: so divide by P
        return None if parameter is None else _ScaleGradient.apply(parameter.to_local(), 1 / self.mesh.size())


class _Arrived(torch.autograd.Function):
    """Waits for a collective. An AsyncCollectiveTensor has no memory that kernels other than torch's could read."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.wait() if isinstance(x, AsyncCollectiveTensor) else x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient * ctx.factor, None
