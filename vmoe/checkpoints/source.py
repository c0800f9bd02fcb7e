"""What stands for a model: a path, or the name or address of one that is fetched once. Every job asks here."""

import hashlib
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vmoe.checkpoints.hub import HUB, fetch, require_network
from vmoe.errors import UserError

_LOCAL = "local-dir:"  # timm's word for a folder
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_OF_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_OUR_FILES = (".ckpt", ".safetensors", ".onnx", ".pt2", ".pth", ".pt", ".npz")


def local_path(source: str | Path) -> Path:
    """The file or folder that stands for a model, which is fetched first where it is not on this machine.

    Args:
        source: A path; the name of a released model (`vmoe.models.released`); https://....safetensors; a repository of
            the hub, hf-hub:USER/NAME or, where no such path exists, USER/NAME, each with @REVISION or without.

    Returns:
        A path, which need not be there where `source` is one.

    Raises:
        UserError: it cannot be fetched.
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
            raise UserError(f"{text}: no such file or folder here, and as a name of the hub {line}") from error
    return path


def is_remote(source: str | Path) -> bool:
    """Whether a model lies behind a name or an address, so that no result is to be written beside it."""
    text = str(source)
    if text.startswith(HUB) or _ADDRESS.match(text):
        return True
    from vmoe.models.released import is_released

    return not Path(text).expanduser().exists() and (is_released(text) or _is_of_hub(text))


def _is_of_hub(text: str) -> bool:
    """Whether a text may name a repository of the hub: a file in a folder of this machine does not."""
    return (
        _OF_HUB.fullmatch(text) is not None and not text.lower().endswith(_OUR_FILES) and not Path(text).parent.exists()
    )


def _fetch_file(address: str) -> Path:
    """A file of weights behind an address, in torch.hub's folder.

    Raises:
        UserError: it is no .safetensors file, or cannot be fetched.
    """
    name = Path(unquote(urlsplit(address).path)).name
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
                fetch_file(address, path)
    return path
