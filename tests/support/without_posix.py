"""Imports all of vmoe and trains, with modules hidden that Python lacks on Windows: `python without_posix.py FOLDER`.

They are hidden from vmoe alone: other packages have different code for Windows.
"""

import builtins
import importlib
import os
import pkgutil
import sys
from pathlib import Path

import lightning  # noqa: F401
import psutil  # noqa: F401
import timm  # noqa: F401

import vmoe
from vmoe.errors import UserError

_MODULES = {"fcntl", "grp", "posix", "pwd", "resource", "syslog", "termios"}
_FUNCTIONS = ("fork", "getuid", "killpg", "sched_getaffinity", "setsid", "statvfs", "sysconf", "uname")
_plain_import, _plain_kill = builtins.__import__, os.kill


def _import(name, globals=None, locals=None, fromlist=(), level=0):
    if name in _MODULES and (globals or {}).get("__name__", "").startswith("vmoe"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return _plain_import(name, globals, locals, fromlist, level)


def _kill(pid, number):
    if sys._getframe(1).f_globals["__name__"].startswith("vmoe"):
        raise AssertionError("os.kill(pid, 0) interrupts a process on Windows")
    _plain_kill(pid, number)  # psutil looks for processes with it on this system


def main(folder: Path) -> None:
    builtins.__import__ = _import
    for name in _FUNCTIONS:
        delattr(os, name)
    os.kill = _kill
    for module in pkgutil.walk_packages(vmoe.__path__, "vmoe."):
        importlib.import_module(module.name)
    small = {
        "data.subset.per_class": 4,
        "model.kwargs": {"depth": 2, "embed_dim": 8, "num_heads": 1, "patch_size": 8},
        "trainer.device": "cpu",
        "trainer.loggers": ["csv"],
    }
    run = vmoe.fit("digits", model="vit_tiny_patch16_224", epochs=1, output_dir=folder, options=small)
    from vmoe.training.run.lock import locked

    with locked(folder, print, "the first"):
        try:
            with locked(folder, print, "the second"):
                raise AssertionError("two processes have one folder")
        except UserError as refusal:
            print(f"peak {run.summary['peak_memory_mib']:.0f} MiB; refused: {refusal}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
