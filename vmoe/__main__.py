"""Runs `python -m vmoe JOB ...` as `vmoe JOB ...`."""

import sys

from vmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
