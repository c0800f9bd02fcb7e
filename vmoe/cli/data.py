"""\
show  looks at a data set before the first run: it prints how many images each split and class has, their sizes, their
mean and standard deviation, which cannot be read, and which of validation or test are nearly training images. It writes
a sheet of training images as a PNG, a row for each class, varied as in the first epoch, but not mixed with each other.
Options of `vmoe train` can follow by their dotted names.

vmoe data show photos/ --json photos.json
vmoe data show --config fractals
vmoe data show --config cifar10_small --data.augment.preset strong --out strong.png
vmoe data show --data.name folder --data.root photos --classes 4 --images 12
"""

from functools import partial
from pathlib import Path

from vmoe.cli.common import job
from vmoe.cli.options import count, new_parser
from vmoe.text import printable


@job()
def main(argv: list[str]) -> int:
    """Runs the job."""
    parser = new_parser("data", __doc__)
    add = parser.add_argument
    add("job", choices=("show",), help="what to do")
    add("--classes", type=count, default=10, metavar="N", help="the most rows; more classes are thinned out evenly")
    add("--images", type=count, default=10, metavar="N", help="of each class (default: %(default)s)")
    add("--out", type=Path, default=Path("training_images.png"), metavar="FILE", help="default: %(default)s")
    line = "look at so many images of each split at most, 0 at none (default: %(default)s)"
    add("--look-at", type=partial(count, least=0), default=5000, metavar="N", help=line)
    add("--json", type=Path, metavar="FILE", help="write the findings as JSON")
    options, of_training = parser.parse_known_args(argv)
    if options.out.suffix.lower() != ".png":
        parser.error(f"argument --out: {str(options.out)!r} must end in .png")
    import dataclasses

    import numpy as np

    from vmoe.cli.train_options import parse  # here, so that --help and mistyped options answer at once

    config = parse(of_training)
    from vmoe.cli.progress import Tracked
    from vmoe.data import ImageDataModule
    from vmoe.data.channels import displayed_line
    from vmoe.data.inspection import inspect_images
    from vmoe.data.sheet import draw_sheet
    from vmoe.files import atomic_write, require_no_folder, require_writable, write_json
    from vmoe.training.run.summary import data_lines

    for file in filter(None, (options.out, options.json)):
        require_no_folder(file)
        require_writable(file.parent)
    # this pipeline reads only the images it needs
    data = ImageDataModule(dataclasses.replace(config.data, pipeline="workers"), config.seed)
    data.prepare_data()
    data.setup("fit")
    for line in [*data.notes, *data_lines(config.data, data)]:
        print(printable(line))
    found = None
    if options.look_at and not data.is_endless:
        found = inspect_images(data, options.look_at, threads=config.data.workers or 4, progress=Tracked)
        for line in found.lines():
            print(printable(line))
    shown = np.linspace(0, data.num_classes - 1, min(options.classes, data.num_classes)).round().astype(int)
    rows = [(data.class_names[label], data.training_pictures(label, options.images)) for label in shown]
    rows += [] if found is None else found.rows(options.images)
    augment = config.data.augment
    varied = "albumentations" if augment.albumentations is not None else f"preset={augment.preset}"
    title = f"{config.data.name}: training images, data.augment.{varied}"
    if data.channels is not None:
        title += f"; {displayed_line(data.channels)}"
    with atomic_write(options.out) as temporary:
        draw_sheet(title, rows, [] if found is None else found.lines()).save(temporary, "PNG")
    if options.json is not None:
        counts = {name: data.images_of_classes(name) for name in data.image_sets()}
        described = {"class_names": data.class_names, "images_of_classes": counts, "image_size": data.image_size}
        write_json(options.json, described | ({} if found is None else found.as_dict()))
    print(f"a sheet of them in {options.out}")
    return 0
