"""Write a checkpoint as a file to share: `python tools/export.py CKPT --out FILE`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("export"))
