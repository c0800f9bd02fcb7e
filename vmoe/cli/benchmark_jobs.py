"""The measurements of `vmoe benchmark`, after its options are read."""

import argparse
import dataclasses
import importlib.metadata
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Literal

import timm
import torch

from vmoe.bench.cases import CASES, LayerCase
from vmoe.bench.curves import AXES, CURVE_COLUMNS, benchmark_curves, draw_cost_curves
from vmoe.bench.figure import save_figure
from vmoe.bench.layer import benchmark_layer, layer_jobs, peer_jobs
from vmoe.bench.model import MODEL_COLUMNS, MODES, ModelTiming, benchmark_models
from vmoe.bench.report import LAYER_COLUMNS, Row, layer_rows, markdown_table
from vmoe.bench.roofline import FLOOR_COLUMNS, draw_roofline, layer_floors, stage_floors
from vmoe.bench.timing import Log, Measurement, copy_bandwidth, reason_of_failure, release
from vmoe.checkpoints import build_model
from vmoe.cli.common import in_options
from vmoe.errors import UserError
from vmoe.extras import require_extras
from vmoe.files import write_json, write_text
from vmoe.moe import MoeConfig
from vmoe.training.run.summary import device_name
from vmoe.version import versions

_FIELDS = {"width": "width", "hidden": "hidden", "experts": "num_experts", "top_k": "top_k", "images": "images",
           "tokens": "tokens", "capacity_factor": "capacity_factor"}  # fmt: skip
_NUM_CLASSES = 1000


