"""`vmoe benchmark`: how long MoE layers, whole models and the data take here."""

import argparse
import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmoe.cli.common import run
from vmoe.cli.options import capacity_factor, choose_device, new_parser
from vmoe.errors import UserError

if TYPE_CHECKING:
    import torch

    from vmoe.bench.cases import Case

_DESCRIPTION = """\
Measures MoE layers, whole models or the data pipeline on this machine, side by side in one process, in shuffled order.
"""
_LAYER = """\
Times MoE layers beside timm's dense Mlp on K times as many tokens (equal active FLOPs): the experts with a given
routing, and the whole layer with router, noise, balance losses and batch priority in groups of 8 images. A call is a
forward and a backward pass, with float32 parameters under autocast; "inference" is the forward pass with the weights in
the low type.

Columns: median of the rounds; spread, half the quartiles' distance; ratio to dense; share of the matrix product peak
measured in the run; memory at most beyond what was there before the call, and its ratio to dense; whether the host
waits for the GPU; how long the host needs to issue the work.

  vmoe benchmark layer --cases S16,B16,L16 --peers
  vmoe benchmark layer --cases B16 --experts 64 --top-k 1 --jobs experts layer
  vmoe benchmark layer --curves                  # cost as experts, tokens, choices and capacity grow
  vmoe benchmark layer --device cpu --cases S32

Writes layer.json, layer.md and roofline.png, or layer_curves.{json,md,png}, into --out.
"""
_SIZES = ("width", "hidden", "experts", "top_k", "images", "tokens", "capacity_factor")
_FIELDS = {"experts": "num_experts"}


def main(argv: list[str] | None = None) -> int:
    """Runs the job with `argv`; returns its exit code."""
    return run(_benchmark, argv)


