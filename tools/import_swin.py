"""Import a checkpoint of Swin-MoE: `python tools/import_swin.py PATH --out FILE`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("import-swin"))