class Results:
    """The circumstances of a measurement and the files for its results. It also seeds the random numbers."""

    def __init__(self, command: list[str], folder: Path, device: torch.device, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.folder = folder
        self.at = " ".join(command[:2])  # the current step, for messages
        self.start = time.monotonic()
        self.header = {
            "command": shlex.join(["vmoe", *command]),
            "device": device_name(device),
            "versions": versions() | _versions_beside(),
            "seed": seed,
        }

    def log(self, subject: str) -> Log:
        """Prints progress on stderr, with the seconds since the start."""

        def log(line: str) -> None:
            self.at = f"{subject}: {line}"
            print(f"{time.monotonic() - self.start:6.1f} s  {subject}: {line}", file=sys.stderr, flush=True)

        return log

    def write(self, name: str, dtype: torch.dtype, content: dict[str, Any], tables: list[str]) -> None:
        """Writes NAME.json and NAME.md."""
        header = self.header | {"dtype": str(dtype).removeprefix("torch.")}
        write_json(self.folder / f"{name}.json", header | content)
        packages = ", ".join(f"{package} {version}" for package, version in header["versions"].items())
        head = f"{header['device']}, {header['dtype']}; {packages}; seed {header['seed']}"
        write_text(self.folder / f"{name}.md", "\n\n".join([f"`{header['command']}`", head, *tables]) + "\n")


def layer(options: argparse.Namespace, results: Results) -> None:
    """Measures one MoE layer beside the dense Mlp. Each case has a table, which is written at once."""
    dtype = _dtype_of_options(options)
    cases = _cases_of_options(options)
    if options.curves is not None:
        _curves(options, cases, dtype, results)
        return
    _check_jobs(options, next(iter(cases.values())), dtype)
    entries, tables = [], []
    for name, case in cases.items():
        measured, peak = benchmark_layer(
            case, options.device, dtype, options.rounds or 15, options.jobs, options.peers, results.log(name)
        )
        rows = layer_rows(measured, case, peak)
        sizes = dataclasses.asdict(case) | {"flops": case.flops}
        entries.append({"case": name} | sizes | {"matmul_peak": peak, "rows": rows})
        tables.append(
            f"## {name}: {_case_sizes(case)}\n\n"
            f"Matrix product peak {peak / 1e12:.3g} TFLOP/s, at which the active FLOPs take "
            f"{case.flops / peak * 1e3:.3g} ms (forward {case.forward_flops / peak * 1e3:.3g} ms).\n\n"
            + markdown_table(LAYER_COLUMNS, rows)
        )
        print(tables[-1] + "\n", flush=True)
        results.write("layer", dtype, {"cases": entries}, tables)  # kept, should the GPU stop at what follows
        bandwidth = copy_bandwidth(options.device)
        floors = _floors(options, case, dtype, measured, peak, bandwidth, results.log(name))
        entries[-1] |= {"copy_bandwidth": bandwidth, "floors": floors}
        tables.append(f"Copy bandwidth {bandwidth / 1e9:,.4g} GB/s.\n\n{markdown_table(FLOOR_COLUMNS, floors)}")
        print(tables[-1] + "\n", flush=True)
        title = f"{name}: {_case_sizes(case)} · {results.header['device']}, {str(dtype).removeprefix('torch.')}"
        title += f", medians of {options.rounds or 15} rounds"
        picture = "roofline.png" if len(cases) == 1 else f"roofline-{name.partition(' ')[0]}.png"
        save_figure(draw_roofline(floors, peak, bandwidth, title), options.out / picture)
        results.write("layer", dtype, {"cases": entries}, tables)
    print(f"layer.json, layer.md and the rooflines in {options.out}")


def _check_jobs(options: argparse.Namespace, case: LayerCase, dtype: torch.dtype) -> None:
    names = list(layer_jobs(case, options.device, dtype))
    names += list(peer_jobs(case, options.device, dtype)) if options.peers else []
    for wanted in options.jobs or []:
        if not any(name.startswith(wanted) for name in names):
            raise UserError(f"--jobs {wanted}: no job begins so; there are {'; '.join(names)}")


def _floors(
    options: argparse.Namespace, case: LayerCase, dtype: torch.dtype, measured: dict[str, Measurement], peak: float,
    bandwidth: float, log: Log,
) -> list[Row]:  # fmt: skip
    """The floors of the layers and, on a GPU, of the experts' stages."""
    device = options.device
    rows = layer_floors(measured, case, dtype, peak, bandwidth)
    if device.type == "cuda":
        try:
            rows += stage_floors(case, device, dtype, peak, bandwidth)
        except Exception as error:  # such as a profiler without permission: the picture then has only the layers
            log(f"no stages: {reason_of_failure('the profile of the experts', error, device)}")
        release(device)
    return rows


def _curves(options: argparse.Namespace, cases: dict[str, LayerCase], dtype: torch.dtype, results: Results) -> None:
    axes = _names_given(options.curves) or list(AXES)
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"--curves {axis}: no such axis; there are {', '.join(AXES)}")
    if len(cases) > 1:
        raise UserError(f"--cases {' '.join(cases)}: --curves goes with one case")
    name, case = next(iter(cases.items()))
    rounds = options.rounds or 7
    rows = benchmark_curves(case, axes, options.device, dtype, rounds, results.log(name))
    title = f"{name}: {_case_sizes(case)}"
    table = f"## {title}\n\n{markdown_table(CURVE_COLUMNS, rows)}"
    print(table + "\n")
    results.write("layer_curves", dtype, {"case": name, **dataclasses.asdict(case), "rows": rows}, [table])
    place = f"{results.header['device']}, {str(dtype).removeprefix('torch.')}, medians of {rounds} rounds"
    save_figure(draw_cost_curves(rows, f"{title} · {place}"), options.out / "layer_curves.png")
    print(f"layer_curves.json, layer_curves.md and layer_curves.png in {options.out}")


