"""\
show  writes a sheet of training images as a PNG, a row for each class. Images are varied as in the first epoch, but not
mixed with each other. Options of `vmoe train` can follow by their dotted names.

vmoe data show --config fractals
vmoe data show --config cifar10_small --data.augment.preset strong --out strong.png
vmoe data show --data.name folder --data.root photos --classes 4 --images 12
"""

from pathlib import Path

from vmoe.cli.common import job
from vmoe.cli.options import count, new_parser


@job()
def main(argv: list[str]) -> int:
    """Runs the job."""
    parser = new_parser("data", __doc__)
    add = parser.add_argument
    add("job", choices=("show",), help="what to do")
    add("--classes", type=count, default=10, metavar="N", help="the most rows; more classes are thinned out evenly")
    add("--images", type=count, default=10, metavar="N", help="of each class (default: %(default)s)")
    add("--out", type=Path, default=Path("training_images.png"), metavar="FILE", help="default: %(default)s")
    options, of_training = parser.parse_known_args(argv)
    if options.out.suffix.lower() != ".png":
        parser.error(f"argument --out: {str(options.out)!r} must end in .png")
    import dataclasses

    import numpy as np

    from vmoe.cli.train_options import parse  # here, so that --help and a mistyped option answer at once

    config = parse(of_training)
    from vmoe.data import ImageDataModule
    from vmoe.data.sheet import draw_sheet
    from vmoe.files import atomic_write, require_no_folder, require_writable
    from vmoe.training.run.summary import data_lines

    require_no_folder(options.out)
    require_writable(options.out.parent)
    # The pipeline that reads only the images it needs
    data = ImageDataModule(dataclasses.replace(config.data, pipeline="workers"), config.seed)
    data.prepare_data()
    data.setup("fit")
    for line in [*data.notes, *data_lines(config.data, data)]:
        print(line)
    shown = np.linspace(0, data.num_classes - 1, min(options.classes, data.num_classes)).round().astype(int)
    rows = [(data.class_names[label], data.training_pictures(label, options.images)) for label in shown]
    title = f"{config.data.name}: training images, data.augment.preset={config.data.augment.preset}"
    with atomic_write(options.out) as temporary:
        draw_sheet(title, rows).save(temporary, "PNG")
    print(f"a sheet of them in {options.out}")
    return 0
