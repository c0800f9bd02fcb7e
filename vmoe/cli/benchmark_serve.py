"""The job `vmoe benchmark serve`: measures a running server and writes the results."""

import argparse

import torch

from vmoe.bench.report import markdown_table
from vmoe.bench.serving import SERVING_COLUMNS, damaged, find_target, measure_server, photograph
from vmoe.cli.benchmark_jobs import Results


def benchmark_server(options: argparse.Namespace, results: Results) -> None:
    """Measures a running server under load and with damaged uploads."""
    target, picture = find_target(options.url), photograph()
    measure_server(target, [picture] * 20, 1, range(200, 201))  # a warm-up
    rows = []
    for clients in options.clients:
        results.log(options.url)(f"{clients} clients")
        row = measure_server(target, [picture] * options.requests, clients, range(200, 201))
        rows.append({"uploads": "a photograph"} | row)
    broken = damaged(picture, options.requests, options.seed)
    # a slightly damaged copy may still be readable
    rows.append({"uploads": "damaged"} | measure_server(target, broken, options.clients[-1], range(200, 500)))
    table = markdown_table(SERVING_COLUMNS, rows)
    print(table)
    results.write("serve", torch.float32, {"url": options.url, "rows": rows}, [table])
    print(f"\nserve.json and serve.md in {options.out}")