def model(options: argparse.Namespace, results: Results) -> None:
    """Measures whole models beside their dense twin."""
    dtype, device = _dtype_of_options(options), options.device
    if "onnx" in options.passes:
        if device.type != "cpu":
            raise UserError(f"--passes onnx: runs on the CPU, beside what runs there; give --device cpu, not {device}")
        if "patch" in options.route and options.capacity_factor != float("inf"):
            raise UserError(
                f"--capacity-factor {options.capacity_factor:g}: images share the experts' slots, which no ONNX "
                "program can; give inf with --passes onnx"
            )
        require_extras("export")
    own = timm.get_pretrained_cfg(options.model)
    image_size = options.image_size or (own.input_size[-1] if own is not None else 224)
    batch = options.batch or (128 if device.type == "cuda" else 8)
    variants = {"dense": None}
    for layers in _names_given(options.layers):
        for top_k in options.top_k:
            for route in options.route:
                name = f"{layers} K={top_k}" + (" by image" if route == "image" else "")
                variants[name] = _moe_of_options(options, layers, top_k, route)
    with torch.device("meta"):  # raises for models that do not fit before anything is measured
        for moe in variants.values():
            try:
                build_model(options.model, {}, moe, _NUM_CLASSES, image_size)
            except UserError as error:
                names = {"model.name": "--model", "data.image_size": "--image-size"}
                raise UserError(in_options(str(error), names)) from error

    def maker(moe: MoeConfig | None):
        def make() -> torch.nn.Module:
            with device:
                return build_model(options.model, {}, moe, _NUM_CLASSES, image_size)

        return make

    modes = MODES if options.compile == "best" else (options.compile,)
    timing = ModelTiming(image_size, batch, device, dtype, tuple(options.passes), modes, options.rounds or 8)
    makers = {name: maker(moe) for name, moe in variants.items()}
    rows = benchmark_models(makers, timing, results.log(options.model))
    shown = [row for row in rows if "error" in row or row["fastest"]]
    title = f"## {options.model}: {batch} images of {image_size} pixels, E={options.experts}"
    table = f"{title}, capacity factor {options.capacity_factor:g}\n\n{markdown_table(MODEL_COLUMNS, shown)}"
    print(table + "\n")
    settings = {"model": options.model, "batch": batch, "image_size": image_size, "experts": options.experts}
    settings["capacity_factor"] = None if options.capacity_factor == float("inf") else options.capacity_factor
    results.write("model", dtype, settings | {"rows": rows}, [table])
    print(f"model.json and model.md in {options.out}")


def _moe_of_options(
    options: argparse.Namespace, layers: str, top_k: int, route: Literal["patch", "image"]
) -> MoeConfig:
    if route == "image":  # which drops nothing
        return MoeConfig(layers, options.experts, top_k, route="image", capacity_factor=None)
    factor = None if options.capacity_factor == float("inf") else options.capacity_factor
    return MoeConfig(
        layers=layers,
        num_experts=options.experts,
        top_k=top_k,
        capacity_factor=factor,
        eval_capacity_factor=factor,
        batch_priority=factor is not None,
    )


def _dtype_of_options(options: argparse.Namespace) -> torch.dtype:
    return getattr(torch, options.dtype or ("bfloat16" if options.device.type == "cuda" else "float32"))


def _cases_of_options(options: argparse.Namespace) -> dict[str, LayerCase]:
    """The chosen cases, with the sizes in the options."""
    changes = {field: getattr(options, name) for name, field in _FIELDS.items() if getattr(options, name) is not None}
    if "width" in changes:
        changes.setdefault("hidden", 4 * changes["width"])
    if changes.get("capacity_factor") == float("inf"):
        changes["capacity_factor"] = None
    on_gpu = options.device.type == "cuda"
    if options.curves is not None:
        usual = ["B16"] if on_gpu else ["Ti-k1"]  # a CPU needs minutes for 200,000 tokens of a wider one
    elif changes:
        usual = ["B16"] if on_gpu else ["S32"]
    else:
        usual = ["S16", "B16", "L16"] if on_gpu else ["Ti-k1", "Ti-k2", "S32"]
    names = _names_given(options.cases) or usual
    for name in names:
        if name not in CASES:
            raise UserError(f"--cases {name}: no such case; there are {', '.join(CASES)}")
    chosen = {name: dataclasses.replace(CASES[name], **changes) for name in names}
    for case in chosen.values():
        if case.top_k > case.num_experts:
            raise UserError(f"--top-k {case.top_k}: must be at most the {case.num_experts} experts")
    return {f"{name} changed" if changes else name: case for name, case in chosen.items()}


def _names_given(words: list[str] | None) -> list[str]:
    """The given names, separated by spaces or commas, each once."""
    return list(dict.fromkeys(part for word in words or [] for part in word.split(",") if part))


def _case_sizes(case: LayerCase) -> str:
    bound = "none" if case.capacity_factor is None else f"{case.capacity_factor:g}"
    return (
        f"width {case.width}, hidden {case.hidden}, E={case.num_experts}, K={case.top_k}, "
        f"{case.images} images of {case.tokens} tokens, capacity factor {bound}"
    )


def _versions_beside() -> dict[str, str]:
    """The versions of optional packages."""
    found = {} if torch.version.cuda is None else {"cuda": torch.version.cuda}
    for package in ("triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
