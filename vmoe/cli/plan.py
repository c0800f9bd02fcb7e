"""\
Predicts from a config the memory of each process and the time of a step on many GPUs, for every mesh layout: ddp, fsdp,
and expert with each expert_size, with all except the experts sharded ("shard") or whole. Nothing is trained, and no GPU
is needed.

  vmoe plan --config configs/imagenet_vmoe_s16.yaml --gpus 64 --gpu h100-80g --network ib-400
  vmoe plan --config configs/imagenet_vmoe_s16.yaml --gpus 8 --data.batch_size 1024 --moe.num_experts 32

Options of the config can follow by their dotted names. The best layouts come first, those that are not feasible last,
with the reason. Shares of the time: compute (products, attention), memory (all else, the update included), network
(time that no computing hides), host (time by which the host is slower than the GPU). GB sent: by one process in one
update.

--measure instead runs models on this machine's GPU and compares peak memory and time of a step with the predictions:
with the table's rates, and with the GPU's own, which it measures first.

  vmoe plan --measure

Writes plan.json, plan.md and plan.png, with --curves plan_curves.json and plan_curves.png; or measured.csv,
measured.json and measured.md.
"""

import argparse
import dataclasses
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vmoe.bench.plan.hardware import GPUS, NETWORKS, USUAL_NETWORK, Machine, gpu_of_this_machine, network_bandwidth
from vmoe.cli.common import job
from vmoe.cli.options import choose_device, count, new_parser
from vmoe.cli.progress import working
from vmoe.errors import UserError
from vmoe.files import write_csv, write_json, write_text

if TYPE_CHECKING:
    from vmoe.bench.plan.planner import Traces

_BANDWIDTHS = [2**step * 1e9 for step in range(8)]  # points of the curves, bytes/s per GPU


@job()
def main(argv: list[str]) -> int:
    """Runs the job."""
    options, rest = _plan_parser().parse_known_args(argv)
    if options.measure:
        if rest:
            raise UserError(f"{rest[0]}: no such option with --measure; see `vmoe plan --help`")
        return _measure_plans(options, argv)
    if options.config is None:
        raise UserError("--config: give a recipe, such as configs/digits.yaml, or --measure")
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.bench.figure import save_figure
    from vmoe.bench.plan.choice import plans_of, workload_of
    from vmoe.bench.plan.report import PLAN_COLUMNS, draw_network_curves, draw_plans, plan_row
    from vmoe.bench.report import markdown_table
    from vmoe.cli.train_options import parse

    config = parse(["--config", options.config, *rest])
    machine, network = Machine.of(options.gpu), network_bandwidth(options.network)
    workload = workload_of(config, options.classes)
    traces: Traces = {}
    with working("planning"):
        plans = plans_of(config, workload, options.gpus, machine, network, traces)
    images = workload.batch * workload.accumulate
    rows = [plan_row(plan, images) for plan in plans]
    place = f"{options.gpus} x {options.gpu}, {options.network}"
    experts = "dense" if workload.moe is None else f"E={workload.moe.num_experts}"
    title = f"{options.config}: {workload.name}, {experts}, {images} images per update, {place}"
    table = f"## {title}\n\n{markdown_table(PLAN_COLUMNS, rows)}"
    print(table + "\n")
    if not any(plan.missing is None for plan in plans):
        print("no layout is feasible: more GPUs, a smaller data.batch_size or larger memory would help\n")
    content = {
        "command": shlex.join(["vmoe", "plan", *argv]),
        "config": options.config,
        "gpus": options.gpus,
        "machine": dataclasses.asdict(machine),
        "source": GPUS[options.gpu].source if options.gpu in GPUS else None,
        "network": {"name": options.network, "bytes_per_second": network, "source": NETWORKS[options.network].source},
        "images": images,
        "rows": rows,
    }
    write_json(options.out / "plan.json", content)
    write_text(options.out / "plan.md", table + "\n")
    drawn = [plan for plan in plans if plan.memory is not None]
    if drawn:
        save_figure(draw_plans(drawn, machine.memory, f"{title}: predicted"), options.out / "plan.png")
    print(f"plan.json, plan.md{' and plan.png' if drawn else ''} in {options.out}")
    if options.curves:
        curves = []
        with working("planning along the network's bandwidth"):
            for bandwidth in _BANDWIDTHS:
                again = plans_of(config, workload, options.gpus, machine, bandwidth, traces)
                curves += [plan_row(plan, images) | {"network_bandwidth": bandwidth} for plan in again if plan.memory]
        curves.sort(key=lambda row: (row["strategy"] == "expert", row["expert_size"], row["strategy"], row["dense"]))
        write_json(options.out / "plan_curves.json", content | {"rows": curves})
        save_figure(
            draw_network_curves(curves, f"{title.removesuffix(f', {options.network}')}: predicted"),
            options.out / "plan_curves.png",
        )
        print(f"plan_curves.json and plan_curves.png in {options.out}")
    return 0


