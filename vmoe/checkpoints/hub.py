"""A trained model on the Hugging Face hub, by its name: fetched once into the hub's own cache."""

from pathlib import Path

from vmoe.errors import UserError

HUB = "hf-hub:"


def fetch(name: str) -> Path:
    """The weights of a folder that `vmoe export --format hub` wrote and somebody pushed to the hub.

    huggingface_hub fetches them: it keeps its cache, its environment variables and its offline mode.

    Args:
        name: hf-hub:USER/NAME, or hf-hub:USER/NAME@REVISION for a branch, a tag or a commit.

    Raises:
        UserError: the hub has no such repository, file or revision, or cannot be reached and its cache has no copy.
    """
    from huggingface_hub import hf_hub_download

    # A path of Windows has turned the slash
    repository, _, revision = name.removeprefix(HUB).replace("\\", "/").partition("@")
    try:
        return Path(hf_hub_download(repository, "model.safetensors", revision=revision or None))
    except Exception as error:  # the client raises any type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name}: its model.safetensors cannot be fetched ({reason})") from error
