"""Train a dense student of a V-MoE: `python tools/distill.py CKPT --out DIR`; --help tells more."""

from vmoe.cli.distill import main

raise SystemExit(main())
