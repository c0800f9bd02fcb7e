"""Measure a checkpoint: `python tools/evaluate.py CKPT`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("evaluate"))
