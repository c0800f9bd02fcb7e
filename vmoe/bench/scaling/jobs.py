"""The trainings that are measured: V-MoEs with experts in every second MLP and one expert per token."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from vmoe.bench.cases import IMAGES_PER_GROUP
from vmoe.bench.plan.layouts import MeshLayout
from vmoe.bench.plan.planner import layouts_for
from vmoe.bench.plan.workload import Workload
from vmoe.bench.report import Row
from vmoe.moe import MoeConfig
from vmoe.training.config import OptimConfig, ParallelConfig, TrainConfig, TrainerConfig

PARTS = ("equality", "speed", "checkpoint")
NUM_CLASSES = 1000
COMPARED_STEPS, GRAPHED_STEPS = 3, 6  # updates of compared trainings; a graph is captured in the fourth
_AUTOCAST = {"float32": "32", "float64": "32", "bfloat16": "bf16"}  # types by what `trainer.precision` calls them


@dataclass(frozen=True)
class ScalingModel:
    """A model: its title in tables, its name in timm, the side of the images in pixels, and timm's arguments."""

    title: str
    name: str
    image_size: int
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScalingJob:
    """A training to measure."""

    part: str  # one of `PARTS`
    model: ScalingModel
    layout: MeshLayout
    experts: int  # E, of a layer
    batch: int  # images per update, of all processes
    dtype: str  # float32, float64, or bfloat16 by autocast
    steps: int = COMPARED_STEPS  # updates that are timed, or updates per epoch of what is compared
    compiled: bool = False
    graphed: bool = False  # whether the step is captured as a CUDA graph

    @property
    def workload(self) -> Workload:
        """The model with the layers of the paper: batch priority in groups of 8 images, noise, balance losses."""
        # a comparison needs noise per image, which a captured step cannot draw
        noise = {"noise_std": 0.0} if self.graphed and self.part == "equality" else {}
        moe = MoeConfig(
            layers="every-2", num_experts=self.experts, top_k=1, group=IMAGES_PER_GROUP, batch_priority=True,
            capacity_factor=1.05, eval_capacity_factor=1.05, **noise,
        )  # fmt: skip
        model, dtype = self.model, getattr(torch, self.dtype)
        sizes = model.name, model.kwargs, moe, NUM_CLASSES, model.image_size, self.batch
        return Workload(*sizes, dtype=dtype, graphed=self.graphed)

    def config(self, device_type: str, epochs: int = 1) -> TrainConfig:
        """The run that a user would start for it."""
        how = {"precision": _AUTOCAST[self.dtype], "compile": self.compiled, "cuda_graph": self.graphed}
        draws = "process" if self.part == "speed" or self.graphed else "sample"
        return TrainConfig(
            moe=self.workload.moe,
            optim=OptimConfig(warmup_epochs=0),
            trainer=TrainerConfig(epochs=epochs, device=device_type, **how),
            parallel=ParallelConfig(self.layout.strategy, self.layout.expert_size, self.layout.dense, draws),
        )

    def as_row(self) -> Row:
        """The job's own columns in a row of results."""
        return asdict(self) | {"model": self.model.title, **self.layout._asdict(), "layout": str(self.layout)}


@dataclass(frozen=True)
class ScalingSettings:
    """The settings of the measurements on a kind of device."""

    models: tuple[ScalingModel, ...]  # models for speed
    experts: tuple[int, ...]  # E; each is measured with each model
    batch: int  # images per process
    dtype: str  # type for speed
    small: ScalingModel  # model for the comparison of results
    steps: int  # number of timed steps
    compiled: bool = False  # whether to compile for speed
    graphed: bool = False  # whether to capture steps for speed and results


_S16 = ScalingModel("S/16", "vit_small_patch16_224", 224)
_B16 = ScalingModel("B/16", "vit_base_patch16_224", 224)
_TI16 = ScalingModel("Ti/16, 4 blocks", "vit_tiny_patch16_224", 224, {"depth": 4})
_TINY_SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
_TINY = ScalingModel("tiny", "vit_tiny_patch16_224", 32, _TINY_SIZES)
SETTINGS = {
    "cuda": ScalingSettings((_S16, _B16), (8, 32), batch=128, dtype="bfloat16", small=_TI16, steps=12),
    "cpu": ScalingSettings((_TINY,), (4,), batch=8, dtype="float32", small=_TINY, steps=3),
}


def jobs_of(parts: list[str], counts: list[int], settings: ScalingSettings) -> list[ScalingJob]:
    """All trainings of some parts, in the order in which they run.

    In comparisons of results one process comes first. Else the most processes come first, since their rows matter most
    if time runs out.

    Args:
        parts: Names from `PARTS`.
        counts: Numbers of processes, ascending; the first is 1, and each divides the last.
        settings: Models and batches.
    """
    most = counts[-1]
    # experts and whole groups of images must divide over each number of processes
    compared = ScalingJob(
        "equality", settings.small, MeshLayout("none", 1), -(-8 // most) * most, 2 * IMAGES_PER_GROUP * most, "float64"
    )
    graphed, steps = settings.graphed, GRAPHED_STEPS if settings.graphed else COMPARED_STEPS
    jobs = [
        replace(compared, layout=layout, dtype=dtype, steps=steps, graphed=graphed)
        for count in counts
        for dtype in ("float64", "float32", "bfloat16")
        for layout in layouts_measured(count, compared.experts, graphed)
    ]
    timed = {"dtype": settings.dtype, "steps": settings.steps, "compiled": settings.compiled, "graphed": graphed}
    jobs += [
        ScalingJob("speed", model, layout, experts, batch, **timed)
        for count in reversed(counts)
        for model in settings.models
        for experts in settings.experts
        # the same images per process as with the most processes (weak scaling), and the same in all (strong scaling)
        for batch in dict.fromkeys((settings.batch * count, settings.batch * most))
        for layout in layouts_measured(count, experts, graphed)
    ]
    jobs += [
        replace(compared, part="checkpoint", layout=layout)
        for count in counts
        for layout in layouts_measured(count, compared.experts)
    ]
    return [job for part in PARTS if part in parts for job in jobs if job.part == part]


def layouts_measured(processes: int, experts: int, graphed: bool = False) -> list[MeshLayout]:
    """The measured mesh layouts of this many processes, with experts sharded over all of them or over half.

    With `graphed`, only layouts with a step that can be captured.
    """
    found = layouts_for(processes, MoeConfig(num_experts=experts))
    if graphed:
        return [one for one in found if one.strategy in ("none", "ddp") or (one.keeps_dense and one.expert_shards == 1)]
    return [one for one in found if one.expert_size in (1, processes, processes / 2)]
