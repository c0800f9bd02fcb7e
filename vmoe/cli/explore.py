"""\
Runs a V-MoE over a data set and shows what its experts do: which patches they take, how evenly they are loaded, whether
they specialise in classes, positions, colours or edges more than by chance, how experts of successive layers are
linked, and what the model loses without an expert, with random routing and at other capacities. Further checkpoints,
such as a dense twin, are shown beside the first. Images may have no labels: then accuracy, classes and causes are left
out.

Writes index.html (one page that opens from disk), figures/*.png and data/ (report.json, images.npz: every number).

  vmoe explore runs/patchwork --out runs/patchwork/explorer
  vmoe explore runs/seed0 runs/seed1 runs/dense --out explorer --sample 200
  vmoe explore runs/cifar10 --out explorer --data npz --root cifar10.npz --cause-images 0
  vmoe explore runs/cifar10 --out explorer --images photos/
"""

import argparse
import math
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmoe.cli.common import job
from vmoe.cli.inputs import (
    DATA_OPTIONS,
    add_data_options,
    find_files,
    halving_batches,
    load_data,
    load_files,
    matched,
)
from vmoe.cli.options import capacity_factor, choose_device, new_parser
from vmoe.cli.progress import Tracked, working
from vmoe.errors import UserError
from vmoe.text import counted, printable

if TYPE_CHECKING:
    from vmoe.checkpoints import TrainedModel
    from vmoe.data import ImageDataModule


_ARGUMENTS = ("sample", "probe_images", "cause_images", "replicates", "seed")  # of ExploreOptions
_OWN_OPTIONS = (*_ARGUMENTS, "capacity_factor")
_OPTION_OF = DATA_OPTIONS | {name: f"--{name.replace('_', '-')}" for name in _OWN_OPTIONS}


@job(_OPTION_OF)
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _explore_parser().parse_args(argv)
    halving_batches(lambda: _explored(options, argv), options)


def _explored(options: argparse.Namespace, argv: list[str]) -> None:
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.checkpoints import load_checkpoint
    from vmoe.data.channels import displayed_line
    from vmoe.explain.explorer import DataFacts, ExploreOptions, Subject, explore, write_exploration
    from vmoe.explain.explorer.causes import check_capacities
    from vmoe.explain.explorer.history import snapshots
    from vmoe.explain.heatmap.routed import require_experts
    from vmoe.files import require_writable
    from vmoe.training.run.summary import device_name
    from vmoe.version import versions

    require_writable(options.out, options.out / "figures", options.out / "data")
    device = choose_device(options.device)
    checkpoint, *others = [load_checkpoint(path, device) for path in options.checkpoints]
    if len(options.checkpoints) > len({each.path.resolve() for each in (checkpoint, *others)}):
        raise UserError("CKPT: the same checkpoint is given twice; name each once")
    require_experts(checkpoint.model)
    names = _distinct_names(options.checkpoints)
    check_capacities(checkpoint.model, options.capacity_factor or ())
    given = ExploreOptions(
        sample=options.sample,
        probe_images=options.probe_images,
        cause_images=options.cause_images,
        capacity_factors=options.capacity_factor or ExploreOptions.capacity_factors,
        replicates=options.replicates,
        seed=options.seed,
    )
    pictures = _pictures(checkpoint, options)
    subject, *others = _with_classes([checkpoint, *others], pictures.data, options.classes)
    provenance = {
        "checkpoint": str(checkpoint.path),
        "epoch": checkpoint.epoch,
        **pictures.provenance,
        "device": device_name(device),
        "versions": versions(),
        "command": shlex.join(["vmoe", "explore", *argv]),
    }
    if checkpoint.channels is not None:
        provenance["pictures"] = displayed_line(checkpoint.channels)
    with working("exploring"):
        exploration = explore(
            subject,
            pictures.batches,
            name=names[0],
            others=[Subject.of(other, name) for other, name in zip(others, names[1:], strict=True)],
            snapshots=snapshots(checkpoint.path, device),
            data=DataFacts(pictures.patch_names, pictures.image_names, provenance),
            options=given,
            track=Tracked,
        )
    for line in exploration.report["findings"]:
        print(f"- {printable(line)}")
    if options.images is not None:
        print("The images have no labels: accuracy, classes and causes, which need them, are left out.")
    given_factors = options.capacity_factor if exploration.report["provenance"]["cause_images"] else None
    measured = [setting["factor"] or math.inf for setting in exploration.report["capacity"] or ()]
    for factor in given_factors or ():
        if factor not in measured:
            why = "it leaves experts no place, or more than there are tokens"
            print(f"warning: --capacity-factor {factor:.15g}: left out, as {why}", file=sys.stderr)
    with working("drawing the figures"):
        write_exploration(exploration, options.out)
    print(f"index.html, figures/ and data/ in {options.out}")


