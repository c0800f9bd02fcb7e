"""Train a dense student of a V-MoE: `python tools/distill.py CKPT --out DIR`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("distill"))
