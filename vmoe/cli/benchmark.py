"""\
Measures on this machine: one MoE layer, whole models, the data pipeline, or several processes. Where possible, all
compared jobs run in one process, in rounds of shuffled order. Figures are medians.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vmoe.cli.common import job
from vmoe.cli.options import capacity_factor, choose_device, count, new_parser
from vmoe.cli.progress import working

_LAYER = """\
Times MoE layers beside timm's dense Mlp on K times as many tokens (equal active FLOPs): the experts with a given
routing, and the whole layer with router, noise, balance losses and batch priority in groups of 8 images. A call is a
forward and a backward pass, with float32 parameters under autocast; "inference" is the forward pass with the weights in
the low type.

Columns: ms, the median of the rounds; spread, half the distance of the quartiles; ratio to dense; the share that the
active FLOPs reach of the matrix products' peak, measured in the run; MiB, memory at most beyond what was there before
the call, and its ratio to dense; whether the host waits for the GPU; ms until the host has issued the work.

  vmoe benchmark layer --cases S16,B16,L16 --peers
  vmoe benchmark layer --cases B16 --experts 64 --top-k 1 --jobs experts layer
  vmoe benchmark layer --curves                  # cost as experts, tokens, choices, capacity and images grow
  vmoe benchmark layer --device cpu --cases S32

Then what the device allows: a floor is the larger of FLOPs at the peak and bytes that must move at a copy's bandwidth.

Writes layer.json, layer.md and roofline.png (one for each of several cases), or layer_curves.json, .md and .png.
"""
_MODEL = """\
Times V-MoEs beside their dense twin. "training" is a step's forward pass, loss and backward pass, with float32
parameters under autocast; the optimiser's update (fused AdamW) stands beside it. "inference" is the forward pass with
the weights in the low type. MoE layers have batch priority in groups of 8 images, noise and balance losses.

  vmoe benchmark model --model vit_base_patch16_224 --layers every-2,last-2 --top-k 1 2 --batch 128
  vmoe benchmark model --model vit_small_patch16_224 --passes training --compile best
  vmoe benchmark model --model vit_tiny_patch16_224 --device cpu --batch 1 --route patch image --capacity-factor inf \\
    --passes inference onnx

--compile best measures off, default and reduce-overhead and shows the fastest for each model; all are in model.json.
Compiling a large model takes a minute or more for each variant, pass and mode. Writes model.json and model.md.
"""
_DATA = """\
Times the training images of a config, loaded and augmented by 0, 1, ... worker processes and on the device, alone and
feeding the training of its model (update by fused AdamW included), beside the same training on synthetic images that
are on the device already; "share" is what of the latter's speed is left. Options of the config can follow by their
dotted names; with data.mix the fed training mixes too.

  vmoe benchmark data --config configs/cifar10_vit_tiny.yaml --workers 0 4 8
  vmoe benchmark data --config configs/digits.yaml --pipelines device --data.batch_size 128
  vmoe benchmark data --config configs/imagenette_vit_tiny.yaml --pipelines workers --workers 8 16 --torchvision \\
    --data.name folder --data.root ~/data/imagenette --data.augment.preset light

Writes data.json and data.md.
"""
_SCALING = """\
Trains V-MoEs (every second MLP, top-1, batch priority in groups of 8 images) on random images by the trainer of
`vmoe train`, in one process and in many. The command starts the processes: on all GPUs, or on CPUs as a rehearsal on
tiny models. Layouts: ddp (data parallel), fsdp (sharded) and expert (expert parallel).

  equality    three updates beside one process: weights, losses and gradients
  speed       images/s as batch and processes grow together (weak) and with the same batch (strong), and memory; both
              beside the planner's predictions
  checkpoint  how long a save takes and how large it is; a training that resumes from it, beside one that never stopped

  vmoe benchmark scaling
  vmoe benchmark scaling --device cpu --processes 1 2 --parts equality speed

