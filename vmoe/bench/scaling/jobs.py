"""What is measured: trainings by layout, model, batch and number of processes."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vmoe.bench.plan.layouts import MeshLayout
from vmoe.moe import MoeConfig
from vmoe.training.config import OptimConfig, ParallelConfig, TrainConfig, TrainerConfig

PARTS = ("equality", "speed", "checkpoint", "size")
IMAGES_A_GROUP = 8
CLASSES = 1000
GRAPHED_STEPS = 6  # of which the first few run as they are
_PRECISIONS = {"float32": "32", "float64": "32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Model:
    """A V-MoE: every second MLP has experts, of which a token takes one.

    Attributes:
        title: What tables call it.
        name: Of timm.
        image_size: Side of the images in pixels.
        kwargs: timm's arguments.
    """

    title: str
    name: str
    image_size: int
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A training to measure.

    Attributes:
        part: Of `PARTS`.
        processes: Their number.
        layout: A strategy of `ParallelConfig`.
        expert_size: As there.
        dense: As there.
        model: The model.
        experts: E.
        batch: Images of all processes.
        dtype: float32, float64, or bfloat16 by autocast.
        seconds: The most that it may take.
        memory: GiB that a process may use at most; None for all there is.
        steps: Updates that are counted.
        step: Of a checkpoint: "whole" trains without a stop, "save" stops half-way, "resume" goes on from there.
        compiled: Whether the model is compiled.
        graphed: Whether the step is captured as a CUDA graph.
    """

    part: str
    processes: int
    layout: str
    expert_size: int
    dense: str
    model: Model
    experts: int
    batch: int
    dtype: str
    seconds: int = 60
    memory: float | None = None
    steps: int = 3
    step: str = "whole"
    compiled: bool = False
    graphed: bool = False

    @property
    def title(self) -> str:
        """The layout as tables show it."""
        return str(MeshLayout(self.layout, self.processes, self.expert_size, self.dense))

    @property
    def key(self) -> str:
        """A name of its own, for files."""
        words = [
            self.part,
            *(["compiled"] if self.compiled else []),
            *(["graphed"] if self.graphed else []),
            self.model.title,
            f"E{self.experts}",
            f"B{self.batch}",
            self.dtype,
            self.title,
            self.step,
        ]
        return "-".join([*words, f"{self.processes}p"]).translate({ord(sign): None for sign in " ,/"})

    def moe(self) -> MoeConfig:
        """The layers as the paper has them: batch priority in groups of 8 images, noise, balance losses."""
        factors = {"capacity_factor": 1.05, "eval_capacity_factor": 1.05, "batch_priority": True}
        if self.graphed and self.part == "equality":
            factors["noise_std"] = 0.0  # a captured step cannot draw it by image
        return MoeConfig(layers="every-2", num_experts=self.experts, top_k=1, group=IMAGES_A_GROUP, **factors)

    def config(self, device_type: str, epochs: int = 1) -> TrainConfig:
        """The run that a user would start for it."""
        draws = "process" if self.part in ("speed", "size") or self.graphed else "sample"
        return TrainConfig(
            moe=self.moe(),
            optim=OptimConfig(warmup_epochs=0),
            trainer=TrainerConfig(
                epochs=epochs,
                device=device_type,
                precision=_PRECISIONS[self.dtype],
                compile=self.compiled,
                cuda_graph=self.graphed,
            ),
            parallel=ParallelConfig(self.layout, self.expert_size, self.dense, draws),
        )

    def as_row(self) -> dict[str, Any]:
        """What tells a row of the results from others."""
        row = {key: value for key, value in asdict(self).items() if key not in ("model", "seconds", "memory", "layout")}
        return {"key": self.key, "layout": self.title, "model": self.model.title, **row}


@dataclass(frozen=True)
class Sizes:
    """Of what is measured on a kind of device.

    Attributes:
        models: Whose speed is measured.
        experts: E, each with each model.
        batch: Images a process.
        dtype: Of speed and size.
        small: The model that is trained for its results.
        large: The model that grows by blocks until it does not fit.
        large_batch: Images a process of that.
        steps: Updates that are timed.
        compiled: Whether models whose speed is measured are compiled.
        graphed: Whether steps are captured as CUDA graphs, where speed is measured and in equality.
    """

    models: tuple[Model, ...]
    experts: tuple[int, ...]
    batch: int
    dtype: str
    small: Model
    large: Model
    large_batch: int
    steps: int
    compiled: bool = False
    graphed: bool = False


