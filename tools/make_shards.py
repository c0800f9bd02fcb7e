"""Tar shards from a folder of images: `python tools/make_shards.py FOLDER --out DIR`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("make-shards"))
