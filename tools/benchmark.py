"""Measure layers, models, data and several processes here: `python tools/benchmark.py layer`; --help tells more."""

from vmoe.cli.benchmark import main

raise SystemExit(main())
