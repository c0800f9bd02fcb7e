"""Draw where each patch of an image goes: `python tools/heatmap.py CKPT IMAGE... --out DIR`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("heatmap"))
