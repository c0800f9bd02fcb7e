"""Shared code of the jobs that import others' checkpoints."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vmoe.errors import UserError
from vmoe.text import counted

if TYPE_CHECKING:
    from vmoe.models.imported import ImportedModel


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--out` and `--class-names`."""
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what to write: .ckpt or .safetensors")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="one a line, in the order of the logits")


def check_out(path: Path) -> None:
    """Refuses an output file of an unsupported format.

    Raises:
        UserError: Its format is not supported.
    """
    if path.suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"--out {path}: must end in .ckpt or .safetensors")


def write_imported(imported: "ImportedModel", options: argparse.Namespace, source: str, python_way: str) -> None:
    """Writes an imported model and prints a line on it.

    Args:
        imported: The model.
        options: The options of `add_result_options`.
        source: The original checkpoint.
        python_way: The Python function that returns the model.

    Raises:
        UserError: No such file can hold the model, the class names do not fit it, or the file cannot be written.
    """
    from vmoe.checkpoints import facts_of_import, write_weights
    from vmoe.models.cost import count_parameters

    if options.out.suffix == ".ckpt" and not imported.num_classes:
        raise UserError(
            f"--out {options.out}: {source} has no classifier, without which no job opens a .ckpt; "
            f"use {python_way}, or end in .safetensors for the weights alone"
        )
    rows, columns = imported.image_size
    if rows != columns:
        raise UserError(f"images of {rows}x{columns}: a checkpoint is for square ones; use {python_way}")
    facts = facts_of_import(imported, _class_names(imported.num_classes, options.class_names), "imagenet")
    write_weights(options.out, imported.model.state_dict(), facts)

    parameters = count_parameters(imported.model)
    moe = imported.moe
    experts = "dense" if moe is None else f"{counted(moe.num_experts, 'expert')} in blocks {moe.layers}"
    print(
        f"{options.out}: {experts}, {parameters.total / 1e6:,.1f} M parameters, {parameters.active / 1e6:,.1f} M "
        f"active, images of {rows}x{columns}, {counted(imported.num_classes, 'class', 'classes')}"
    )


def _class_names(num_classes: int, names_file: Path | None) -> list[str]:
    if names_file is None:
        return [str(index) for index in range(num_classes)]
    try:
        names = names_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {names_file}: cannot be read ({error}); give a text file") from error
    if len(names) != num_classes:
        raise UserError(
            f"--class-names {names_file}: has {counted(len(names), 'line')}, the checkpoint "
            f"{counted(num_classes, 'class', 'classes')}"
        )
    return names
