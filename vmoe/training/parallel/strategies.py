"""Lightning's strategies for several ranks, and their demands on batches."""

import math
from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn

from vmoe.data.mixing import GROUP
from vmoe.errors import UserError
from vmoe.training.config import ParallelConfig, TrainConfig
from vmoe.training.parallel.folder_writer import FolderWriter
from vmoe.training.parallel.sharding import ShardedStrategy, shard_model


class UnwrappedDataParallel(DDPStrategy):
    """DDP without torch's wrapper: a captured step cannot hold its hooks, so the step itself averages the gradients."""

    def configure_ddp(self) -> None:
        """Leaves the module as it is, and copies the first rank's weights to all ranks."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            torch.distributed.broadcast(tensor.detach(), 0)

    def on_exception(self, exception: BaseException) -> None:
        self.lightning_module.on_train_end()  # Lightning calls it only if training succeeds; it frees the graph


def strategy_of(config: TrainConfig, processes: int, writer: FolderWriter) -> Strategy | str:
    """Lightning's strategy for a config. `writer` writes the checkpoints of a sharded model."""
    if config.parallel.strategy == "none":
        return "auto"
    if config.parallel.strategy != "ddp":
        return ShardedStrategy(processes, writer)
    if config.trainer.cuda_graph:
        return UnwrappedDataParallel()
    # updates keep buffers equal on all ranks; an idle expert has a gradient of zero, so no gradient is ever missing
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def sharding_of(config: ParallelConfig, processes: int, device_type: str) -> Callable[[nn.Module], None] | None:
    """The function that shards a model for the strategy (see `sharding.shard_model`), or None."""
    if config.strategy not in ("fsdp", "expert"):
        return None
    is_whole = config.dense == "whole"
    return partial(
        shard_model,
        processes=processes,
        expert_size=config.expert_size,
        dense_is_whole=is_whole,
        device_type=device_type,
    )


def fallback_of_muon(config: TrainConfig, processes: int) -> str | None:
    """A line on the sharded matrices that Muon leaves to AdamW; None if there are none."""
    if config.optim.name != "muon" or config.parallel.strategy not in ("fsdp", "expert"):
        return None
    has_whole_experts = config.moe is not None and not 1 < config.parallel.expert_size < processes
    if config.parallel.dense == "whole":
        return None if has_whole_experts else "optim.name=muon: AdamW trains the experts, which are sharded"
    kept = ", but whole experts are Muon's" if has_whole_experts else ""
    return f"optim.name=muon: AdamW trains the matrices that parallel.strategy={config.parallel.strategy} shards{kept}"


def check_parts(config: TrainConfig, batch_size: int, count: int) -> None:
    """Checks that `count` ranks can share batches and experts without splitting a routing group of images.

    Args:
        config: The run.
        batch_size: Images per batch of all ranks together.
        count: The world size.

    Raises:
        UserError: They cannot.
    """
    size = config.parallel.expert_size
    if count % size:
        raise UserError(f"parallel.expert_size={size}: must divide the number of processes, {count}")
    if config.moe is not None and config.moe.num_experts % size:
        raise UserError(f"parallel.expert_size={size}: must divide moe.num_experts={config.moe.num_experts}")
    if count == 1:
        return
    if config.trainer.cuda_graph and config.parallel.strategy == "expert" and size != count:
        raise UserError(
            f"parallel.expert_size={size}: must be {count}, the number of processes, for trainer.cuda_graph"
        )
    if config.moe is not None and config.moe.routing_group == "batch":
        raise UserError("moe.group=batch: a batch is shared by several processes; use a number of images, such as 8")
    routed = config.moe.routing_group if config.moe is not None and config.moe.routing_group != "image" else 1
    unit = count * math.lcm(routed, GROUP if config.data.mix.is_on else 1)
    if batch_size % unit:
        near = " or ".join(str(size) for size in (batch_size // unit * unit, -(-batch_size // unit) * unit) if size)
        raise UserError(
            f"data.batch_size={batch_size}: {count} processes must get equally many whole groups of images, "
            f"so it must be a multiple of {unit}; use {near}"
        )
