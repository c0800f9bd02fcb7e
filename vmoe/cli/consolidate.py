"""`vmoe consolidate`: the weights of a run, of one process or many, as one safetensors file."""

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file

from vmoe.checkpoints import ENTRY, find_checkpoint, read_checkpoint, trained_weights
from vmoe.cli.common import run
from vmoe.errors import UserError
from vmoe.files import atomic_write

DESCRIPTION = """
Writes the trained weights of a run, their average (EMA) where it keeps one, to one safetensors file: by the names of
the model's parameters, with the config, class names and normalisation of the run as JSON in the file's metadata.
"""


def main(argv: list[str] | None = None) -> int:
    """Writes the file; see `vmoe consolidate --help`. Returns the exit code."""
    return run(consolidate, argv)


def consolidate(argv: list[str]) -> None:
    """Reads a checkpoint and writes its weights.

    Raises:
        UserError: the checkpoint is missing or damaged, or the file cannot be written.
    """
    parser = argparse.ArgumentParser(prog="vmoe consolidate", description=DESCRIPTION)
    parser.add_argument("run", help="a run's folder (its best checkpoint), or a checkpoint of either kind")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors", help="the file to write")
    options = parser.parse_args(argv)
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out {options.out}: must end in .safetensors")
    path = find_checkpoint(options.run)
    content = read_checkpoint(path)
    kept = ("config", "class_names", "image_size", "mean", "std", "epochs_done")
    metadata = {"format": "pt", "vmoe": json.dumps({name: content[ENTRY][name] for name in kept})}
    weights = {name: value.contiguous() for name, value in trained_weights(content).items()}
    with atomic_write(options.out) as temporary:
        save_file(weights, temporary, metadata)
    count = sum(value.numel() for value in weights.values())
    print(f"{options.out}: {len(weights)} tensors, {count:,} numbers, from {path}")
