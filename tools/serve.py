"""Answer over HTTP what is in pictures: `python tools/serve.py MODEL`; --help tells more."""

from vmoe.cli.main import run_job

if __name__ == "__main__":  # the server's workers import this file, too
    raise SystemExit(run_job("serve"))
