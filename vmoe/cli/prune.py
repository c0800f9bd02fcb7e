"""\
Drops experts of a V-MoE until N per layer are left, or merges alike ones into N, and tells what that costs: accuracy on
the test images before and after, and after a short fine-tuning where that is asked for.

Which experts matter is measured on training images: routed-mass is the combine weight that tokens give an expert,
activation-norm the length of what it adds to them. With --merge those that matter most are heads of groups, each other
expert joins the head that the router finds most like it, hidden units are aligned, and weights are averaged by routed
mass.

Writes DIR/model.safetensors, which every tool opens, and DIR/prune.json. With --finetune, DIR/finetune is an ordinary
run that starts from it: the checkpoint's own recipe at a tenth of its learning rates, without warm-up, uncompiled. What
follows -- goes to that run as options of `vmoe train`.

  vmoe prune runs/cifar10 --keep 4 --out runs/cifar10_of4
  vmoe prune runs/cifar10 --keep 2 --merge --finetune 1 --out runs/cifar10_merged -- --optim.lr 1e-4
"""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vmoe.cli.common import job
from vmoe.cli.inputs import DATA_OPTIONS, add_data_options, load_data, matched
from vmoe.cli.options import choose_device, count, new_parser, split_options
from vmoe.cli.progress import Tracked
from vmoe.errors import UserError
from vmoe.text import counted

if TYPE_CHECKING:
    import torch

    from vmoe.checkpoints import TrainedModel
    from vmoe.compress.pruning import Groups
    from vmoe.compress.usage import ExpertUse
    from vmoe.data import ImageDataModule
    from vmoe.training.config import TrainConfig

# What is reported of a model, by whether an image may have several classes: its title, and a run's metric
_FIGURES = {
    False: {"top1": ("top-1", "test/top1"), "nll": ("NLL", "test/loss")},
    True: {"average_precision": ("mAP", "test/mAP"), "bce": ("BCE", "test/loss")},
}


@job(DATA_OPTIONS)
def main(argv: list[str]) -> int:
    """Runs the job."""
    own, for_training = split_options(argv)
    options = _prune_parser().parse_args(own)
    if for_training and options.finetune is None:
        raise UserError(f"{for_training[0]}: is for a fine-tuning, of which there is none; add --finetune EPOCHS")
    if options.out.exists():
        raise UserError(f"--out {options.out}: is there already; give another folder")
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.checkpoints import RunFolder, load_checkpoint
    from vmoe.checkpoints.run_folder import metrics_of
    from vmoe.cli.train import trained
    from vmoe.compress.pruning import check_prunable, merged_groups, pruned_groups
    from vmoe.compress.usage import measure_use
    from vmoe.files import new_folder, write_json

    device = choose_device(options.device)
    checkpoint = load_checkpoint(options.checkpoint, device)
    try:
        check_prunable(checkpoint.model, options.keep)
    except ValueError as error:
        raise UserError(f"--keep {options.keep}: {checkpoint.path} {error}") from error
    data = load_data(checkpoint, options)
    before = matched(checkpoint, data, options.classes)
    config = None if options.finetune is None else _finetuning(options, checkpoint, data, device, for_training)

    batches = Tracked(data.train_eval_dataloader(most=options.images), "use of the experts")
    use = measure_use(checkpoint.model, batches, device, with_norms=options.by == "activation-norm")
    choose = merged_groups if options.merge else pruned_groups
    groups = {name: choose(each, options.keep, options.by) for name, each in use.items()}
    rows = {"before": _accuracy_of(before, data, device)}
    with new_folder(options.out) as folder:
        _write_result(folder, checkpoint, groups, use)
        after = matched(load_checkpoint(folder, device), data, options.classes, say=False)
        rows["after"] = _accuracy_of(after, data, device)
        report = _prune_report(checkpoint, data, device, groups, use) | {
            "command": shlex.join(["vmoe", "prune", *argv])
        }
        write_json(folder / "prune.json", report | {"results": rows})
    if config is not None:
        code = trained(lambda: config, ["vmoe", "prune", *argv])
        if code:
            return code
        tested = metrics_of(RunFolder(Path(config.output_dir)).read_summary())
        figures = {name: tested[key] for name, (_, key) in _FIGURES[checkpoint.multi_label].items()}
        rows["fine-tuned"] = rows["after"] | figures
        write_json(options.out / "prune.json", report | {"results": rows})
    how = f"{'merged' if options.merge else 'kept'} by {options.by}"
    print(f"{checkpoint.path}, {counted(options.keep, 'expert')} per layer {how}")
    Console().print(_prune_table(rows, checkpoint.multi_label))
    print(f"{RunFolder(options.out).shared} and prune.json beside it")
    return 0


