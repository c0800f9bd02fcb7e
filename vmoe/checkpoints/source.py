"""Resolves a model's source to a path, for every job: a path, or a name or address that is downloaded once."""

import hashlib
import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from vmoe.checkpoints.hub import HUB, fetch, require_network
from vmoe.errors import UserError

_LOCAL = "local-dir:"  # timm's prefix for a folder
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_OF_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_IN_ADDRESSES = "%/:?#[]@!$&'()*+,;="  # what stays as it is; a browser also shows spaces and letters of any language
_OUR_FILES = (".ckpt", ".safetensors", ".onnx", ".pt2", ".pth", ".pt", ".npz")


def local_path(source: str | Path) -> Path:
    """The file or folder of a model, downloaded if needed.

    Args:
        source: A path; the name of a released model (`vmoe.models.released`); https://....safetensors; a repository of
            the hub, hf-hub:USER/NAME or, if no such path exists, USER/NAME, each with or without @REVISION.

    Returns:
        A path. It may not exist if `source` is a path.

    Raises:
        UserError: It cannot be downloaded.
    """
    text = str(source)
    if text.startswith(HUB):
        return fetch(text)
    if _ADDRESS.match(text):
        return _fetch_file(text)
    path = Path(text.removeprefix(_LOCAL)).expanduser()
    if path.exists() or path.is_symlink():
        return path
    from vmoe.models.released import is_released

    if is_released(text):
        from vmoe.checkpoints.released import fetch_released

        return fetch_released(text)
    if _is_of_hub(text):
        try:
            return fetch(text)
        except UserError as error:
            line = str(error).removeprefix(f"{text}: ")
            raise UserError(f"{text}: no such file or folder here; from the hub: {line}") from error
    return path


def is_remote(source: str | Path) -> bool:
    """Whether a model is given by a name or an address. Then no result can be written beside it."""
    text = str(source)
    if text.startswith(HUB) or _ADDRESS.match(text):
        return True
    from vmoe.models.released import is_released

    return not Path(text).expanduser().exists() and (is_released(text) or _is_of_hub(text))


def _is_of_hub(text: str) -> bool:
    """Whether a text may name a repository of the hub, and not a file in a folder of this machine."""
    return (
        _OF_HUB.fullmatch(text) is not None and not text.lower().endswith(_OUR_FILES) and not Path(text).parent.exists()
    )


def _fetch_file(address: str) -> Path:
    """Downloads a file of weights from an address to torch.hub's folder, and returns its path.

    Raises:
        UserError: It is no .safetensors file, or cannot be downloaded.
    """
    try:
        name = Path(unquote(urlsplit(address).path)).name
    except ValueError as error:
        raise UserError(f"{address}: is no address ({error})") from error
    if not name.endswith(".safetensors"):
        raise UserError(f"{address}: must end in .safetensors, the one kind of file that is opened from an address")
    import torch

    from vmoe.checkpoints.downloading import fetch_file, one_process_in

    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    path = Path(torch.hub.get_dir()) / "checkpoints" / "vmoe" / "addresses" / digest / name
    if not path.is_file():
        require_network(address)
        with one_process_in(path.parent):
            if not path.is_file():
                new = path.with_name(f"new.{name}")
                fetch_file(quote(address, safe=_IN_ADDRESSES), new)
                _require_safetensors(new, address)
                new.replace(path)
    return path


def _require_safetensors(path: Path, address: str) -> None:
    """Removes a downloaded file that is no whole safetensors file, so that it is downloaded again.

    Raises:
        UserError: It is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return
    except SafetensorError as error:
        path.unlink()
        reason = " ".join(str(error).split())
        raise UserError(f"{address}: no safetensors file came, or a damaged one ({reason}); run this again") from error
