"""Train a study's arms: `python tools/sweep.py configs/studies/cifar100.yaml --out DIR`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("sweep"))
