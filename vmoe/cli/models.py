"""\
Lists the models that open by name: what others have released, the architectures that this package registers in timm,
and weights that come with its repository. Any job takes the name of a released model: it is downloaded once and kept.

The table has the capacity factor of the publisher's measurement. Opened by name, a model drops nothing, unless `vmoe
evaluate` or `vmoe heatmap` get --capacity-factor. An empty cell is a value that no source gives.

  vmoe models
  vmoe models --json models.json
  vmoe predict vmoe_s32_last2.ilsvrc2012_ft384 photo.jpg
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vmoe.cli.common import job
from vmoe.cli.options import new_parser

# Top-1 in per cent, from assets/models/README.md
_SHIPPED = {
    "cifar100_tiny": 58.56,
    "cifar100_tiny_dense": 57.04,
}


@job()
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _models_parser().parse_args(argv)
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.files import require_no_folder, require_writable, write_json

    if options.json is not None:
        require_no_folder(options.json)
        require_writable(options.json.parent)
    found = {"released": _released(), "architectures": _architectures(), "shipped": _shipped()}
    print("Released by others (name, parameters active / all, pixels, classes, top-1 as published, is it here):")
    for row in found["released"]:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1f} %"
        size = _millions(*row["parameters"])
        here = "here" if row["file"] else ""
        print(
            f"  {row['name']:41} {size:>16} {row['image_size']:4} {row['num_classes']:6,} {accuracy:>7} {here}".rstrip()
        )
        factor = row["eval_capacity_factor"]
        facts = [row["description"], row["measured_on"], f"capacity factor {factor:g}" if factor is not None else ""]
        print(f"    {'; '.join(filter(None, facts))}")
    print("\nArchitectures without weights, for vmoe.create_model and --model.name (parameters active / all):")
    for row in found["architectures"]:
        print(f"  {row['name']:41} {_millions(*row['parameters']):>16} {row['image_size']:4}")
    if found["shipped"]:
        print("\nWeights in this package's repository:")
        for row in found["shipped"]:
            print(f"  {row['name']}: {row['bytes'] / 1e6:.1f} MB, CIFAR-100, test {row['accuracy']} %")
    if options.json is not None:
        write_json(options.json, found)
        print(options.json)


def _models_parser() -> argparse.ArgumentParser:
    parser = new_parser("models", __doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that the table has, as JSON")
    return parser


def _released() -> list[dict[str, Any]]:
    from vmoe.checkpoints.released import converted_file
    from vmoe.models.released import RELEASED

    rows = []
    for name, model in RELEASED.items():
        path = converted_file(name)
        here = {"file": str(path) if path.is_file() else None}
        rows.append({"name": name, **asdict(model), **here})
    return rows


def _architectures() -> list[dict[str, Any]]:
    """The names in `vmoe.models.registry`. It makes a dense twin without values once per backbone."""
    import timm

    from vmoe.models.cost import count_parameters
    from vmoe.models.registry import NAMED

    dense: dict[str, Any] = {}
    rows = []
    for name, (arguments, moe) in NAMED.items():
        twin = dense.get(str(arguments))
        if twin is None:
            twin = dense[str(arguments)] = timm.create_model(name, moe=False, device="meta")
        mlp = sum(each.numel() for each in twin.blocks[0].mlp.parameters())
        layers = len(moe.select_layers(len(twin.blocks)))
        router = twin.embed_dim * moe.num_experts
        of_experts = [layers * (mlp * (count - 1) + router) for count in (moe.num_experts, moe.top_k)]
        total = count_parameters(twin).total
        side = twin.pretrained_cfg["input_size"][-1]
        rows.append({"name": name, "parameters": [total + each for each in of_experts], "image_size": side})
    return rows


def _millions(total: int, active: int) -> str:
    return f"{active / 1e6:,.1f} / {total / 1e6:,.1f} M"


def _shipped() -> list[dict[str, Any]]:
    """The files of weights in the repository's assets. An installed package does not have them."""
    folder = Path(__file__).parents[2] / "assets" / "models"
    files = [(folder / f"{name}.safetensors", accuracy) for name, accuracy in _SHIPPED.items()]
    return [
        {"name": str(file), "bytes": file.stat().st_size, "accuracy": accuracy}
        for file, accuracy in files
        if file.is_file()
    ]
