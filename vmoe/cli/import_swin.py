"""\
Converts a Swin-MoE of microsoft/Swin-Transformer, sparse or dense, into a checkpoint for the other jobs: a timm Swin
with MoE layers. PATH is the folder of the unzipped files, a file in it, or the common path of NAME.rank0, NAME.rank1,
... and NAME.master. Files of any number of ranks are merged.

The tensors give the architecture, but not the routing: that is as in the released models, unless --config or the
options below change it.

  vmoe import-swin swin_moe_small_patch4_window12_192_8expert_32gpu_22k/ --out swin_moe.ckpt
  vmoe import-swin swin_moe.pth --img-size 384 --capacity-factor inf --out swin_moe_384.safetensors
"""

import argparse
from functools import partial

from vmoe.cli.common import job
from vmoe.cli.importing import add_result_options, check_out, write_imported
from vmoe.cli.options import capacity_factor, count, new_parser
from vmoe.cli.progress import working

_OPTIONS_OF_IMPORT = {  # argument of Python -> option here
    "config": "--config",
    "img_size": "--img-size",
    "window_size": "--window-size",
    "top_k": "--top-k",
    "capacity_factor": "--capacity-factor",
    "capacity_multiple_of": "--slices-per-expert",
    "noise_std": "--noise-std",
}


@job(_OPTIONS_OF_IMPORT)
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _import_swin_parser().parse_args(argv)
    check_out(options.out)
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.models.swin_import import import_swin_moe_checkpoint, read_settings

    given = {
        "TOP_VALUE": options.top_k,
        "CAPACITY_FACTOR": 0.0 if options.capacity_factor == float("inf") else options.capacity_factor,
        "USE_BPR": options.batch_priority,
        "NORMALIZE_GATE": options.renormalize,
        "GATE_NOISE": options.noise_std,
    }
    settings = read_settings(options.config) | {name: value for name, value in given.items() if value is not None}
    with working("importing"):
        imported = import_swin_moe_checkpoint(
            options.path, settings, options.img_size, options.window_size, options.slices_per_expert
        )
    write_imported(imported, options, options.path, "vmoe.load_swin_moe_checkpoint")


def _import_swin_parser() -> argparse.ArgumentParser:
    parser = new_parser("import-swin", __doc__)
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("path", metavar="PATH", help="folder, file or common path of the files")
    add_result_options(parser)
    line = "Swin-MoE's config in YAML; its MODEL.SWIN_MOE says how the model routes"
    parser.add_argument("--config", metavar="FILE", help=line)
    parser.add_argument("--top-k", type=int, metavar="K", help="experts per token (TOP_VALUE, released: 1)")
    line = "in training and at evaluation; inf drops nothing (CAPACITY_FACTOR, released: 1.25)"
    parser.add_argument("--capacity-factor", type=capacity_factor, metavar="F", help=line)
    line = "full experts drop the smallest gates (USE_BPR, released: yes)"
    parser.add_argument("--batch-priority", action=on_off, help=line)
    line = "the combine weights of a token sum to 1 (NORMALIZE_GATE, released: no)"
    parser.add_argument("--renormalize", action=on_off, help=line)
    line = "noise of the router in training, in 1 / experts (GATE_NOISE, released: 1)"
    parser.add_argument("--noise-std", type=float, metavar="STD", help=line)
    line = "ranks that shared an expert, of which a capacity is a multiple (default: as the files are)"
    parser.add_argument("--slices-per-expert", type=partial(count, least=1), metavar="N", help=line)
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="compute the position biases for such images")
    parser.add_argument("--window-size", type=int, metavar="TOKENS", help="and for such windows")
    return parser
