"""Put runs side by side: `python tools/compare.py RUN_A RUN_B --out DIR`; --help tells more."""

from vmoe.cli.compare import main

raise SystemExit(main())
