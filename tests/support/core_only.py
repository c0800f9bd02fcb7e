"""Runs a program with only the packages of `pip install vmoe`, whatever else is installed.

`python tests/support/core_only.py "DISTRIBUTION ..." PROGRAM ARGUMENT...` allows further distributions.
"""

import importlib.metadata
import re
import sys
from importlib.abc import MetaPathFinder

from packaging.requirements import Requirement

CORE = ("torch", "torchvision", "timm", "safetensors", "numpy", "pillow", "pyyaml", "tqdm")


def hide_all_but(*distributions: str) -> None:
    """Hides all packages from imports, except those of these distributions and of their dependencies."""
    kept = _with_dependencies(distributions) | {"vmoe"}
    hidden = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not kept & {_plain(owner) for owner in owners}
    }
    sys.meta_path[:] = [_Hiding(finder, hidden, kept) for finder in sys.meta_path]


class _Hiding:
    """A finder that hides some packages, as if they were not installed."""

    def __init__(self, finder: MetaPathFinder, hidden: set[str], kept: set[str]) -> None:
        self._finder, self._hidden, self._kept = finder, hidden, kept

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self._hidden:
            return None
        return self._finder.find_spec(fullname, path, target)

    def find_distributions(self, *context):
        for each in self._finder.find_distributions(*context) if hasattr(self._finder, "find_distributions") else ():
            if _plain(each.metadata["Name"]) in self._kept:
                yield each

    def __getattr__(self, name):
        return getattr(self._finder, name)


def _with_dependencies(names) -> set[str]:
    found: set[str] = set()
    waiting = [_plain(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        requirements = map(Requirement, lines)
        waiting += [
            _plain(each.name) for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})
        ]
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    hide_all_but(*CORE, *sys.argv[1].split())
    del sys.argv[:2]
    exec(sys.argv[0], {"__name__": "__main__"})  # in a process of its own
