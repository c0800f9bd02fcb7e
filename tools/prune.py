"""Drop or merge experts of a V-MoE: `python tools/prune.py CKPT --keep N --out DIR`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("prune"))
