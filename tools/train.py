"""Train a model from a config: `python tools/train.py --config configs/digits.yaml`; --help tells more."""

from vmoe.cli.train import main

raise SystemExit(main())
