"""Benchmark of whole models beside their dense twin: a training step, the optimiser's update, and inference.

A training step is the forward pass under autocast, the loss with the balance losses, and the backward pass, with
float32 parameters. The optimiser's update is timed separately: it grows with all parameters, and a V-MoE has more. In
inference the weights are in the low type.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config

from vmoe.bench.report import Column, Row, measurement_row
from vmoe.bench.timing import Log, Measurement, TimedJob, reason_of_failure, release, silent, time_calls, time_jobs
from vmoe.compiling import mend_compiler
from vmoe.export.layer import exportable_copy
from vmoe.export.programs import load_program, trace, write_onnx
from vmoe.models.cost import count_parameters, flops_per_image
from vmoe.moe import auxiliary_loss

MODES = ("off", "default", "reduce-overhead")
PASSES = ("training", "inference", "onnx")
MODEL_CALLS_ON_GPU = 2  # between two readings of the clock
MODEL_COLUMNS = (
    Column("", "model"),
    Column("pass", "pass"),
    Column("compile", "compile"),
    Column("ms", "ms", "#.4g"),
    Column("spread", "spread", ".1%"),
    Column("ratio", "ratio", ".3f"),
    Column("images/s", "images_per_second", ",.0f"),
    Column("MiB", "peak_mib", ",.0f"),
    Column("MiB ratio", "memory_ratio", ".2f"),
    Column("waits", "synchronizes"),
    Column("issue ms", "issue_ms", ".1f"),
    Column("GFLOP/image", "gflops_per_image", ".2f"),
    Column("M params", "million_parameters", ",.1f"),
    Column("active", "million_active", ",.1f"),
    Column("optimiser ms", "optimizer_ms", ".2f"),
)
# many models share the code of one class, and each needs a graph of its own
_MANY_GRAPHS = {
    "recompile_limit": 64,
    "accumulated_recompile_limit": 512,
    "fail_on_recompile_limit_hit": True,
}


@dataclass(frozen=True)
class ModelTiming:
    """The settings of a timing of models."""

    image_size: int  # side of the images in pixels
    batch: int  # images per step
    device: torch.device  # where to run
    dtype: torch.dtype  # type of autocast in training, and of the weights in inference
    passes: tuple[str, ...] = ("training", "inference")  # which passes, of `PASSES`
    modes: tuple[str, ...] = ("off",)  # how to compile, of `MODES`
    rounds: int = 8  # how many times each job is timed


def benchmark_models(makers: dict[str, Callable[[], nn.Module]], timing: ModelTiming, log: Log = silent) -> list[Row]:
    """Times models in one process, in shuffled order.

    `makers` make the models on the device, by name. Ratios are to "dense", where there is one.

    Returns:
        A row for each model, pass and mode. Ratios are to the dense model's fastest mode; `fastest` marks the fastest
        mode of a model and pass.

    Raises:
        DeviceLost: A model left the device unusable.
    """
    device, models, costs, rows = timing.device, {}, {}, []
    for name, make in makers.items():
        log(f"making {name}")
        try:
            models[name] = make()
            costs[name] = _cost_row(models[name], timing.image_size)
        except Exception as error:  # such as a lack of memory; the other models still run
            models.pop(name, None)
            rows.append({"model": name, "error": reason_of_failure(name, error, device)})
    images = torch.randn(timing.batch, 3, timing.image_size, timing.image_size, device=device)
    for of_pass in timing.passes:
        updates = {name: _optimizer_row(name, model, device) for name, model in models.items() if of_pass == "training"}
        jobs, keys = {}, {}
        for name, model in models.items():
            for mode in timing.modes if of_pass != "onnx" else MODES[:1]:
                title = f"{name}, {of_pass}, compile {mode}"
                keys[title], jobs[title] = (name, mode), _pass_job(of_pass, model, mode, images, timing.dtype)
        with dynamo_config.patch(_MANY_GRAPHS):
            calls = MODEL_CALLS_ON_GPU if device.type == "cuda" else 1
            results = time_jobs(jobs, device, timing.rounds, calls, log)
        for row in _pass_rows({keys[title]: result for title, result in results.items()}, timing.batch):
            rows.append(row | {"pass": of_pass} | costs[row["model"]] | updates.get(row["model"], {}))
        del jobs
        torch.compiler.reset()
        mend_compiler()
        release(device)
    return rows


def _pass_rows(results: dict[tuple[str, str], Measurement], batch: int) -> list[Row]:
    fastest = {}
    for (name, mode), result in results.items():
        if result.error is None and (name not in fastest or result.median < results[name, fastest[name]].median):
            fastest[name] = mode
    base = results["dense", fastest["dense"]] if "dense" in fastest else None
    rows = []
    for (name, mode), result in results.items():
        if mode == "reduce-overhead":
            result.peak_mib = None  # CUDA graphs have taken their memory before
        row = {"model": name, "compile": mode} | measurement_row(result, base)
        if result.error is None:
            row["images_per_second"] = batch / result.median * 1e3
        rows.append(row | {"fastest": fastest.get(name) == mode})
    return rows


def _pass_job(of_pass: str, model: nn.Module, mode: str, images: Tensor, dtype: torch.dtype) -> TimedJob:
    """A step of a pass. An inference job changes the model's type, so it is made after all training jobs."""
    if of_pass == "onnx":
        return _in_onnx_runtime(model, images)
    if of_pass == "inference":
        model.to(dtype).eval()
        images = images.to(dtype)
    else:
        model.train()
    call = model if mode == "off" else torch.compile(model, mode=mode, dynamic=False)
    return _inference(call, images) if of_pass == "inference" else _timed_training_step(call, images, dtype)


