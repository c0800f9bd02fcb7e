"""Memory and time of a config on many GPUs: `python tools/plan.py --config X.yaml --gpus 64`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("plan"))
