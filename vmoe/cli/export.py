"""`vmoe export`: a checkpoint as a file to share."""

import argparse
from pathlib import Path

from vmoe.cli.common import run
from vmoe.cli.options import new_parser
from vmoe.errors import UserError

_DESCRIPTION = """\
Writes the trained weights of a checkpoint (their average, where the run kept one) as a safetensors file that every tool
opens as it opens a checkpoint: with config, class names, image size and normalisation, without optimiser and paths.

  vmoe export runs/cifar10_small --out cifar10_small.safetensors --dtype bfloat16
"""
_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Runs the job with `argv`; returns its exit code."""
    return run(_export, argv)


def _export(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out {options.out}: must end in .safetensors")
    # Imported here, so that --help and a mistyped option answer at once.
    import torch

    from vmoe.export.shared_weights import write_safetensors

    write_safetensors(options.out, options.checkpoint, getattr(torch, options.dtype))
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.2f} MiB, weights in {options.dtype}")


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("export", _DESCRIPTION)
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint file, or a run's folder (its best checkpoint)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what to write, a .safetensors file")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="stored type (default: %(default)s)")
    return parser
