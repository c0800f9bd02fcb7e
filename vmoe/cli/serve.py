"""\
Serves a model over HTTP and answers waiting requests in batches (pip install 'vmoe[serve]'). MODEL is as for `vmoe
predict`. Only this machine can reach it, unless --host is given. If the environment has VMOE_API_KEY, requests must
send it in the header X-API-Key. Ctrl-C or SIGTERM stops it after the last answer.

  vmoe serve assets/models/cifar100_tiny.safetensors
  curl -F image=@photo.jpg http://127.0.0.1:8000/predict
  curl -F image=@photo.jpg -F top=1 -F routing=true http://127.0.0.1:8000/predict
  curl http://127.0.0.1:8000/health

/docs is a page to read and try the API, /openapi.json its description alone.

A request may also be JSON, with the image's bytes in base64 or a data URL: {"image": "...", "top": 1, "routing": true}.
A bad request gets {"detail": "..."} with its status.
"""

import argparse
import os
import re
import sys
from functools import partial

from vmoe.cli.common import job
from vmoe.cli.options import choose_device, count, new_parser


@job()
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _serve_parser().parse_args(argv)
    from vmoe.serve.server import KEY_VARIABLE, serve

    if options.host != "127.0.0.1" and not os.environ.get(KEY_VARIABLE):
        print(f"--host {options.host}: whoever reaches this machine may ask; set {KEY_VARIABLE}", file=sys.stderr)
    max_bytes = options.max_upload * 2**20
    address = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{options.port}"
    print(f"opens {options.model}; Ctrl-C stops the server", flush=True)
    serve(
        options.model,
        partial(choose_device, options.device),
        options.host,
        options.port,
        options.max_batch,
        max_bytes,
        options.cors,
        when_ready=lambda: print(f"ready: {address}/predict, described at {address}/docs", flush=True),
    )


def _port(text: str) -> int:
    if not (text.isdecimal() and len(text) < 6 and 1024 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1024 to 65535")
    return int(text)


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be as https://example.org, without a path, or *")
    return text


def _serve_parser() -> argparse.ArgumentParser:
    parser = new_parser("serve", __doc__)
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a checkpoint, a folder, a .safetensors or .onnx file, or a name: see `vmoe models`",
    )
    hosts = ("127.0.0.1", "0.0.0.0", "::")
    add("--host", choices=hosts, default=hosts[0], help="where to listen (default: %(default)s, this machine alone)")
    add("--port", type=_port, default=8000, help="default: %(default)s")
    add("--max-batch", type=count, default=32, metavar="B", help="images at once (default: %(default)s)")
    add("--max-upload", type=count, default=10, metavar="MIB", help="of a request (default: %(default)s)")
    line = "origins of pages that may ask from a browser (CORS), such as https://example.org; * for all (default: none)"
    add("--cors", nargs="+", type=_origin, default=[], metavar="ORIGIN", help=line)
    add("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    return parser
