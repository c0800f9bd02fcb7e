"""Measures a classifier on a set of images: accuracy, calibration, confusion, speed, and drops of its experts.

Axis letters: B images, C classes, E experts.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vmoe.errors import UserError
from vmoe.evaluation.ensemble import RunningMemberFigures, members_kept
from vmoe.evaluation.guidance import Guidance, RouterFigures, right_routers
from vmoe.evaluation.metrics import Evaluation, LayerUse, MultiLabelEvaluation, RunningMetrics, RunningMultiLabelMetrics
from vmoe.moe import MoeMlp, moe_layers, set_eval_capacity_factor, set_top_k
from vmoe.moe.assignment import CapacityError


@torch.inference_mode()
def measure_batches(
    model: nn.Module,
    batches: Iterable,
    num_classes: int,
    device: torch.device | str = "cpu",
    ranks_images: bool = False,
    guidance: Guidance | None = None,
) -> Evaluation | MultiLabelEvaluation:
    """Measures a model on batches of (images (B, 3, H, W), labels (B,), ...), with its current capacity.

    The model is put in evaluation mode and moved to the device; it stays so. `ranks_images` adds the ranking figures
    (AUROC, average precision). A model of `vmoe.load` for several classes per image takes labels (B, C) of 0 and 1, and
    always has them. A `guidance` adds the figures of the routers.

    Raises:
        UserError: There is no image, or a logit is not finite.
    """
    device = torch.device(device)
    model = model.to(device).eval()
    layers = dict(moe_layers(model))
    metrics: RunningMetrics | RunningMultiLabelMetrics
    if getattr(model, "multi_label", False):
        metrics = RunningMultiLabelMetrics(num_classes, device, model.thresholds)
    else:
        metrics = RunningMetrics(num_classes, device, ranks_images)
    sums = {
        name: torch.zeros(1 + layer.num_experts, dtype=metrics.sums.dtype, device=device)
        for name, layer in layers.items()
    }
    of_members = RunningMemberFigures(device, metrics.sums.dtype)
    of_router = torch.zeros(2, dtype=metrics.sums.dtype, device=device)
    if guidance is not None:
        guidance.to(device)
    started, first_batch = None, 0
    with members_kept(model if isinstance(metrics, RunningMetrics) else nn.Identity()) as members:
        for images, labels, *_ in batches:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            if guidance is not None:
                guidance.labels = labels
            metrics.update(model(images), labels)
            if guidance is not None:
                guidance.loss(labels)
                of_router += guidance.sums
            if members is not None and members.kept is not None:
                of_members.update(members.kept, labels)
            for name, layer in layers.items():
                used = torch.cat([layer.statistics.dropped.reshape(1), layer.statistics.load])
                sums[name] += len(labels) * used.to(metrics.sums)
            if started is None:
                _wait(device)
                started, first_batch = time.perf_counter(), len(labels)
    _wait(device)
    elapsed = time.perf_counter() - started if started is not None else 0.0
    figures = metrics.compute()
    if members is not None:
        figures["members"] = of_members.compute()
    if guidance is not None:
        figures["router"] = RouterFigures(guidance.names, *(of_router / figures["images"]).tolist())
    timed = figures["images"] - first_batch
    use = {name: (total / figures["images"]).tolist() for name, total in sums.items()}
    return metrics.record(
        **figures,
        capacity_factor=eval_capacity_factor(model),
        top_k=experts_per_token(model),
        images_per_second=timed / elapsed if timed else None,
        dropped=_dropped_overall(model, images, {name: dropped for name, (dropped, *_) in use.items()}),
        layers={
            name: LayerUse(dropped, [share * len(load) for share in load]) for name, (dropped, *load) in use.items()
        },
    )


def evaluate_sweep(
    model: nn.Module,
    loader: Iterable,
    num_classes: int,
    factors: Sequence[float] | None = None,
    top_ks: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    guidance: Guidance | None = None,
    oracle_router: bool = False,
) -> Iterator[Evaluation | MultiLabelEvaluation]:
    """Measures a model for each K and each capacity factor (inf: nothing dropped), and yields each evaluation.

    Evaluations include the ranking figures; a `guidance` adds the figures of the routers, and `oracle_router` the
    model's accuracy with perfect routers. None for `factors` or `top_ks` keeps the model's own. A capacity grows with
    K, as in training. Each layer's own K and factor are restored at the end.

    Raises:
        UserError: The model is dense or its tokens do not choose, a K or a capacity is impossible, or as in
            `measure_batches`.
    """
    for option, values in (("capacity_factor", factors), ("top_k", top_ks)):
        if values and not dict(moe_layers(model)):
            raise UserError(
                f"{option}={values[0]:.15g}: this checkpoint is a dense model, without experts; leave it out"
            )
    with restored_settings(model):
        for top_k in top_ks or ():  # tries all before the first measurement
            _set_top_k(model, top_k)
        for factor in factors or ():
            set_capacity(model, factor)
    with restored_settings(model):
        for top_k in top_ks or (None,):
            if top_k is not None:
                _set_top_k(model, top_k)
            for factor in factors or (None,):
                if factor is not None:
                    set_capacity(model, factor)
                with named_factor(factor):
                    result = measure_batches(model, loader, num_classes, device, ranks_images=True, guidance=guidance)
                    if oracle_router:
                        result = _with_oracle(result, model, loader, device, guidance)
                yield result


def _with_oracle(
    result: Any, model: nn.Module, loader: Iterable, device: torch.device | str, guidance: Guidance | None
) -> Any:
    """The evaluation with the accuracy of the same model under routers that are always right."""
    assert guidance is not None  # as `require_guidance` made sure
    with right_routers(guidance):
        oracle = measure_batches(model, loader, len(result.class_accuracy), device, guidance=guidance)
    return dataclasses.replace(result, router=dataclasses.replace(result.router, oracle_top1=oracle.top1))


def _set_top_k(model: nn.Module, top_k: int) -> None:
    try:
        set_top_k(model, top_k)
    except ValueError as error:
        raise UserError(str(error)) from error


def set_capacity(model: nn.Module, factor: float) -> None:
    """Sets the capacity factor of all MoE layers at evaluation; inf drops nothing.

    Raises:
        UserError: It cannot be set for any images. The message names the argument.
    """
    routers, routes = ({getattr(layer.config, name) for _, layer in moe_layers(model)} for name in ("router", "route"))
    allowed = "> 0 and at most 1000, or inf to drop nothing"
    if "soft" in routers:
        allowed = 'inf with router="soft": the slots are part of its parameters'
    elif "image" in routes:
        allowed = 'inf with route="image": no image is dropped'
    elif "expert_choice" in routers:
        allowed = '> 0 and at most 1000 with router="expert_choice", where experts fill slots'
    try:
        if math.isinf(factor) and "expert_choice" in routers:
            raise ValueError(allowed)  # there None means training's factor, not "no drops"
        set_eval_capacity_factor(model, None if math.isinf(factor) else factor)
    except ValueError as error:
        raise UserError(f"capacity_factor={factor:.15g}: must be {allowed}") from error


@contextmanager
def named_factor(factor: float | None) -> Iterator[None]:
    """Turns the error of a capacity without slots into one that names the argument, if the factor is an argument.

    Raises:
        UserError: The capacity has no slot.
    """
    try:
        yield
    except CapacityError as error:
        raise UserError(str(error) if factor is None else f"capacity_factor={factor}: {error.reason}") from error


@contextmanager
def restored_settings(model: nn.Module) -> Iterator[None]:
    """Restores each layer's K, capacity and priority after the block."""
    own = [(layer, layer.config) for _, layer in moe_layers(model)]
    try:
        yield
    finally:
        for layer, config in own:
            if not config.fills_slots:
                set_top_k(layer, config.top_k)
            layer.config = config


