"""See, measure and test what the experts do: `python tools/explore.py CKPT --out DIR`; --help tells more."""

from vmoe.cli.explore import main

raise SystemExit(main())