def _timed_training_step(model: nn.Module, images: Tensor, dtype: torch.dtype) -> TimedJob:
    parameters = list(model.parameters())
    device = images.device
    labels = None

    def step():
        nonlocal labels
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images)
            if labels is None:
                labels = torch.randint(logits.shape[1], logits.shape[:1], device=device)
            loss = F.cross_entropy(logits, labels) + auxiliary_loss(model)
        loss.backward()
        for parameter in parameters:
            parameter.grad = None  # so that a step's memory holds its gradients

    return step


def _inference(model: nn.Module, images: Tensor) -> TimedJob:
    @torch.inference_mode()
    def infer():
        torch.compiler.cudagraph_mark_step_begin()
        return model(images)

    return infer


def _in_onnx_runtime(model: nn.Module, images: Tensor) -> TimedJob:
    """The model as an ONNX program in float32 on the CPU, by as many threads as torch has."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        program = trace(exportable_copy(model), images.shape[-1], "--passes onnx")
        write_onnx(file, program, {})
        run = load_program(file, "onnx")
    images = images.cpu().float()
    return lambda: run(images)


def _cost_row(model: nn.Module, image_size: int) -> Row:
    total, active = count_parameters(model)
    return {
        "gflops_per_image": flops_per_image(model, image_size) / 1e9,
        "million_parameters": total / 1e6,
        "million_active": active / 1e6,
    }


def _optimizer_row(name: str, model: nn.Module, device: torch.device) -> Row:
    """The time of fused AdamW's update of all parameters. Its state is freed afterwards."""
    parameters = list(model.parameters())
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        update = torch.optim.AdamW(parameters, lr=0.0, fused=True).step  # a rate of 0 leaves the weights as they are
        update()
        return {"optimizer_ms": statistics.median(time_calls(update, device, 1) for _ in range(5))}
    except Exception as error:  # a lack of memory for its state must not end the rest
        return {"optimizer_error": reason_of_failure(f"the optimiser of {name}", error, device)}
    finally:
        update = None
        for parameter in parameters:
            parameter.grad = None
        release(device)
