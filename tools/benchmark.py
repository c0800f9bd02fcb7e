"""Measure layers, models, data and several processes here: `python tools/benchmark.py layer`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("benchmark"))
