"""Put runs side by side: `python tools/compare.py RUN_A RUN_B --out DIR`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("compare"))
