"""Writes a page that runs a V-MoE in the browser: a folder that opens from disk or any static host, without a network.

The page holds the program and ONNX Runtime Web as text, since a page from disk cannot fetch files.
"""

import base64
import gzip
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vmoe.checkpoints import TrainedModel, load_checkpoint
from vmoe.data.images import eval_crop
from vmoe.errors import UserError
from vmoe.export.programs import require
from vmoe.export.steered import write_steered
from vmoe.files import new_folder
from vmoe.palette import NUM_COLOURS, expert_hex, page_colours
from vmoe.sizes import size_text
from vmoe.text import counted
from vmoe.version import __version__

RUNTIME = "onnxruntime-web"
RUNTIME_VERSION = "1.30.0"
_RUNTIME_PARTS = {
    "script": "ort.wasm.min.js",
    "mjs": "ort-wasm-simd-threaded.mjs",
    "wasm": "ort-wasm-simd-threaded.wasm",
}
_OURS = ("index.html", "picture.js", "program.js", "maps.js", "main.js")
_MARK_FILE = "about.js"  # a folder with this file may be replaced
_SAMPLE_SIZE = 320  # pixels
LARGEST_PROGRAM = 300 * 2**20  # bytes; as text it is still below the longest string of browsers


def write_demo_page(
    path: str | Path,
    source: str | Path,
    pictures: Iterable[tuple[str, np.ndarray]],
    runtime: str | Path | None = None,
    credit: str | None = None,
) -> None:
    """Writes the folder. If a part is missing, it writes nothing.

    Args:
        path: The folder. An empty one, or one that was written before, is replaced.
        source: A checkpoint file, or a run's or shared folder, of a V-MoE with token choice.
        pictures: The page's samples: names and pictures (H, W, 3) uint8, each read when it is used.
        runtime: The npm package onnxruntime-web, as a .tgz or unpacked; None fetches it with npm.
        credit: A line on the owner of the pictures.

    Raises:
        UserError: The checkpoint cannot be read, the model cannot be shown, the runtime cannot be found or fetched, a
            package is missing, or `path` cannot be written.
    """
    path = Path(path)
    if Path(source).suffix == ".onnx":
        raise UserError(f"{source}: a program records no routing; give the checkpoint it was made from")
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / _MARK_FILE).is_file())):
        raise UserError(f"--out {path}: exists and is no demo page; choose another place")
    require("onnx")
    checkpoint = load_checkpoint(source)
    if not isinstance(checkpoint.image_size, int) or checkpoint.crop != "centre":
        raise UserError(
            f"{source}: the demo page shows central squares, and this model takes {size_text(checkpoint.image_size)} "
            f"pixels with crop={checkpoint.crop}; serve it by `vmoe serve`"
        )
    if checkpoint.channels is not None:
        raise UserError(
            f"{source}: browsers read RGB of 8 bits, and this model reads pictures by data.channels="
            f"{checkpoint.channels}; serve it by `vmoe serve`"
        )
    samples = [{"name": name, "content": _sample(pixels, checkpoint.image_size)} for name, pixels in pictures]
    with new_folder(path) as folder:
        with tempfile.TemporaryDirectory() as scratch:
            parts = _runtime(None if runtime is None else Path(runtime), Path(scratch))
            program = Path(scratch) / "model.onnx"
            about = write_steered(program, checkpoint)
            _check_size(program, checkpoint)
            model = _packed(program.read_bytes())
        assets = files("vmoe.serve") / "page"
        for name in _OURS:
            (folder / name).write_bytes((assets / name).read_bytes())
        style = page_colours() + (assets / "page.css").read_text(encoding="utf-8")
        (folder / "page.css").write_text(style, encoding="utf-8")
        elements = files("vmoe.explain.page") / "assets" / "elements.js"
        (folder / elements.name).write_bytes(elements.read_bytes())
        (folder / "ort.js").write_bytes(parts["script"])
        _write_script(folder / "runtime.js", "RUNTIME", {key: _packed(parts[key]) for key in ("mjs", "wasm")})
        _write_script(folder / "model.js", "MODEL", model)
        _write_script(
            folder / _MARK_FILE, "ABOUT", about | _page_words(checkpoint, about, credit) | {"samples": samples}
        )


