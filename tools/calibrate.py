"""Calibrate a checkpoint: `python tools/calibrate.py CKPT --out FILE.safetensors`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("calibrate"))
