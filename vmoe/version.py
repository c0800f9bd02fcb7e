"""The version, which the build reads without importing torch, and those of what a result depends on."""

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """The versions that decide a result, by package; lightning's where it is installed."""
    import contextlib
    import importlib.metadata
    import platform

    import timm
    import torch

    found = {"vmoe": __version__, "python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # it comes with the extra `train`
        found["lightning"] = importlib.metadata.version("lightning")
    return {**found, "timm": timm.__version__}
