"""A sheet of the images that a model is trained on: `python tools/data.py show --config NAME`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("data"))
