"""\
Groups the classes of a trained model by its confusions on the validation images (spectral clustering), and writes a
file with the super-class of each class. `vmoe train --loss.super_classes FILE` guides the router of images
(moe.route=image) towards them; give as many super-classes as experts.

The model may be dense, or any other: only its confusions count. The test images are not read.

  vmoe super-classes runs/dense --count 10 --out super.yaml
  vmoe train --config mine.yaml --moe.route image --moe.num_experts 10 --loss.super_classes super.yaml
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vmoe.cli.common import job
from vmoe.cli.evaluate_tables import escape
from vmoe.cli.inputs import DATA_OPTIONS, add_data_options, changed_config, halving_batches
from vmoe.cli.options import choose_device, count, new_parser
from vmoe.cli.progress import Tracked
from vmoe.errors import UserError


@job(DATA_OPTIONS | {"count": "--count"})
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _super_classes_parser().parse_args(argv)
    if options.out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {options.out}: must end in .yaml")
    if options.classes != "by-name":
        raise UserError(f"--classes {options.classes}: confusions are of the checkpoint's own classes; leave it out")
    halving_batches(lambda: _found(options), options)


def _found(options: argparse.Namespace) -> None:
    # Imported here, so that --help and a mistyped option answer at once.
    import yaml

    from vmoe.checkpoints import load
    from vmoe.evaluation.super_classes import super_classes
    from vmoe.files import require_no_folder, require_writable, write_text

    require_no_folder(options.out)
    require_writable(options.out.parent)
    model = load(options.checkpoint, choose_device(options.device))
    config = changed_config(model, options)
    found = super_classes(model, options.count, config, soft=options.soft, progress=Tracked)
    table = Table(title=escape(f"{options.checkpoint} · super-classes"), title_justify="left")
    for column in ("expert", "super-class", "classes", ""):
        table.add_column(column, justify="right" if column in ("expert", "classes") else "left")
    for expert, (group, names) in enumerate(found.groups.items()):
        table.add_row(str(expert), group, str(len(names)), escape(", ".join(names)))
    Console().print(table)
    print(
        f"{found.errors_within:.1%} of the model's errors on the validation images are within a super-class "
        f"(by chance {found.pairs_within:.1%})"
    )
    heading = (
        f"# Super-classes by `vmoe super-classes {options.checkpoint} --count {options.count}`: class: super-class\n"
    )
    body = yaml.safe_dump(found.of_classes, sort_keys=False, allow_unicode=True, width=1000)
    write_text(options.out, heading + body)
    print(f"{options.out}: for --loss.super_classes, with --moe.num_experts {options.count}")


def _super_classes_parser() -> argparse.ArgumentParser:
    parser = new_parser("super-classes", __doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a checkpoint file, or a run's folder (its best checkpoint)")
    add("--count", type=count, required=True, metavar="E", help="how many super-classes: one per expert")
    add("--soft", action="store_true", help="share each class by the super-classes of the answers to its images")
    add("--out", type=Path, required=True, metavar="FILE", help="what to write, a .yaml file")
    add_data_options(parser)
    return parser