def _check_size(program: Path, checkpoint: TrainedModel) -> None:
    size = sum(part.stat().st_size for part in program.parent.glob(f"{program.name}*"))  # weights may be separate files
    if size > LARGEST_PROGRAM:
        raise UserError(
            f"{checkpoint.path}: {size / 2**20:,.0f} MiB as a program; a page holds {LARGEST_PROGRAM // 2**20}: "
            "choose a smaller model"
        )


def _page_words(checkpoint: TrainedModel, about: dict[str, Any], credit: str | None) -> dict[str, Any]:
    first = about["layers"][0]
    answer = "It names every picture as one of its classes."
    if checkpoint.multi_label:
        answer = "A picture may have several of them, or none: it names those that reach their thresholds."
    order = "by descending gate" if first["batch_priority"] else "in reading order"
    return {
        "thresholds": (checkpoint.thresholds or [0.5] * len(about["class_names"])) if checkpoint.multi_label else None,
        "palette": [expert_hex(expert) for expert in range(NUM_COLOURS)],
        "summary": (
            f"{about['model']} for {checkpoint.config['data']['name']}: {about['image_size']} x {about['image_size']} "
            f"pixels, {counted(len(about['class_names']), 'class', 'classes')}; "
            f"{counted(len(about['layers']), 'layer')} with {counted(first['num_experts'], 'expert')}, "
            f"{first['top_k']} for each patch. {answer}"
        ),
        "notes": (
            f"An expert has one slot for each choice of an image that it can take; choices get slots {order}. "
            f"Written by vmoe {__version__}; runs on ONNX Runtime Web {RUNTIME_VERSION} (Microsoft, MIT licence)."
            + (f" Sample {credit}." if credit else "")
        ),
    }


def _sample(pixels: np.ndarray, image_size: int) -> str:
    """A picture's central square as a JPEG in base64."""
    square = Image.fromarray(eval_crop(pixels, max(_SAMPLE_SIZE, image_size)))
    content = BytesIO()
    square.save(content, "JPEG", quality=90)
    return base64.b64encode(content.getvalue()).decode("ascii")


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")


def _write_script(path: Path, name: str, value: Any) -> None:
    """Writes a script that holds a value. It is pure ASCII, so its encoding is never ambiguous."""
    path.write_text(f"globalThis.{name} = {json.dumps(value, allow_nan=False)};\n", encoding="ascii")


def _runtime(given: Path | None, scratch: Path) -> dict[str, bytes]:
    """The parts of ONNX Runtime Web that the page needs."""
    place = given or _fetch(scratch)
    try:
        if place.is_dir():
            return {key: (place / "dist" / name).read_bytes() for key, name in _RUNTIME_PARTS.items()}
        with tarfile.open(place) as archive:
            members = {key: archive.extractfile(f"package/dist/{name}") for key, name in _RUNTIME_PARTS.items()}
            return {key: member.read() for key, member in members.items()}
    except (OSError, KeyError, AttributeError, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"--runtime {place}: is not the npm package {RUNTIME}; get it by: npm pack {RUNTIME}@{RUNTIME_VERSION}"
        ) from error


def _fetch(scratch: Path) -> Path:
    npm, wanted = shutil.which("npm"), f"{RUNTIME}@{RUNTIME_VERSION}"
    if npm is None:
        raise UserError(f"npm, which fetches {wanted}, is not here; install it, or give --runtime its .tgz")
    done = subprocess.run([npm, "pack", wanted, "--silent"], cwd=scratch, capture_output=True, text=True)
    found = next(scratch.glob("*.tgz"), None)
    if done.returncode or found is None:
        reason = " ".join((done.stderr or done.stdout).split())[:150]
        raise UserError(f"npm pack {wanted}: failed ({reason}); is there a network? Else give --runtime its .tgz")
    return found
