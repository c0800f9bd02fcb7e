"""The version, which the build reads without importing torch, and the versions on which a result depends."""

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """The versions on which a result depends, by package; Lightning's if it is installed."""
    import contextlib
    import importlib.metadata
    import platform

    import timm
    import torch

    found = {"vmoe": __version__, "python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # from the extra `train`
        found["lightning"] = importlib.metadata.version("lightning")
    return {**found, "timm": timm.__version__}
