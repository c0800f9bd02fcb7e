"""Make one file of a run's weights: `python tools/consolidate.py RUN --out FILE.safetensors`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("consolidate"))