Writes scaling.csv, scaling.json and scaling.md after every result. What fails or lacks memory is a row that says so.
"""
_SERVE = """\
Asks a running `vmoe serve` for the classes of a photograph (a JPEG of 640 x 427 pixels), with several numbers of
clients that each ask again as soon as they are answered, then sends it damaged copies, of which none may get lost. The
clients run in this process: on the same machine they take processor time from the server. The key, if the server asks
for one, is read from VMOE_API_KEY.

  vmoe serve assets/models/cifar100_tiny.safetensors &
  vmoe benchmark serve --clients 1 8 64

Writes serve.json and serve.md.
"""
_SIZE_OPTIONS = {
    "width": "width of a token",
    "hidden": "hidden width of an expert (default: 4 times --width, where that is given)",
    "experts": "number of experts",
    "top-k": "experts per token",
    "images": "images a batch",
    "tokens": "tokens an image",
}


@job()
def main(argv: list[str]) -> int:
    """Runs the job."""
    parser = command_line()
    options, rest = parser.parse_known_args(argv)
    if rest and options.job != "data":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.bench.timing import DeviceLost
    from vmoe.cli import benchmark_data, benchmark_jobs
    from vmoe.cli.benchmark_scaling import scaling
    from vmoe.cli.benchmark_serve import benchmark_server

    options.device = choose_device(options.device)
    results = benchmark_jobs.Results(["benchmark", *argv], options.out, options.device, options.seed)
    jobs = {"layer": benchmark_jobs.layer, "model": benchmark_jobs.model, "serve": benchmark_server, "scaling": scaling}
    jobs["data"] = lambda options, results: benchmark_data.data(options, rest, results)
    try:
        with working(lambda: results.at):
            jobs[options.job](options, results)
    except DeviceLost as error:
        line = f"vmoe benchmark: the GPU stopped at {error}; nothing that runs after it in this process would be right"
        print(line, file=sys.stderr)
        return 1
    return 0


def command_line() -> argparse.ArgumentParser:
    """The parser of `vmoe benchmark`. For `data` unknown options may be options of a config."""
    parser = new_parser("benchmark", __doc__)
    jobs = parser.add_subparsers(dest="job", metavar="layer|model|data|serve|scaling", required=True)
    _add_layer(_new_job(jobs, "layer", "one MoE layer beside timm's dense Mlp", _LAYER))
    _add_model(_new_job(jobs, "model", "V-MoEs beside their dense twin", _MODEL))
    _add_data(_new_job(jobs, "data", "the data pipeline of a config beside its model", _DATA))
    _add_serve(_new_job(jobs, "serve", "a running server under load", _SERVE))
    _add_scaling(_new_job(jobs, "scaling", "trainings in one process and in many", _SCALING))
    return parser


def _new_job(jobs: Any, name: str, line: str, description: str) -> argparse.ArgumentParser:
    parser = jobs.add_parser(
        name,
        help=line,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and routing (default: 0)")
    out = Path("runs/benchmark")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="where results go (default: %(default)s)")
    return parser


def _add_timing(parser: argparse.ArgumentParser, rounds: str) -> None:
    types = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=types, help="computed in (default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--rounds", type=count, help=f"timings of each job (default: {rounds})")


def _add_layer(parser: argparse.ArgumentParser) -> None:
    _add_timing(parser, "15, along curves 7")
    names = "S16 B16 L16 Ti-k1 Ti-k2 S32 S32-b128"
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"sizes by name: {names}")
    parser.add_argument(
        "--jobs", nargs="+", metavar="NAME", help="only jobs with names that begin like this, and the dense one"
    )
    parser.add_argument("--peers", action="store_true", help="also plain PyTorch recipes and transformers' experts")
    line = "instead: along experts, tokens, top-k, capacity, images (all when none is named)"
    parser.add_argument("--curves", nargs="*", metavar="AXIS", help=line)
    sizes = parser.add_argument_group("other sizes", "change the cases; by default B16, on the CPU S32")
    for name, line in _SIZE_OPTIONS.items():
        sizes.add_argument(f"--{name}", type=count, metavar="N", help=line)
    sizes.add_argument("--capacity-factor", type=capacity_factor, metavar="F", help="inf drops nothing")


def _add_model(parser: argparse.ArgumentParser) -> None:
    _add_timing(parser, "8")
    add = parser.add_argument
    add("--model", default="vit_base_patch16_224", metavar="NAME", help="of timm (default: %(default)s)")
    add("--layers", nargs="+", default=["every-2", "last-2"], help="which are MoE (default: every-2 last-2)")
    add("--top-k", nargs="+", type=count, default=[1, 2], metavar="K", help="experts per token (default: 1 2)")
    routes = ("patch", "image")
    add("--route", nargs="+", choices=routes, default=routes[:1], help="what is routed (default: patch)")
    add("--experts", type=count, default=32, metavar="E", help="of a layer (default: %(default)s)")
    add(
        "--capacity-factor", type=capacity_factor, default=1.05, metavar="F", help="default: %(default)s; inf: no drops"
    )
    add("--batch", type=count, metavar="B", help="images a step (default: 128 on a GPU, else 8)")
    add("--image-size", type=count, metavar="PIXELS", help="side of the images (default: the model's own)")
    modes = ("off", "default", "reduce-overhead", "best")
    add("--compile", choices=modes, default="off", help="torch.compile's mode (default: off)")
    passes = ("training", "inference", "onnx")
    line = "onnx is inference by ONNX Runtime on the CPU, in float32 (default: training inference)"
    add("--passes", nargs="+", choices=passes, default=passes[:2], help=line)


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, metavar="YAML", help="a recipe, such as configs/digits.yaml")
    add("--workers", nargs="+", type=_workers, default=[0, 1, 2], metavar="N", help="processes (default: 0 1 2)")
    pipelines = ("workers", "device")
    add("--pipelines", nargs="+", choices=pipelines, default=pipelines, help="default: workers device")
    add("--shards", metavar="DIR", help="also the same images as tar shards of this folder (see make-shards)")
    add("--torchvision", action="store_true", help="also torchvision's own loader of the same folder of images")
    add("--seconds", type=float, default=5.0, help="of counting for each figure (default: %(default)s)")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    add("--clients", nargs="+", type=count, default=[1, 8, 64], metavar="N", help="at a time (default: 1 8 64)")
    add("--requests", type=count, default=1000, metavar="N", help="for each figure (default: %(default)s)")


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parts = ("equality", "speed", "checkpoint")
    add("--parts", nargs="+", choices=parts, default=parts, help="default: equality speed checkpoint")
    add(
        "--processes",
        nargs="+",
        type=count,
        metavar="N",
        help="divisors of the most; default: 1 and all GPUs; on CPUs 1 2",
    )
    add("--models", nargs="+", metavar="NAME", help="models to time, of S/16 and B/16 (default: both)")
    add(
        "--experts",
        nargs="+",
        type=count,
        metavar="E",
        help="of a layer, in speed (default: 8 32)",
    )
    add("--batch", type=count, metavar="B", help="images per process, in speed (default: 128 on a GPU, else 8)")
    add("--compiled", action="store_true", help="compile the timed models")
    add("--cuda-graph", action="store_true", help="capture steps, in speed and equality, by layouts that can be")
    add("--steps", type=count, help="updates that are timed (default: 12 on a GPU, else 3)")
    add("--limit", type=count, default=120, metavar="SECONDS", help="the most for a part (default: %(default)s)")
    add("--job-limit", type=count, default=90, metavar="SECONDS", help="and for a training (default: %(default)s)")


def _workers(text: str) -> int:
    return count(text, least=0)