def _prune_parser() -> argparse.ArgumentParser:
    parser = new_parser("prune", __doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a checkpoint file, or a run's folder (its best checkpoint)")
    add("--keep", type=count, required=True, metavar="N", help="experts that each layer keeps, below what it has")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder for the result")
    line = "what makes an expert matter (default: %(default)s)"
    add("--by", choices=("routed-mass", "activation-norm"), default="routed-mass", help=line)
    add("--merge", action="store_true", help="merge the others into those kept, instead of dropping them")
    line = "training images on which the use of the experts is measured (default: %(default)s)"
    add("--images", type=count, default=2000, metavar="N", help=line)
    add("--finetune", type=count, metavar="EPOCHS", help="train the result for so many epochs")
    add_data_options(parser)
    return parser


def _finetuning(
    options: argparse.Namespace,
    checkpoint: "TrainedModel",
    data: "ImageDataModule",
    device: "torch.device",
    for_training: list[str],
) -> "TrainConfig":
    """The run that trains the result a little: the checkpoint's recipe, gentler."""
    from vmoe.checkpoints import RunFolder
    from vmoe.cli.follow_up import follow_up

    own = checkpoint.config["optim"]
    rates = {name: own[name] / 10 for name in ("lr", "adamw_lr", "min_lr") if own.get(name) is not None}
    changes = {
        "output_dir": str(options.out / "finetune"),
        "init_from": str(RunFolder(options.out).shared),
        "moe": _fewer(checkpoint, options.keep),
        "optim": {**own, **rates, "warmup_epochs": 0.0},
        "trainer": {"epochs": options.finetune, "device": device.type},
    }
    return follow_up(checkpoint, data.config, changes, for_training)


def _fewer(checkpoint: "TrainedModel", keep: int) -> dict[str, Any]:
    """The moe section of the result."""
    from vmoe.compress.pruning import regrouped_config
    from vmoe.config_values import to_plain
    from vmoe.moe import MoeConfig

    return to_plain(regrouped_config(MoeConfig(**checkpoint.config["moe"]), keep))


def _write_result(
    out: Path, checkpoint: "TrainedModel", groups: "dict[str, Groups]", use: "dict[str, ExpertUse]"
) -> None:
    from vmoe.checkpoints import RunFolder, write_changed
    from vmoe.compress.pruning import regrouped_weights

    weights = regrouped_weights(checkpoint.model, groups, use)
    moe = _fewer(checkpoint, len(next(iter(groups.values()))))
    write_changed(RunFolder(out).shared, checkpoint.path, weights, moe)


def _accuracy_of(checkpoint: "TrainedModel", data: "ImageDataModule", device: "torch.device") -> dict[str, Any]:
    """Figures on the test images and parameters of a checkpoint."""
    from vmoe.evaluation.engine import measure_batches
    from vmoe.models.cost import count_parameters

    batches = Tracked(data.test_dataloader(), f"test set of {data.config.name}")
    result = measure_batches(checkpoint.model, batches, len(checkpoint.class_names), device)
    parameters = count_parameters(checkpoint.model)._asdict()
    figures = {name: getattr(result, name) for name in _FIGURES[checkpoint.multi_label]}
    return {"images": result.images, **figures, "parameters": parameters}


def _prune_table(rows: dict[str, dict[str, Any]], multi_label: bool) -> Table:
    table = Table()
    (share, (title, _)), (loss, (loss_title, _)) = _FIGURES[multi_label].items()
    for column in ("", title, loss_title, "parameters", "active"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        numbers = (f"{row['parameters'][kind]:,}" for kind in ("total", "active"))
        shown = "-" if row[share] is None else f"{row[share]:.2%}"
        table.add_row(name, shown, f"{row[loss]:.4f}", *numbers)
    return table


def _prune_report(
    checkpoint: "TrainedModel",
    data: "ImageDataModule",
    device: "torch.device",
    groups: "dict[str, Groups]",
    use: "dict[str, ExpertUse]",
) -> dict[str, Any]:
    from vmoe.training.run.summary import device_name
    from vmoe.version import versions

    layers = {
        name: {
            "groups": [list(group) for group in groups[name]],
            "routed_mass": each.mass_E.tolist(),
            "activation_norm": None if each.norm_E is None else each.norm_E.tolist(),
        }
        for name, each in use.items()
    }
    return {
        "checkpoint": str(checkpoint.path),
        "data": {"name": data.config.name, "root": data.config.root},
        "layers": layers,
        "device": device_name(device),
        "versions": versions(),
    }
