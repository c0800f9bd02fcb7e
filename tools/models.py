"""List the models that open by name: `python tools/models.py`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("models"))
