"""Write a page that runs a V-MoE in the browser: `python tools/demo_page.py MODEL --out DIR`; --help tells more."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("demo-page"))
