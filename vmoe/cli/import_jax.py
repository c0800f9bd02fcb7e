"""\
Converts a checkpoint of google-research/vmoe (PREFIX.index and PREFIX.data-nnnnn-of-NNNNN) for the other jobs. The
tensors give the architecture, but not the routing: give the routing options of its config.

A .ckpt opens with `vmoe evaluate`, `vmoe heatmap` and so on. A .safetensors holds the weights for
timm.models.load_checkpoint, and the same description in its metadata.

  vmoe import-jax vmoe_s32_last2_ilsvrc2012_randaug_light1 --out s32.ckpt
  vmoe import-jax vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012 --capacity-factor 1.5 --out b16.safetensors
"""

import argparse

from vmoe.cli.common import job
from vmoe.cli.importing import add_result_options, check_out, write_imported
from vmoe.cli.options import capacity_factor, new_parser
from vmoe.cli.progress import working

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
    check_out(options.out)
    # Imported here, so that --help and a mistyped option answer at once.
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
    write_imported(imported, options, options.prefix, "vmoe.load_jax_checkpoint")


def _import_jax_parser() -> argparse.ArgumentParser:
    parser = new_parser("import-jax", __doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="common path of the files, without .index")
    add_result_options(parser)
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
    return parser
