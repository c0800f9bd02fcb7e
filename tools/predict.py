"""Name what is in pictures: `python tools/predict.py MODEL IMAGE_OR_FOLDER...`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("predict"))