def _benchmark(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    # Imported here, so that --help and a mistyped option answer at once.
    import torch

    from vmoe.bench.timing import DeviceLost

    device = choose_device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    torch.manual_seed(options.seed)
    results = _Results(options, argv, device, dtype)
    try:
        options.measure(options, device, getattr(torch, dtype), results)
    except DeviceLost as error:
        print(f"vmoe benchmark: {error}: the GPU is unusable for this process; leave this job out", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("benchmark", _DESCRIPTION)
    jobs = parser.add_subparsers(metavar="layer|model|data", required=True)
    _add_layer(jobs)
    return parser


def _new_job(jobs: Any, name: str, help_line: str, description: str, measure: Any) -> argparse.ArgumentParser:
    parser = jobs.add_parser(
        name,
        help=help_line,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(measure=measure, name=name)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and routing (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmark"),
        metavar="DIR",
        help="where results go (default: %(default)s)",
    )
    return parser


def _add_timing(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--rounds", type=_count, default=rounds, help="timings of each job (default: %(default)s)")


def _add_layer(jobs: Any) -> None:
    parser = _new_job(jobs, "layer", "one MoE layer beside timm's dense Mlp", _LAYER, _layer)
    _add_timing(parser, 15)
    parser.add_argument(
        "--cases", nargs="+", metavar="CASE", help="sizes by name: S16 B16 L16 Ti-k1 Ti-k2 S32 S32-b128"
    )
    sizes = parser.add_argument_group("other sizes", "in the place of the cases' own (B16's, or S32's on the CPU)")
    for name in _SIZES[:-1]:
        sizes.add_argument(f"--{name.replace('_', '-')}", type=_count, metavar="N", help=_SIZE_HELP[name])
    sizes.add_argument(
        "--capacity-factor", type=capacity_factor, metavar="F", help="room for choices; inf drops nothing"
    )
    parser.add_argument("--jobs", nargs="+", metavar="NAME", help="only jobs whose names begin so, beside dense")
    parser.add_argument(
        "--peers", action="store_true", help="also time plain PyTorch recipes and transformers' experts"
    )
    parser.add_argument(
        "--curves", nargs="*", metavar="AXIS", help="instead: along experts, tokens, top-k, capacity (default: all)"
    )


_SIZE_HELP = {
    "width": "width of a token",
    "hidden": "hidden width of an expert (default: 4 times --width where that is given)",
    "experts": "number of experts",
    "top_k": "experts a token",
    "images": "images a batch",
    "tokens": "tokens an image",
}


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number >= 1")
    return number


def _layer(options: argparse.Namespace, device: "torch.device", dtype: "torch.dtype", results: "_Results") -> None:
    cases = _cases(options, device)
    if options.curves is not None:
        _curves(options, cases, device, dtype, results)
        return
    from vmoe.bench.layer import benchmark_layer
    from vmoe.bench.report import LAYER_COLUMNS, layer_rows, markdown_table

    entries, tables = [], []
    for name, case in cases.items():
        measured, peak = benchmark_layer(
            case, device, dtype, options.rounds, options.jobs, options.peers, results.say_of(name)
        )
        rows = layer_rows(measured, case, peak)
        floor = case.flops / peak * 1e3
        entries.append(
            {"case": name, **dataclasses.asdict(case), "flops": case.flops, "matmul_peak": peak, "rows": rows}
        )
        tables.append(
            f"## {name}: {_sizes(case)}\n\n"
            f"Matrix product peak {peak / 1e12:.3g} TFLOP/s; the active FLOPs at this peak take {floor:.3g} ms.\n\n"
            f"{markdown_table(LAYER_COLUMNS, rows)}\n"
        )
        print(tables[-1], flush=True)
        results.write("layer", {"cases": entries}, tables)


def _curves(options: argparse.Namespace, cases: "dict[str, Case]", device, dtype, results: "_Results") -> None:
    from vmoe.bench.curves import AXES, COLUMNS, benchmark_curves, draw_curves
    from vmoe.bench.figure import save
    from vmoe.bench.report import markdown_table

    axes = _split(options.curves) or list(AXES)
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"--curves {axis}: no such axis; there are {', '.join(AXES)}")
    if len(cases) > 1:
        raise UserError(f"--cases {' '.join(cases)}: --curves goes with one case")
    name, case = next(iter(cases.items()))
    rows = benchmark_curves(case, axes, device, dtype, options.rounds, results.say_of(name))
    title = f"{name}: {_sizes(case)}"
    table = f"## {title}\n\n{markdown_table(COLUMNS, rows)}\n"
    print(table)
    results.write("layer_curves", {"case": name, **dataclasses.asdict(case), "rows": rows}, [table])
    save(
        draw_curves(rows, f"{title} · {results.header['device']}, {results.header['dtype']}"),
        options.out / "layer_curves.png",
    )


def _cases(options: argparse.Namespace, device: "torch.device") -> "dict[str, Case]":
    """The chosen cases with the sizes that were given."""
    from vmoe.bench.cases import CASES

    changes = {_FIELDS.get(n, n): getattr(options, n) for n in _SIZES if getattr(options, n) is not None}
    if "width" in changes:
        changes.setdefault("hidden", 4 * changes["width"])
    if changes.get("capacity_factor") == float("inf"):
        changes["capacity_factor"] = None
    on_gpu = device.type == "cuda"
    one = changes or options.curves is not None
    default = (
        (["B16"] if on_gpu else ["S32"]) if one else ["S16", "B16", "L16"] if on_gpu else ["Ti-k1", "Ti-k2", "S32"]
    )
    names = _split(options.cases) or default
    for name in names:
        if name not in CASES:
            raise UserError(f"--cases {name}: no such case; there are {', '.join(CASES)}")
    chosen = {name: dataclasses.replace(CASES[name], **changes) for name in names}
    for case in chosen.values():
        if case.top_k > case.num_experts:
            raise UserError(f"--top-k {case.top_k}: must be at most --experts {case.num_experts}")
    return {f"{name} changed" if changes else name: case for name, case in chosen.items()}


def _split(words: list[str] | None) -> list[str]:
    """Names that were given apart or with commas, each once."""
    return list(dict.fromkeys(part for word in words or [] for part in word.split(",") if part))


def _sizes(case: "Case") -> str:
    bound = "none" if case.capacity_factor is None else f"{case.capacity_factor:g}"
    return (
        f"width {case.width}, hidden {case.hidden}, E={case.num_experts}, K={case.top_k}, "
        f"{case.images} images of {case.tokens} tokens, capacity factor {bound}"
    )


class _Results:
    """Where a benchmark was made, and the files that it goes to."""

    def __init__(self, options: argparse.Namespace, argv: list[str], device: "torch.device", dtype: str) -> None:
        from vmoe.training.summary import device_name, versions

        self.folder = options.out
        self.start = time.monotonic()
        self.header = {
            "command": shlex.join(["vmoe", "benchmark", *argv]),
            "device": device_name(device),
            "dtype": dtype,
            "versions": versions() | _versions_beside(),
            "seed": options.seed,
        }

    def say_of(self, subject: str):
        """Progress on stderr, with the seconds since the start."""
        return lambda line: print(
            f"{time.monotonic() - self.start:6.1f} s  {subject}: {line}", file=sys.stderr, flush=True
        )

    def write(self, name: str, content: dict[str, Any], tables: list[str]) -> None:
        """Writes NAME.json and NAME.md."""
        from vmoe.files import atomic_write, write_json

        write_json(self.folder / f"{name}.json", self.header | content)
        versions = ", ".join(f"{package} {version}" for package, version in self.header["versions"].items())
        head = f"{self.header['device']}, {self.header['dtype']}; {versions}; seed {self.header['seed']}"
        text = "\n".join([f"`{self.header['command']}`\n\n{head}\n", *tables])
        with atomic_write(self.folder / f"{name}.md") as temporary:
            temporary.write_text(text, encoding="utf-8")


def _versions_beside() -> dict[str, str]:
    """Of what only some machines have."""
    import importlib.metadata

    import torch

    found = {} if torch.version.cuda is None else {"cuda": torch.version.cuda}
    for package in ("triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
