"""\
Turns a checkpoint of google-research/vmoe (PREFIX.index and PREFIX.data-nnnnn-of-NNNNN) into one that the other jobs
open. The architecture is read from the tensors; how the model routes is not in them, so give what its config says.

A .ckpt opens with `vmoe evaluate`, `vmoe heatmap` and so on. A .safetensors holds the weights for
timm.models.load_checkpoint, and the same description in its metadata.

  vmoe import-jax vmoe_s32_last2_ilsvrc2012_randaug_light1 --out s32.ckpt
  vmoe import-jax vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012 --capacity-factor 1.5 --out b16.safetensors
"""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from vmoe.cli.common import job
from vmoe.cli.options import capacity_factor, new_parser
from vmoe.cli.progress import working
from vmoe.errors import UserError
from vmoe.text import counted

if TYPE_CHECKING:
    from vmoe.checkpoints import ModelFacts
    from vmoe.models.jax_import import ImportedModel

_MEAN = _STD = [0.5, 0.5, 0.5]  # the original's value_range(-1, 1)

_OPTIONS_OF_IMPORT = {  # argument of Python -> option here
    "img_size": "--img-size",
    "router": "--router",
    "capacity_factor": "--capacity-factor",
    "top_k": "--top-k",
    "group": "--group-images",
    "capacity_multiple_of": "--capacity-multiple-of",
}


@job(_OPTIONS_OF_IMPORT)
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _import_jax_parser().parse_args(argv)
    if options.out.suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"--out {options.out}: must end in .ckpt or .safetensors")
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.checkpoints import write_weights
    from vmoe.models.cost import count_parameters
    from vmoe.models.jax_import import RoutingOptions, import_jax_checkpoint

    factor = options.capacity_factor
    routing = RoutingOptions(
        router=options.router,
        top_k=options.top_k,
        capacity_factor=None if factor == float("inf") else factor,
        batch_priority=options.batch_priority,
        group_images=options.group_images,
        capacity_rounding=options.capacity_rounding,
        capacity_multiple_of=options.capacity_multiple_of,
    )
    with working("importing"):
        imported = import_jax_checkpoint(options.prefix, routing, options.img_size)
    if options.out.suffix == ".ckpt" and not imported.num_classes:
        raise UserError(
            f"--out {options.out}: {options.prefix} has no classifier, without which no job opens a .ckpt; "
            "use vmoe.load_jax_checkpoint, or end in .safetensors for the weights alone"
        )
    write_weights(options.out, imported.model.state_dict(), _imported_facts(imported, options.class_names))

    parameters = count_parameters(imported.model)
    moe = imported.moe
    experts = "dense" if moe is None else f"{counted(moe.num_experts, 'expert')} in blocks {moe.layers}"
    rows, columns = imported.image_size
    print(
        f"{options.out}: {experts}, {parameters.total / 1e6:,.1f} M parameters, {parameters.active / 1e6:,.1f} M "
        f"active, images of {rows}x{columns}, {counted(imported.num_classes, 'class', 'classes')}"
    )


def _import_jax_parser() -> argparse.ArgumentParser:
    parser = new_parser("import-jax", __doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="common path of the files, without .index")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what to write: .ckpt or .safetensors")
    parser.add_argument("--router", choices=("token_choice", "expert_choice", "soft"), default="token_choice")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token (default: 2)")
    parser.add_argument(
        "--capacity-factor", type=capacity_factor, metavar="F", help="at evaluation (default: inf, drops nothing)"
    )
    parser.add_argument("--batch-priority", action="store_true", help="full experts drop the smallest gates")
    line = "images per routing group (default: %(default)s)"
    parser.add_argument("--group-images", type=int, default=8, metavar="N", help=line)
    parser.add_argument("--capacity-rounding", choices=("ceil", "round"), help="default: the original's for the router")
    parser.add_argument("--capacity-multiple-of", type=int, metavar="N", help="default: the original's for the router")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="resize the position embedding for such images")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="one a line, in the order of the logits")
    return parser


def _imported_facts(imported: "ImportedModel", names_file: Path | None) -> "ModelFacts":
    """What a checkpoint tells every tool, of plain types.

    Raises:
        UserError: the images are not square, or the class names do not fit.
    """
    from vmoe.checkpoints import ModelFacts
    from vmoe.models.jax_import import MODEL_NAME

    rows, columns = imported.image_size
    if rows != columns:
        raise UserError(f"images of {rows}x{columns}: a checkpoint is for square ones; use vmoe.load_jax_checkpoint")
    moe = None if imported.moe is None else dataclasses.asdict(imported.moe)
    data = {"name": "imagenet", "image_size": rows, "mean": _MEAN, "std": _STD}
    config = {
        "seed": 0,
        "output_dir": None,
        "resume": False,
        "data": data,
        "model": {"name": MODEL_NAME, "kwargs": imported.kwargs},
        "moe": moe,
        "optim": {},
        "trainer": {},
    }
    names = _class_names(imported.num_classes, names_file)
    return ModelFacts(config, names, rows, _MEAN, _STD)


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
