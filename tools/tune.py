"""Search for good options: `python tools/tune.py digits --out DIR --search ...`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("tune"))
