"""Measure a checkpoint: `python tools/evaluate.py CKPT`; --help tells more."""

from vmoe.cli.evaluate import main

raise SystemExit(main())
