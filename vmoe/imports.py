"""Keeps `import vmoe` fast: names of packages are imported at their first use.

torch and timm take seconds to import, and neither `vmoe JOB --help` nor a mistyped option needs them.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from vmoe.extras import missing_extra

TORCHVISION_IS_BROKEN = (
    "torchvision was built for another torch; install both again: pip install --upgrade torch torchvision"
)
_REGISTRIES = ("vmoe.models.registry", "vmoe.checkpoints.released")


def names_on_demand(
    package: str, modules: Mapping[str, Sequence[str]], inner: Sequence[str] = ()
) -> Callable[[str], Any]:
    """A package's `__getattr__`, which imports a name at its first use.

    The function raises a `MissingExtraError` if a name needs an extra that is not installed.

    Args:
        package: The package.
        modules: Its names, by the module that defines them.
        inner: Its subpackages that are also names.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name in inner:
            return importlib.import_module(f"{package}.{name}")
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(importlib.import_module(module_of[name]), name)
        except ModuleNotFoundError as error:
            raise missing_extra(error.name) or error from None
        setattr(sys.modules[package], name, value)
        return value

    return get


def register_with_timm() -> None:
    """Registers our models in timm: now if timm is imported, else right after its import."""
    if "timm" in sys.modules:
        _register_all()
    else:
        sys.meta_path.insert(0, _TimmFinder())


def _register_all() -> None:
    for module in _REGISTRIES:
        importlib.import_module(module)


class _TimmFinder(MetaPathFinder):
    """Finds timm through the other finders, and registers our models once it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of timm, and None for any other module."""
        if fullname != "timm":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                _require_torchvision()  # timm imports it
                load(module)
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                _register_all()

            spec.loader.exec_module = load_and_register  # for this spec alone
        return spec


def _require_torchvision() -> None:
    """Imports torchvision.

    Raises:
        ImportError: It was built for another torch.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if not breaks_torchvision(error):
            raise
        raise ImportError(TORCHVISION_IS_BROKEN, name="torchvision") from error


def breaks_torchvision(error: Exception) -> bool:
    """Whether torchvision was built for another torch, such as in "operator torchvision::nms does not exist"."""
    return "torchvision::" in str(error) or (isinstance(error, ImportError) and error.name == "torchvision")
