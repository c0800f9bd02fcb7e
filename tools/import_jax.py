"""Import a checkpoint of the original JAX code: `python tools/import_jax.py PREFIX --out FILE`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("import-jax"))