class _Pictures(NamedTuple):
    """The batches of images and the facts about them."""

    batches: Iterable
    data: "ImageDataModule | None"  # None for files without labels
    patch_names: list[str] | None
    image_names: list[str] | None
    provenance: dict[str, str | None]


def _pictures(checkpoint: "TrainedModel", options: argparse.Namespace) -> _Pictures:
    """A split of a data set, or image files without labels, in random order."""
    if options.images is None:
        split = options.split or "test"
        data = load_data(checkpoint, options)
        source = {"data": data.config.name, "root": data.config.root, "split": split}
        return _Pictures(data.random_dataloader(split, options.seed), data, data.patch_names, None, source)
    if {options.data, options.root, options.split} != {None}:
        raise UserError("--images: takes the place of a data set; leave out --data, --root and --split")
    paths = find_files(options.images, checkpoint.channels)
    batches, paths = load_files(checkpoint, paths, options)
    source = options.images[0] if len(options.images) == 1 else f"{len(paths)} image files"
    return _Pictures(batches, None, None, [path.name for path in paths], {"data": source, "root": None, "split": None})


def _explore_parser() -> argparse.ArgumentParser:
    parser = new_parser("explore", __doc__)
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CKPT",
        help=".ckpt files or runs' folders (their best checkpoints); the first is explored, others stand beside it",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the page, figures and numbers go")
    parser.add_argument("--split", choices=("test", "val"), help="which part (default: test)")
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="IMAGE",
        help="in place of a data set: image files without labels, or folders, which are searched to their depth",
    )
    parser.add_argument(
        "--sample", type=int, default=300, metavar="N", help="images with maps on the page (default: 300)"
    )
    parser.add_argument(
        "--probe-images",
        type=int,
        default=1000,
        metavar="N",
        help="images on which consistency and agreement are measured; 0: none (default: 1000)",
    )
    parser.add_argument(
        "--cause-images",
        type=int,
        default=1000,
        metavar="N",
        help="images with labels on which each expert is ablated and capacities are tried; 0: none (default: 1000)",
    )
    parser.add_argument(
        "--capacity-factor",
        nargs="+",
        type=capacity_factor,
        metavar="F",
        help="capacity factors to try; inf drops nothing (default: 0.25 0.5 0.75 1 1.5 2)",
    )
    parser.add_argument(
        "--replicates", type=int, default=100, metavar="N", help="of bootstrap and permutations (default: 100)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of order, sample and replicates (default: 0)")
    add_data_options(parser)
    return parser


def _with_classes(
    checkpoints: "list[TrainedModel]", data: "ImageDataModule | None", classes: str
) -> "list[TrainedModel]":
    """The checkpoints with outputs for the set's classes, or without a set for the first checkpoint's.

    Raises:
        UserError: A checkpoint does not know such a class.
    """
    from vmoe.classes import same_outputs, with_outputs

    first, *others = checkpoints
    if data is not None:
        first = matched(first, data, classes)
    result = [first]
    for other in others:
        outputs = same_outputs(other.class_names, first.class_names)
        if outputs is None and classes == "by-number" and len(other.class_names) == len(first.class_names):
            outputs = list(range(len(other.class_names)))
        if outputs is None:
            raise UserError(
                f"{other.path}: knows {counted(len(other.class_names), 'class', 'classes')}, {first.path} "
                f"{len(first.class_names)}, and not "
                "all of these by name; compare checkpoints of the same classes"
            )
        model = with_outputs(other.model, outputs)
        result.append(other.with_facts_for(model, class_names=first.class_names))
    return result


def _distinct_names(paths: list[str]) -> list[str]:
    """The shortest ends of the paths that distinguish them."""
    parts = [Path(path).resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)
