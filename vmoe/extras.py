"""The extras of this package, their packages, and the message with the command that installs a missing one.

`pip install vmoe` is enough for layers, models, records of routing, loading and prediction. A job or a room that needs
more calls `require_extras` before it imports anything.
"""

import importlib.util

from vmoe.errors import UserError

# The imported modules of each extra in pyproject.toml. A module may be in several extras.
EXTRAS = {
    "train": ("lightning", "torchmetrics", "albumentations", "cv2", "jsonargparse", "rich", "scipy"),
    "analysis": ("matplotlib", "scipy"),
    "tune": ("optuna", "matplotlib"),
    "cluster": ("sklearn",),
    "jax": ("msgpack",),
    "loggers": ("tensorboard", "wandb", "mlflow"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "serve": ("litserve", "multipart"),
    "webdataset": ("webdataset", "braceexpand", "fsspec"),
    "data": ("pyarrow", "datasets", "tifffile", "imagecodecs"),
    "completion": ("argcomplete",),
}


class MissingExtraError(UserError, ImportError):
    """A package of an extra is not installed. The message has the command that installs it; `name` is the module."""


def require_extras(*extras: str) -> None:
    """Checks that the packages of these extras are installed, without importing them.

    Raises:
        MissingExtraError: A package is missing.
    """
    missing = {module: extra for extra in extras for module in EXTRAS[extra] if not _is_installed(module)}
    if missing:
        raise _error(list(missing), sorted(set(missing.values())))


def require_module(module: str) -> None:
    """Checks that one package of an extra is installed, if the others of this extra are not needed.

    Raises:
        MissingExtraError: It is missing.
    """
    if not _is_installed(module):
        raise missing_extra(module) or ModuleNotFoundError(f"No module named {module!r}", name=module)


def missing_extra(module: str | None) -> MissingExtraError | None:
    """The error for a missing module, with the extra that contains it; None if no extra does."""
    package = (module or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if package in modules), None)
    return None if extra is None else _error([package], [extra])


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _error(modules: list[str], extras: list[str]) -> MissingExtraError:
    listed = ", ".join(modules[:-1]) + " and " * (len(modules) > 1) + modules[-1]
    verb = "is" if len(modules) == 1 else "are"
    line = f"this needs {listed}, which {verb} not installed: pip install 'vmoe[{','.join(extras)}]'"
    error = MissingExtraError(line)
    error.name = modules[0]
    return error
