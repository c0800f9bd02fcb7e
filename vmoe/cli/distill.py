"""\
Trains a dense student with a V-MoE as its teacher. The student's loss combines the loss by the labels and, by
distill.weight, its distance to the teacher's predictions. The student starts from the teacher's merged experts: in each
layer similar experts form groups, with aligned hidden units, and the merged experts lie side by side in one MLP of the
replaced MLP's width.

The recipe is --config's without its MoE layers, or else the teacher's own, uncompiled. Options after -- go to the run
as options of `vmoe train`. DIR is an ordinary run of a dense model; DIR/start.safetensors holds its initial weights.

  vmoe distill runs/cifar10_small --config cifar10_small_dense --out runs/student -- --distill.weight 0.7
  vmoe distill runs/cifar10_small --out runs/student -- --trainer.epochs 10 --optim.lr 5e-4
"""

import argparse
import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vmoe.cli.common import job
from vmoe.cli.options import count, new_parser, split_options
from vmoe.cli.progress import Tracked
from vmoe.errors import UserError
from vmoe.training.recipes import find_recipe

if TYPE_CHECKING:
    from vmoe.checkpoints import TrainedModel
    from vmoe.training.config import TrainConfig


@job()
def main(argv: list[str]) -> int:
    """Runs the job."""
    own, for_training = split_options(argv)
    options = _distill_parser().parse_args(own)
    if options.out.exists():
        raise UserError(f"--out {options.out}: is there already; give another folder")
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.checkpoints import RunFolder, load_checkpoint
    from vmoe.cli.train import trained
    from vmoe.training.parallel.process import Process

    if Process.this().world_size > 1:
        raise UserError(
            "runs in one process; under torchrun use `vmoe train --distill.teacher CKPT --moe null --init_from FILE` "
            "with a start.safetensors of this job"
        )
    teacher = load_checkpoint(options.checkpoint)
    config = _student_config(options, teacher, for_training)
    if options.start == "merged":
        start = options.out / "start.safetensors"
        _write_start(start, teacher, config, options.images)
        config = dataclasses.replace(config, init_from=str(start))
    try:
        return trained(lambda: config, ["vmoe", "distill", *argv])
    except UserError:
        if not RunFolder(options.out).config.exists():  # the run did not start: remove what it left
            shutil.rmtree(options.out, ignore_errors=True)
        raise


def _distill_parser() -> argparse.ArgumentParser:
    parser = new_parser("distill", __doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="the teacher: a checkpoint file, or a run's folder (its best checkpoint)")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder for the student's run")
    add("--config", metavar="FILE", help="the student's recipe (default: the teacher's)")
    line = "where the student's weights start: the teacher's merged experts, or as the recipe says (default: merged)"
    add("--start", choices=("merged", "recipe"), default="merged", help=line)
    line = "training images on which the use of the experts is measured, for merging (default: %(default)s)"
    add("--images", type=count, default=2000, metavar="N", help=line)
    return parser


def _student_config(options: argparse.Namespace, teacher: "TrainedModel", for_training: list[str]) -> "TrainConfig":
    from vmoe.cli.follow_up import follow_up
    from vmoe.cli.train_options import parse
    from vmoe.evaluation.evaluate import trained_on

    argv = ["--distill.teacher", str(teacher.path), *for_training]
    if options.config is None:
        config = follow_up(teacher, trained_on(teacher), {"moe": None, "init_from": None}, argv)
    else:
        config = parse(["--config", find_recipe(options.config), *argv])
    return dataclasses.replace(config, output_dir=str(options.out), moe=None)


def _write_start(path: Path, teacher: "TrainedModel", config: "TrainConfig", images: int) -> None:
    """Writes the dense model of the teacher's merged experts.

    Raises:
        UserError: The experts cannot form a dense model, or the student has another backbone.
    """
    from vmoe.checkpoints import build_model, timm_arguments, write_changed
    from vmoe.compress.pruning import (
        check_routers,
        join_experts,
        joined_width,
        merged_groups,
        regrouped_config,
        regrouped_weights,
    )
    from vmoe.compress.usage import measure_use
    from vmoe.data import ImageDataModule
    from vmoe.moe import MoeConfig

    name = teacher.config["model"]["name"]
    if config.model.name != name:
        raise UserError(f"model.name={config.model.name}: the experts are of {name}; use that, or --start recipe")
    with _refused(teacher):  # checked before the data are read
        check_routers(teacher.model)
        keep = joined_width(teacher.model)
    data = ImageDataModule(config.data, config.seed)
    data.prepare_data()
    data.setup("fit")
    use = measure_use(teacher.model, Tracked(data.train_eval_dataloader(most=images), "use of the experts"))
    groups = {layer: merged_groups(each, keep, "routed-mass") for layer, each in use.items()}
    moe = regrouped_config(MoeConfig(**teacher.config["moe"]), keep)
    kwargs = timm_arguments(teacher.config["model"]["kwargs"])
    merged = build_model(name, kwargs, moe, len(teacher.class_names), teacher.image_size, teacher.channels)
    merged.load_state_dict(regrouped_weights(teacher.model, groups, use))
    with _refused(teacher):
        student = join_experts(merged, groups, use)
    write_changed(path, teacher.path, student.state_dict(), None)


@contextmanager
def _refused(teacher: "TrainedModel") -> Iterator[None]:
    """Turns an error into a user's message with the reason why a model has no such start."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{teacher.path} {error}; or start without merging: --start recipe") from error