def _measure_plans(options: argparse.Namespace, argv: list[str]) -> int:
    import torch

    from vmoe.bench.plan import truth
    from vmoe.bench.plan.probes import measure_machine
    from vmoe.bench.report import markdown_table
    from vmoe.cli.benchmark_jobs import Results

    device = choose_device(options.device)
    on_gpu = device.type == "cuda"
    table = Machine.of(gpu_of_this_machine() if on_gpu else "cpu")
    results = Results(["plan", *argv], options.out, device)
    log = results.log("plan")
    log("measuring the rates")
    with working("measuring the rates"):
        measured = measure_machine(table, device)
    cases = [
        truth.PlannedCase(model, experts, images)
        for model in options.models or truth.MEASURED_MODELS
        for experts in options.experts or truth.MEASURED_EXPERTS
        for images in options.images or truth.MEASURED_BATCHES
    ]
    machines = {"table": dataclasses.asdict(table), "measured": dataclasses.asdict(measured)}
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows, tables = [], []
    with working(lambda: f"measuring: {len(rows)} of {len(cases)} models"):
        for row in truth.measured_beside_predicted(cases, options.image_size, table, measured, device, dtype, log):
            rows.append(row)
            tables = [markdown_table(truth.MEASURED_COLUMNS, rows), _rates(table, measured)]
            results.write("measured", dtype, machines | {"rows": rows}, tables)  # kept, should the GPU stop
    write_csv(options.out / "measured.csv", rows)
    print("\n\n".join([results.header["device"], *tables]) + "\n")
    print(f"measured.csv, measured.json and measured.md in {options.out}; {time.monotonic() - results.start:.0f} s")
    return 0


def _rates(table: Machine, measured: Machine) -> str:
    units = {"products": 1e12, "products32": 1e12, "attention": 1e12, "bandwidth": 1e9, "elementwise": 1e9,
             "update": 1e9, "host_call": 1e-6}  # fmt: skip
    names = {1e12: "TFLOP/s", 1e9: "GB/s", 1e-6: "us"}
    lines = ["rate | measured | by table", "---|---:|---:"]
    for name, unit in units.items():
        values = (f"{getattr(machine, name) / unit:.4g} {names[unit]}" for machine in (measured, table))
        lines.append(" | ".join([name, *values]))
    return "\n".join(f"| {line} |" for line in lines)


def _plan_parser() -> argparse.ArgumentParser:
    """The parser of `vmoe plan`. Unknown options may be options of the config."""
    parser = new_parser("plan", __doc__)
    add = parser.add_argument
    add("--config", metavar="YAML", help="a recipe, such as configs/digits.yaml")
    add("--gpus", type=count, default=8, metavar="N", help="processes, one a GPU (default: %(default)s)")
    add("--gpu", default="h100-80g", metavar="NAME", help=f"{', '.join(GPUS)} or cpu (default: %(default)s)")
    add("--network", default=USUAL_NETWORK, metavar="NAME", help=f"{', '.join(NETWORKS)} (default: %(default)s)")
    line = "number of classes, where the data set does not fix it (default: 1000)"
    add("--curves", action="store_true", help="also the time against the network's bandwidth, for every layout")
    add("--classes", type=count, metavar="N", help=line)
    out = Path("runs/plan")
    add("--out", type=Path, default=out, metavar="DIR", help="where results go (default: %(default)s)")
    group = parser.add_argument_group("measuring")
    add = group.add_argument
    add("--measure", action="store_true", help="compare predictions with the GPU here")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--models", nargs="+", metavar="NAME", help="of timm (default: ViT-S/16, B/16 and L/16)")
    line = "of a layer, 0 for dense (default: 0 8 32)"
    add("--experts", nargs="+", type=int, metavar="E", help=line)
    line = "of a step (default: 64 256)"
    add("--images", nargs="+", type=count, metavar="B", help=line)
    add("--image-size", type=count, default=224, metavar="PIXELS", help="side (default: %(default)s)")
    return parser
