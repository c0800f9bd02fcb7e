"""See, measure and test what the experts do: `python tools/explore.py CKPT --out DIR`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("explore"))
