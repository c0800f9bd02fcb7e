"""Sharded models (FSDP2, expert parallelism) under Lightning, with their clipping and checkpoints.

Every DTensor here is sharded over all ranks: each number of a parameter is on one rank only.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from vmoe.checkpoints import read_checkpoint
from vmoe.checkpoints.sharded import folder_tensors, is_sharded, read_plain_part, take_average
from vmoe.errors import UserError
from vmoe.moe import moe_layers
from vmoe.moe.parallel import shard_experts
from vmoe.training.optim.groups import by_name
from vmoe.training.optim.muon import Muon
from vmoe.training.optim.weight_passes import scale_down
from vmoe.training.parallel.collectives import local, new_mesh, total
from vmoe.training.parallel.folder_writer import FolderWriter, load_tensors


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for models that shard themselves. Any number of ranks can read its checkpoints.

    Args:
        processes: The world size.
        writer: Writes the checkpoints.
    """

    def __init__(self, processes: int, writer: FolderWriter) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1)
        self._writer = writer

    def on_exception(self, exception: BaseException) -> None:
        self.lightning_module.on_train_end()  # Lightning calls it only if training succeeds; it frees the model

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns an empty dict: `save_checkpoint` writes the tensors directly from the model."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Returns an empty dict, as for the module."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes a folder: each rank writes its shards of the tensors, the first rank all else."""
        module, (optimizer,) = self.lightning_module, self.optimizers
        names = {parameter: name for name, parameter in module.named_parameters()}
        groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
        checkpoint["optimizer_states"] = [{"param_groups": groups}]
        take_average(checkpoint)  # its tensors are among `_tensors`
        self._writer.write(_tensors(module, optimizer), checkpoint, Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fills this rank's tensors from a folder or an ordinary file, and returns the rest."""
        path = Path(checkpoint_path)
        module, (optimizer,) = self.lightning_module, self.optimizers
        _create_state(optimizer)
        targets = _tensors(module, optimizer)
        if is_sharded(path):
            load_tensors(targets, path)
            content = read_plain_part(path)
            _restore_groups(module, optimizer, content["optimizer_states"][0])
            return content
        content = read_checkpoint(path)
        states = by_name(content["optimizer_states"][0], module.optimizer_names())
        _restore_groups(module, optimizer, states)
        sources = folder_tensors(content["state_dict"], states["state"], take_average(content))
        for name, target in targets.items():
            fill(target, sources[name])
        return content


def shard_model(
    model: nn.Module, processes: int, expert_size: int, device_type: str, dense_is_whole: bool = False
) -> None:
    """Shards a model that all ranks hold.

    Args:
        model: Its parameters become DTensors, except those that all ranks keep whole.
        processes: The world size.
        expert_size: The number of ranks over which the experts of a layer are sharded; 1 shards them like all else.
        device_type: "cuda" or "cpu".
        dense_is_whole: Whether all ranks keep everything except the experts whole.

    Raises:
        UserError: The experts cannot be sharded this way.
    """
    sharded = _shard_experts(model, processes, expert_size, device_type) if expert_size > 1 else set()
    if dense_is_whole and expert_size == processes:
        return  # nothing needs gathering
    data = new_mesh(device_type, (processes,))
    # weights kept between forward and backward would miss a change of the shards, such as swapping in the average
    how = {"mesh": data, "reshard_after_forward": True}
    units = [module for name, module in model.named_modules() if name.split(".")[-2:-1] == ["blocks"]]
    ignored = sharded.union(p for p in model.parameters() if p.dim() == 0)  # FSDP2 does not accept scalars
    if dense_is_whole:  # one common root: roots of single layers would keep their weights and not prefetch
        units, ignored = [], set(model.parameters())
    for unit in (*units, model):
        fully_shard(unit, ignored_params=ignored, **how)


def shard_and_fill(
    model: nn.Module,
    shard: Callable[[nn.Module], None],
    source: nn.Module | None,
    device: torch.device,
) -> None:
    """Shards a model on the meta device, allocates each rank's shards, and fills them.

    Args:
        model: The model on the meta device.
        shard: Shards it, such as `shard_model`.
        source: The same model with its weights, on the first rank.
        device: The device of this rank.
    """
    shard(model)
    model.to_empty(device=device)
    sources = {} if source is None else _all_tensors(source)
    for name, target in _all_tensors(model).items():
        tensor = torch.empty(target.shape, dtype=target.dtype, device=device)
        if sources:
            tensor.copy_(sources[name].detach())
        torch.distributed.broadcast(tensor, 0)
        fill(target, tensor)


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _shard_experts(model: nn.Module, processes: int, expert_size: int, device_type: str) -> set[nn.Parameter]:
    """Shards the experts, and returns those of their parameters that need no further sharding."""
    mesh = new_mesh(device_type, (processes // expert_size, expert_size), ("shard", "expert"))
    complete = set()
    for name, layer in moe_layers(model):
        shard_experts(layer, mesh["expert"])
        parameters = layer.experts.stacked_parameters()
        if processes == expert_size:
            complete.update(parameters)
            continue
        if any(parameter.shape[1] % mesh["shard"].size() for parameter in parameters):
            raise UserError(
                f"parallel.expert_size={expert_size}: the width of {name}'s experts is no multiple of "
                f"{mesh['part'].size()}; use {processes}",
                everywhere=True,
            )
        shared = set(layer.experts.parameters()).difference(parameters)  # a learned activation's, whole on all ranks
        how = {"mesh": mesh["shard"], "shard_placement_fn": lambda _: Shard(1)}
        fully_shard(layer.experts, ignored_params=shared, **how)
    return complete


def clip_gradients(parameters: list[nn.Parameter], largest_norm: float) -> Tensor:
    """Like torch's clip_grad_norm_, for parameters of different meshes. Returns the norm before clipping, ()."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded, whole = ([g for g in gradients if isinstance(g, DTensor) is is_sharded] for is_sharded in (True, False))
    squares = []  # without any, torch's norm would lie on the host and force a synchronisation
    if sharded:
        squares.append(total(nn.utils.get_total_norm([local(gradient) for gradient in sharded]).square()))
    if whole:
        squares.append(nn.utils.get_total_norm(whole).square())
    norm = torch.stack(squares).sum().sqrt()
    scale_down(_with_local_gradients(gradients), largest_norm, norm)
    return norm


def _with_local_gradients(gradients: list[Tensor]) -> list[nn.Parameter]:
    """Parameters with this rank's shards of the gradients as their gradients, in the same memory."""
    parameters = []
    for gradient in map(local, gradients):
        parameter = nn.Parameter(gradient)  # it shares memory, but only its gradient is used
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor, or this rank's shard of it, into `target`."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target, source = target.to_local(), source.to_local()
    target.copy_(source)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Like `load_state_dict`, for a model that may be sharded."""
    for name, target in model.state_dict().items():
        fill(target, weights[name])


def _tensors(module: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by their names in its folder."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    states = {names[parameter]: state for parameter, state in optimizer.state.items()}
    average = None if module.average is None else module.average.weights
    return folder_tensors(module.state_dict(), states, average)


def _restore_groups(module: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores the learning rates and other group options of a state by names. Its groups may be others."""
    group_of = {name: group for group in state["param_groups"] for name in group["params"]}
    names = {parameter: name for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        saved = group_of[names[group["params"][0]]]
        group.update({key: value for key, value in saved.items() if key != "params"})


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates the state that an optimiser creates in its first step."""
    if isinstance(optimizer, Muon):
        optimizer.create_state()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
