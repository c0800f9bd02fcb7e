"""Group classes by confusion: `python tools/super_classes.py CKPT --count E --out FILE`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("super-classes"))
