"""\
Writes a folder with an index.html that runs a V-MoE in the browser, from disk or any static host, without a network:
drop a picture, see the answer and which expert takes which patch, layer by layer; change the capacity, switch experts
off, and see the answer change. MODEL is a checkpoint, a run's folder, a safetensors file or a folder for timm
(pip install 'vmoe[export]').

The page holds ONNX Runtime Web, which npm fetches unless --runtime names its package.

  vmoe demo-page assets/models/cifar100_tiny.safetensors --out demo
  vmoe demo-page runs/mine --out demo --images photos/ --runtime onnxruntime-web-1.30.0.tgz
"""

import argparse
from pathlib import Path

from vmoe.cli.common import job
from vmoe.cli.options import new_parser
from vmoe.cli.progress import working


@job()
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _demo_page_parser().parse_args(argv)
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.cli.inputs import depth_of, find_files
    from vmoe.data import load_image
    from vmoe.data.samples import PHOTOGRAPHS, credit, load_photograph
    from vmoe.serve.demo_page import write_demo_page

    if options.images:
        files = find_files(options.images)
        depth = depth_of(None, files)
        pictures, authors = ((path.name, load_image(path, depth)) for path in files), None
    else:
        pictures, authors = ((name, load_photograph(name)) for name in PHOTOGRAPHS), credit()
    with working("writing the page"):
        write_demo_page(options.out, options.model, pictures, options.runtime, authors)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out / 'index.html'}: open it in a browser; the folder has {size / 2**20:.1f} MiB")


def _demo_page_parser() -> argparse.ArgumentParser:
    parser = new_parser("demo-page", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint, a folder, a safetensors file, or a name: see `vmoe models`")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    add("--images", nargs="+", metavar="FILE", help="what the page offers (default: the package's two photographs)")
    add("--runtime", type=Path, metavar="TGZ", help="the npm package onnxruntime-web, as a .tgz or unpacked")
    return parser
