"""`python -m vmoe JOB ...` is `vmoe JOB ...`."""

import sys

from vmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