def eval_capacity_factor(model: nn.Module) -> float | None:
    """The capacity factor of the model's MoE layers at evaluation; None without drops or without MoE layers."""
    return next((layer.config.eval_capacity_factor for _, layer in moe_layers(model)), None)


def experts_per_token(model: nn.Module) -> int | None:
    """K of the model's MoE layers; None if tokens do not choose experts, or without MoE layers."""
    config = next((layer.config for _, layer in moe_layers(model)), None)
    return None if config is None or config.fills_slots else config.top_k


@torch.inference_mode()
def shares_of_choices(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Each MoE layer's share of all choices for these images: its tokens times K over the sum of all layers.

    Stages of a backbone may have different numbers of tokens. If tokens do not choose, only tokens count.
    """
    choices: dict[str, int] = {}

    def counter(name: str, layer: MoeMlp) -> Callable[..., None]:
        def count(router: nn.Module, inputs: tuple, output: object) -> None:
            choices[name] = len(inputs[0]) * (1 if layer.config.fills_slots else layer.config.top_k)

        return count

    handles = [layer.router.register_forward_hook(counter(name, layer)) for name, layer in moe_layers(model)]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code calls no hooks
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: own / sum(choices.values()) for name, own in choices.items()}


def _dropped_overall(model: nn.Module, images: Tensor, dropped: dict[str, float]) -> float | None:
    """The dropped share over all layers, weighted by their choices for a batch of images."""
    if not any(dropped.values()):  # without drops no pass to count choices is needed
        return 0.0 if dropped else None
    return sum(share * dropped[name] for name, share in shares_of_choices(model, images).items())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
