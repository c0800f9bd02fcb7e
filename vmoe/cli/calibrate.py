"""\
Calibrates a checkpoint on the validation images. Temperature scaling makes its probabilities match how often it is
right. Conformal prediction learns how large a set of classes must be to hold the right one with a given probability.
Writes both with the weights to a new file, which every job opens: `vmoe predict FILE --coverage 0.9` then gives such
sets. Measures the test images before and after. Of several classes per image it calibrates the probability of each
class, and there are no sets.

  vmoe calibrate runs/mine --out mine.safetensors
  vmoe predict mine.safetensors holiday/ --coverage 0.9
"""

import argparse
import sys
from pathlib import Path

from vmoe.cli.common import job
from vmoe.cli.inputs import DATA_OPTIONS, add_data_options, changed_config, halving_batches
from vmoe.cli.options import choose_device, new_parser
from vmoe.cli.progress import Tracked
from vmoe.errors import UserError
from vmoe.text import counted

_FEW_TO_FIT_BY = 50  # fewer images give a warning


@job(DATA_OPTIONS)
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _calibrate_parser().parse_args(argv)
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out {options.out}: must end in .safetensors")
    if options.classes != "by-name":
        raise UserError(f"--classes {options.classes}: calibration needs the checkpoint's own classes; leave it out")
    halving_batches(lambda: _calibrated(options), options)


def _calibrated(options: argparse.Namespace) -> None:
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.checkpoints import load, save
    from vmoe.evaluation.calibration import calibrate
    from vmoe.files import require_no_folder, require_writable, write_json

    files = [options.out, *([options.json] if options.json is not None else [])]
    require_no_folder(*files)
    require_writable(*(file.parent for file in files))
    model = load(options.checkpoint, choose_device(options.device))
    report = calibrate(model, changed_config(model, options), progress=Tracked)
    save(model, options.out)
    if options.json is not None:
        write_json(options.json, {"checkpoint": str(options.checkpoint), **report})
    before, after = report["before"], report["after"]
    images = f"{counted(report['images'], 'image')} for validation"
    print(f"temperature {report['temperature']:.3f}, by {images}; on the test set:")
    print(f"  calibration error {before['ece']:.2%} before, {after['ece']:.2%} after")
    loss, name = ("bce", "binary cross-entropy") if model.multi_label else ("nll", "negative log-likelihood")
    print(f"  {name} {before[loss]:.4f} before, {after[loss]:.4f} after")
    for each in report.get("sets", ()):
        print(
            f"  sets for a coverage of {each['coverage']:.0%} hold the right class of {each['found']:.1%} of the "
            f"images, and {each['classes']:.2f} classes on average"
        )
    print(f"{options.out}: the calibrated model")
    if report["at_bound"]:
        end, answered = ("smallest", "well") if report["temperature"] <= 1 else ("largest", "badly")
        print(
            f"warning: the fit on {images} ends at the {end} temperature that is allowed, since these are answered too "
            f"{answered} to show how sure the model may be; give more images for validation",
            file=sys.stderr,
        )
    elif report["images"] < _FEW_TO_FIT_BY:
        print(
            f"warning: {images} are few to fit a temperature by: other images may give another one, and other sets",
            file=sys.stderr,
        )


def _calibrate_parser() -> argparse.ArgumentParser:
    parser = new_parser("calibrate", __doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint file, or a run's folder (its best checkpoint)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what to write, a .safetensors file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON")
    add_data_options(parser)
    return parser
