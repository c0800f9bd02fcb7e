"""Train a model from a config: `python tools/train.py --config configs/digits.yaml`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("train"))
