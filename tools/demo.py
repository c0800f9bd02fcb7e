"""Shows a trained V-MoE's routing on photographs, then trains one on handwritten digits. Needs no download."""

from vmoe.cli.main import run_job

raise SystemExit(run_job("demo"))
