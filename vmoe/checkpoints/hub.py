"""Fetches a trained model from the Hugging Face hub by its name, once, into the hub's own cache."""

from pathlib import Path

from vmoe.errors import UserError

HUB = "hf-hub:"
_REASONS = {  # by the client's errors, whose own words are several lines
    "LocalEntryNotFoundError": "the hub cannot be reached, and its cache has no copy; check the network",
    "RepositoryNotFoundError": "the hub has no such model, or it is private; `hf auth login` opens your own",
    "RevisionNotFoundError": "it has no such branch, tag or commit",
    "RemoteEntryNotFoundError": "it has no such file; `vmoe export --format hub --push` writes it",
    "EntryNotFoundError": "it has no such file; `vmoe export --format hub --push` writes it",
}


def fetch(name: str) -> Path:
    """The path of the weights in a hub repository with a folder of `vmoe export --format hub`.

    huggingface_hub fetches them, with its own cache, environment variables and offline mode.

    Args:
        name: USER/NAME, or USER/NAME@REVISION for a branch, a tag or a commit; hf-hub: may come before it.

    Raises:
        UserError: The hub has no such repository, file or revision, or it cannot be reached and its cache has no copy.
    """
    from huggingface_hub import hf_hub_download

    # a path on Windows has turned the slash
    repository, _, revision = name.removeprefix(HUB).replace("\\", "/").partition("@")
    try:
        return Path(hf_hub_download(repository, "model.safetensors", revision=revision or None))
    except Exception as error:  # the client raises any type
        kind = type(error).__name__
        if kind == "LocalEntryNotFoundError":
            require_network(name)
        reason = _REASONS.get(kind) or " ".join(str(error).split())[:200] or kind
        raise UserError(f"{name}: its model.safetensors cannot be fetched ({reason})") from error


def require_network(name: str) -> None:
    """Refuses to fetch a model in huggingface_hub's offline mode, which all models by name keep.

    Raises:
        UserError: HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{name}: HF_HUB_OFFLINE forbids to fetch it, and it is not here yet; unset HF_HUB_OFFLINE once"
        )