_TINY = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
SIZES = {
    "cuda": Sizes(
        models=(Model("S/16", "vit_small_patch16_224", 224), Model("B/16", "vit_base_patch16_224", 224)),
        experts=(8, 32),
        batch=128,
        dtype="bfloat16",
        small=Model("Ti/16, 4 blocks", "vit_tiny_patch16_224", 224, {"depth": 4}),
        large=Model("L/16", "vit_large_patch16_224", 224),
        large_batch=16,
        steps=12,
    ),
    "cpu": Sizes(
        models=(Model("tiny", "vit_tiny_patch16_224", 32, _TINY),),
        experts=(4,),
        batch=8,
        dtype="float32",
        small=Model("tiny", "vit_tiny_patch16_224", 32, _TINY),
        large=Model("small", "vit_tiny_patch16_224", 32),
        large_batch=8,
        steps=3,
    ),
}


def jobs_of(parts: list[str], counts: list[int], sizes: Sizes, seconds: int, memory: float | None) -> list[Job]:
    """All trainings of some parts, in an order in which results come early.

    Args:
        parts: Of `PARTS`.
        counts: Numbers of processes, rising; the first is 1, and each divides the last.
        sizes: Of models and batches.
        seconds: The most that a job may take.
        memory: GiB that a process may use at most; None for all there is.
    """
    makers = {"equality": _equality, "speed": _speed, "checkpoint": _checkpoint, "size": _size}
    jobs = [job for part in PARTS if part in parts for job in makers[part](counts, sizes)]
    return [replace(job, seconds=seconds, memory=memory) for job in jobs]


def layouts(processes: int, experts: int, graphed: bool = False) -> list[tuple[str, int, str]]:
    """The layouts in which so many processes can share so many experts: strategy, expert_size and dense.

    Args:
        processes: Their number.
        experts: E.
        graphed: Only those whose step can be captured.
    """
    if processes == 1:
        return [("none", 1, "cut")]
    if graphed:
        found = [("ddp", 1, "cut"), ("expert", processes, "whole")]
    else:
        sizes = [processes, *([processes // 2] if processes >= 4 and processes % 2 == 0 else [])]
        of_experts = [("expert", size, dense) for size in sizes for dense in ("cut", "whole")]
        found = [("ddp", 1, "cut"), ("fsdp", 1, "cut"), *of_experts]
    return [layout for layout in found if experts % layout[1] == 0]


def _multiple(least: int, of: int) -> int:
    """The smallest multiple of `of` that is at least `least`."""
    return -(-least // of) * of


def _compared(counts: list[int]) -> tuple[int, int]:
    """Experts and images that each count of processes can share, images in whole groups."""
    most = counts[-1]
    return _multiple(8, most), 2 * IMAGES_A_GROUP * most


def _equality(counts: list[int], sizes: Sizes) -> list[Job]:
    experts, batch = _compared(counts)
    how = {"graphed": True, "steps": GRAPHED_STEPS} if sizes.graphed else {}
    return [
        Job("equality", count, *layout, sizes.small, experts, batch, dtype, **how)
        for dtype in ("float64", "float32", "bfloat16")
        for count in counts
        for layout in layouts(count, experts, sizes.graphed)
    ]


def _speed(counts: list[int], sizes: Sizes) -> list[Job]:
    jobs = []
    for model in sizes.models:
        for experts in sizes.experts:
            for count in counts:
                # As many a process (weak scaling) and as many in all (strong scaling) as with the most processes
                for batch in dict.fromkeys((sizes.batch * count, sizes.batch * counts[-1])):
                    for layout in layouts(count, experts, sizes.graphed):
                        how = (count, *layout, model, experts, batch, sizes.dtype)
                        kind = {"compiled": sizes.compiled, "graphed": sizes.graphed}
                        jobs.append(Job("speed", *how, steps=sizes.steps, **kind))
    return jobs


def _checkpoint(counts: list[int], sizes: Sizes) -> list[Job]:
    most = counts[-1]
    experts, batch = _compared(counts)
    saving = ("fsdp", 1, "cut") if most == 1 else ("expert", most // 2 if most >= 4 and most % 2 == 0 else most, "cut")
    how = (sizes.small, experts, batch, "float64")
    jobs = [Job("checkpoint", most, *saving, *how, step="save"), Job("checkpoint", 1, "none", 1, "cut", *how)]
    for count in counts:
        jobs += [Job("checkpoint", count, *layout, *how, step="resume") for layout in layouts(count, experts)]
    return jobs


def _size(counts: list[int], sizes: Sizes) -> list[Job]:
    jobs = []
    experts = _multiple(32, counts[-1])
    for count in dict.fromkeys((1, counts[-1])):
        for layout in layouts(count, experts):
            if layout[0] != "ddp":  # whose processes have no more room than one
                how = (sizes.large, experts, sizes.large_batch * count, sizes.dtype)
                jobs.append(Job("size", count, *layout, *how, steps=2))
    return jobs
