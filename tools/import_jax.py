"""Import a checkpoint of the original JAX code: `python tools/import_jax.py PREFIX --out FILE`; --help tells more."""

from vmoe.cli.import_jax import main

raise SystemExit(main())
