"""A sheet of the images that a model is trained on: `python tools/data.py show --config NAME`; --help tells more."""

from vmoe.cli.data import main

raise SystemExit(main())
