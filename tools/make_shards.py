"""Tar shards from a folder of images: `python tools/make_shards.py FOLDER --out DIR`; --help tells more."""

from vmoe.cli.make_shards import main

raise SystemExit(main())
