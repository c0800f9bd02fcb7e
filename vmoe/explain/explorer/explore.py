"""The explorer in Python: `explore(model, batches)` runs every analysis and returns numbers, sample and page."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any

import numpy as np
import torch
from torch import nn

from vmoe.checkpoints import TrainedModel
from vmoe.errors import UserError
from vmoe.evaluation.guidance import guidance_of
from vmoe.explain.explorer.causes import Causes, find_causes
from vmoe.explain.explorer.collection import collect, on_device
from vmoe.explain.explorer.findings import findings
from vmoe.explain.explorer.history import Snapshot, training_loads
from vmoe.explain.explorer.probes import Probes, probe
from vmoe.explain.explorer.report import (
    accuracy_report,
    flows_report,
    layer_report,
    rounded,
    run_report,
    super_classes_report,
)
from vmoe.explain.explorer.subject import Subject
from vmoe.models.members import refuse_ensemble
from vmoe.moe import moe_layers

Track = Callable[[Iterable, str], Iterable]


@dataclass(frozen=True)
class ExploreOptions:
    """The extent of the analyses.

    Args:
        sample: Number of images that the page shows with their maps.
        probe_images: Number of images for consistency, agreement between runs and saturation; 0 for none.
        cause_images: Number of images for ablation of experts and other capacities; 0 for none. It costs a pass for
            each expert of each layer.
        capacity_factors: Capacity factors to try; inf drops nothing.
        replicates: Number of replicates of bootstrap and null.
        seed: Seed of sample, replicates and random routers.
    """

    sample: int = 300
    probe_images: int = 1000
    cause_images: int = 1000
    capacity_factors: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    replicates: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"sample": 1, "probe_images": 0, "cause_images": 0, "replicates": 20, "seed": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {smallest}")


@dataclass(frozen=True)
class DataFacts:
    """Facts about the images that the batches do not hold.

    Args:
        patch_names: Names of the batches' `patch_labels`, if they have these.
        image_names: Names of all images, in the order of the batches; None numbers them.
        provenance: Facts that the report shows: "checkpoint", "data", "split", "command", "versions".
    """

    patch_names: Sequence[str] | None = None
    image_names: Sequence[str] | None = None
    provenance: dict[str, Any] | None = None


@dataclass(frozen=True)
class Exploration:
    """The results of the explorer.

    Attributes:
        report: Every number, as plain types.
        images: The sampled images and their maps, as NumPy arrays.
    """

    report: dict[str, Any] = field(repr=False)
    images: dict[str, Any] = field(repr=False)


def explore(
    model: nn.Module | TrainedModel | Subject,
    batches: Iterable,
    *,
    name: str | None = None,
    others: Sequence[TrainedModel | Subject] = (),
    snapshots: Sequence[Snapshot] = (),
    data: DataFacts | None = None,
    options: ExploreOptions | None = None,
    track: Track = lambda batches, description: batches,
) -> Exploration:
    """Explores what the experts of a V-MoE do.

    Args:
        model: A model with MoE layers, a checkpoint of one, or a `Subject` with the normalisation and class names of a
            model. A plain model has numbers for classes, and mean and std 0.5.
        batches: Batches (images (B, 3, H, W), labels (B,), or (B, C) of 0 and 1 for several classes, or None, ...). The
            iterable must give the same batches each time, with images in random order: costlier analyses use the first
            images, and nulls pair images of a block. Without labels accuracy, classes and causes are left out. An image
            with several classes counts for each of them, and is right if all its classes are.
        name: The model's name in the report; by default a checkpoint's path, or the model's class.
        others: Runs to compare with on the same images; they may be dense.
        snapshots: Earlier checkpoints of the same run.
        data: Facts about the images.
        options: The extent of the analyses.
        track: Wraps batches in a progress bar.

    Raises:
        UserError: The model is dense or an ensemble, there is no image, images differ in size, a logit is not finite,
            or a capacity factor cannot be set.
    """
    options, data = options or ExploreOptions(), data or DataFacts()
    subject = _subject(model, name)
    if subject.is_dense:
        raise UserError(
            f"{subject.name}: a dense model without experts, so there is no routing to explore; give a V-MoE's "
            "checkpoint first, a dense twin may stand behind it"
        )
    subjects = [_subject(other) for other in others]
    for each in (subject, *subjects):
        refuse_ensemble(each.model, f"{each.name}: the explorer follows one expert per choice")
    given = {"patch_kinds": len(data.patch_names or ()), "replicates": options.replicates, "seed": options.seed}
    collection = collect(subject, track(batches, subject.name), sample=options.sample, **given)
    runs = [run_report(subject.name, collection)]
    for other in subjects:
        seen = _Adapted(track(batches, other.name), subject, other)
        runs.append(run_report(other.name, collect(other, seen, sample=1, **given)))
    probes = causes = None
    if options.probe_images:
        some = track(FirstImages(batches, options.probe_images), "consistency")
        probes = probe(subject, some, subjects, [snapshot.subject for snapshot in snapshots], options.seed)
    cause_images = options.cause_images if collection.correct is not None else 0
    if cause_images:
        some = FirstImages(batches, cause_images)
        causes = find_causes(subject, some, options.capacity_factors, options.seed, track)
    report = {
        "title": f"What the experts of {subject.name} do",
        "provenance": {
            "seed": options.seed,
            "num_images": collection.images,
            "probe_images": min(options.probe_images, collection.images),
            "cause_images": min(cause_images, collection.images),
            "replicates": options.replicates,
            **(data.provenance or {}),
        },
        "classes": list(subject.class_names),
        "multi_label": collection.sample["predicted"].ndim == 2,
        "patch_names": None if data.patch_names is None else list(data.patch_names),
        "accuracy": accuracy_report(collection),
        "is_dense": False,
        "layers": [
            layer_report(layer, images, subject.class_names, options.seed)
            for layer, images in zip(collection.layers, collection.sample["layers"], strict=True)
        ],
        "flows": flows_report(collection),
        "capacity": None if causes is None else causes.capacity,
        "training": training_loads(model.path) if isinstance(model, TrainedModel) else None,
        "runs": runs,
        **_probed(probes, subjects, snapshots),
    }
    for layer in report["layers"]:
        _add(layer, probes, causes)
    report["shared_router"] = any(layer.config.shared_router for _, layer in moe_layers(subject.model))
    guidance = guidance_of(model) if isinstance(model, TrainedModel) else None
    for layer, counted in zip(report["layers"], collection.layers, strict=True):
        layer["super_classes"] = None if guidance is None else super_classes_report(counted, guidance)
    report["findings"] = findings(report)
    images = collection.sample
    if data.image_names is not None:
        images = {**images, "name": np.array([data.image_names[number] for number in images["number"]])}
    return Exploration(rounded(report), images)


class FirstImages:
    """An iterable of the first `count` images of batches."""

    def __init__(self, batches: Iterable, count: int) -> None:
        self._batches, self._count = batches, count

    def __length_hint__(self) -> int:
        """The expected number of batches, for a progress bar; 0 if unknown."""
        size = getattr(self._batches, "batch_size", None)
        return min(-(-self._count // size), length_hint(self._batches)) if size else 0

    def __iter__(self) -> Iterator[Sequence]:
        left = self._count
        for batch in self._batches:
            yield tuple(part[:left] if isinstance(part, torch.Tensor) else part for part in batch)
            left -= len(batch[0])
            if left <= 0:
                return


class _Adapted:
    """The same batches, prepared for another model."""

    def __init__(self, batches: Iterable, subject: Subject, other: Subject) -> None:
        self._batches, self._subject, self._other = batches, subject, other

    def __iter__(self) -> Iterator[Sequence]:
        for batch in self._batches:
            images = self._subject.as_seen_by(self._other, on_device(batch, self._subject.device))
            yield batch._replace(images=images) if hasattr(batch, "_replace") else (images, *batch[1:])


def _subject(model: nn.Module | TrainedModel | Subject, name: str | None = None) -> Subject:
    if isinstance(model, Subject):
        return model
    if isinstance(model, TrainedModel):
        return Subject.of(model, name or str(model.path))
    names = [str(index) for index in range(model.num_classes)]
    return Subject(name or type(model).__name__, model.eval(), names, (0.5,) * 3, (0.5,) * 3)


def _probed(probes: Probes | None, others: Sequence[Subject], snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """The report's entries on other runs and earlier checkpoints."""
    agreement = saturation = None
    if probes is not None and any(probes.agreement):
        pairs = zip(others, probes.agreement, strict=True)
        agreement = [{"run": other.name, "layers": layers} for other, layers in pairs if layers]
    if probes is not None and snapshots:
        names = list(probes.consistency)
        saturation = {
            "epochs": [snapshot.epoch for snapshot in snapshots],
            "layers": {name: [part[name] for part in probes.saturation] for name in names},
        }
    return {"agreement": agreement, "saturation": saturation}


def _add(layer: dict[str, Any], probes: Probes | None, causes: Causes | None) -> None:
    """Adds a layer's results of probes and causes to its report."""
    name = layer["name"]
    if probes is not None:
        layer["consistency"] = probes.consistency[name]
    if causes is not None:
        layer["ablation"] = causes.ablation.get(name)
        layer["random_router"] = causes.random_router.get(name)
