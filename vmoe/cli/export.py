"""\
Writes the trained weights of a checkpoint (their average, if the run kept one) for others to use.

  safetensors   weights that every tool opens like a checkpoint: with config, class names, image size and
                normalisation, without optimiser and paths
  onnx          a program of standard operators, for ONNX Runtime and others (pip install 'vmoe[export]')
  torch-export  a program of torch.export, loaded by torch.export.load
  aoti          a program compiled by AOTInductor for this kind of machine (needs a C++ compiler)
  hub           a folder for timm.create_model("local-dir:FOLDER", pretrained=True), with a model card of the run;
                --push uploads it to the Hugging Face hub

Programs take a batch of any size. Their logits are compared with the model's before they are written; export.json
beside them has the difference.

  vmoe export runs/cifar10_small --out cifar10_small.safetensors --dtype bfloat16
  vmoe export runs/cifar10_small --format onnx --out cifar10_small.onnx --quantize int8
  vmoe export runs/cifar10_small --format onnx --out cifar10_small.onnx --experts dense    # OpenVINO, CoreML, ...
"""

import argparse
import contextlib
import json
from pathlib import Path

from vmoe.cli.common import job
from vmoe.cli.options import new_parser
from vmoe.cli.progress import working
from vmoe.errors import UserError
from vmoe.extras import require_extras

_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2", "hub": ""}
_DTYPES = ("float32", "bfloat16", "float16")


@job()
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _export_parser().parse_args(argv)
    suffix = _SUFFIXES[options.format]
    if options.out.suffix != suffix:
        wanted = f"end in {suffix}" if suffix else "be a folder, without a suffix,"
        raise UserError(f"--out {options.out}: must {wanted} with --format {options.format}")
    for name in ("push", "license"):
        if getattr(options, name) is not None and options.format != "hub":
            raise UserError(f"--{name} {getattr(options, name)}: goes with --format hub only")
    if options.experts == "dense" and options.format in ("safetensors", "hub"):
        raise UserError("--experts dense: goes with a program, such as --format onnx")
    if options.format != "safetensors" and options.dtype is not None:
        raise UserError(f"--dtype {options.dtype}: only safetensors are stored in other types than float32")
    require_extras(*{"onnx": ("export",), "hub": ("analysis",)}.get(options.format, ()))
    writers = {"safetensors": _write_weights, "hub": _write_folder}
    with working(f"exporting to {options.format}"):
        writers.get(options.format, _write_program)(options)


def _write_weights(options: argparse.Namespace) -> None:
    # Imported here, so that --help and a mistyped option answer at once.
    import torch

    from vmoe.checkpoints import write_safetensors

    dtype = options.dtype or "float32"
    write_safetensors(options.out, options.checkpoint, getattr(torch, dtype), int8=options.quantize == "int8")
    rounded = ", experts' in int8" if options.quantize else ""
    print(f"{options.out}: {_size(options.out.stat().st_size)}, weights in {dtype}{rounded}")


def _write_program(options: argparse.Namespace) -> None:
    from vmoe.export.programs import write_program
    from vmoe.files import write_json

    how = {"int8": options.quantize == "int8", "dense": options.experts == "dense"}
    report = write_program(options.out, options.checkpoint, options.format, **how)
    beside = options.out.with_name("export.json")
    reports = {}
    with contextlib.suppress(OSError, ValueError):
        reports = json.loads(beside.read_text(encoding="utf-8"))
    write_json(beside, {**reports, options.out.name: report})
    worst = max(report["parity"]["by_batch"].values())
    print(f"{options.out}: {_size(sum(report['bytes'].values()))}, logits within {worst:.1e} of the model's")
    if how["dense"]:
        times = report["experts"]["times_the_flops_of_those_chosen"]
        print(f"all experts are computed for all tokens: {times:.3g} times the FLOPs of those chosen")
    if options.quantize:
        error = report["int8"]
        print(f"int8: relative logit error {error['relative_logit_error']:.1e} on noise")


def _write_folder(options: argparse.Namespace) -> None:
    from vmoe.export.hub import push, write_hub_folder

    if options.quantize is not None:
        raise UserError(f"--quantize {options.quantize}: timm cannot read it from a folder; use another --format")
    if write_hub_folder(options.out, options.checkpoint, options.license):
        print(f"{options.out}: a folder for timm; what its README.md says of the model is for you to complete")
    else:
        print(f"{options.out}: a folder for timm; its README.md was completed and stays, remove it for a new one")
    if options.push is not None:
        print(f"pushed: {push(options.out, options.push)}")


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _export_parser() -> argparse.ArgumentParser:
    parser = new_parser("export", __doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint file, or a run's folder (its best checkpoint)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what to write")
    parser.add_argument("--format", choices=_SUFFIXES, default="safetensors", help="default: %(default)s")
    parser.add_argument("--dtype", choices=_DTYPES, help="stored type of a safetensors file (default: float32)")
    parser.add_argument("--quantize", choices=("int8",), help="store the experts' weights as 8-bit integers")
    line = "dense: computes all experts for all tokens, for compilers of fixed shapes (default: %(default)s)"
    parser.add_argument("--experts", choices=("sparse", "dense"), default="sparse", help=line)
    parser.add_argument("--push", metavar="USER/NAME", help="with --format hub: upload the folder as this model")
    parser.add_argument("--license", metavar="ID", help="with --format hub: the weights' licence, such as apache-2.0")
    return parser
