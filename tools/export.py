"""Write a checkpoint as a file to share: `python tools/export.py CKPT --out FILE`; --help tells more."""

from vmoe.cli.export import main

raise SystemExit(main())
