"""Shared code of all jobs: a user's mistake gives one line and exit code 2, never a traceback."""

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping

from vmoe.cli.main import JOBS
from vmoe.cli.progress import begin_job
from vmoe.cli.threads import let_threads_sleep
from vmoe.errors import UserError
from vmoe.extras import missing_extra
from vmoe.imports import TORCHVISION_IS_BROKEN, breaks_torchvision
from vmoe.memory import is_out_of_memory, memory_line
from vmoe.text import printable, readers_may_leave, replace_what_cannot_be_shown

Job = Callable[[list[str]], int | None]


def job(options: Mapping[str, str] | None = None) -> Callable[[Job], Callable[..., int]]:
    """Turns a function of the arguments into a job's `main`, which `run` calls. Its arguments are optional."""

    def decorate(work: Job) -> Callable[..., int]:
        @functools.wraps(work)
        def main(argv: list[str] | None = None) -> int:
            return run(work, argv, options)

        return main

    return decorate


def run(job: Job, argv: list[str] | None, options: Mapping[str, str] | None = None) -> int:
    """Calls a job and turns a user's mistake into "vmoe JOB: error: LINE" on stderr.

    Args:
        job: A function of the arguments, in a module with the job's name.
        argv: The arguments; None takes those of the process.
        options: This job's names of options that other rooms name differently; see `in_options`.

    Returns:
        The exit code: the job's own or 0; 2 for a user's mistake; 130 for Ctrl-C.
    """
    let_threads_sleep()
    begin_job()
    replace_what_cannot_be_shown()
    module = job.__module__.rpartition(".")[2]
    name = next((name for name in JOBS if name.replace("-", "_") == module), module)
    try:
        with readers_may_leave():
            return job([_with_home(each) for each in (sys.argv[1:] if argv is None else argv)]) or 0
    except UserError as error:
        line = str(error)
    except ValueError as error:
        if not _is_of_config(error):
            raise
        line = str(error)
    except (ImportError, RuntimeError, MemoryError) as error:
        known: str | Exception | None = TORCHVISION_IS_BROKEN if breaks_torchvision(error) else _of_machine(error)
        if known is None and isinstance(error, ModuleNotFoundError):
            known = missing_extra(error.name)
        if known is None:
            raise
        line = str(known)
    except KeyboardInterrupt:
        print(f"vmoe {name}: interrupted", file=sys.stderr)
        return 130
    line = in_options(" ".join(line.split()), options or {})
    print(f"vmoe {name}: error: {printable(line)}", file=sys.stderr)
    return 2


def _of_machine(error: Exception) -> str | None:
    """A line on a failure of this machine, such as a full disk; None for other errors."""
    if is_out_of_memory(error):
        return memory_line(error, "give smaller batches, another device or a smaller model")
    text = str(error)
    if text.startswith("DataLoader worker"):  # the error or its cause names the signal
        end = f"{text} {error.__cause__}".partition("signal: ")[2].partition(".")[0]
        advice = {
            "Killed": "most likely memory ran out: give fewer data.workers or a smaller data.batch_size",
            "Bus error": "shared memory ran out: start a container with --shm-size 1g, or give fewer data.workers",
        }
        why = advice.get(end, "with data.workers=0 the main process shows why")
        return f"data.workers: a process that loads images ended{f' by the signal {end}' * bool(end)}; {why}"
    return None


def _with_home(argument: str) -> str:
    """Replaces a leading ~ by the home folder. A shell leaves it in `--out=~/x` and in quotes."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{os.path.expanduser(value)}"


def in_options(line: str, options: Mapping[str, str]) -> str:
    """`renamed` for a mistake's line. If there are options, all other keys of `data.` are called the run's."""
    line = renamed(line, options)
    return re.sub(r"(?<![\w.-])data\.(?=[a-z])", "the run's data.", line) if options else line


def renamed(line: str, options: Mapping[str, str]) -> str:
    """Replaces config keys and Python arguments in a line by the names of a command's options.

    Args:
        line: Such as "data.root=x: does not exist; give the right folder as data.root".
        options: Such as {"data.root": "--root"}, or {"data.table.label": "--columns label="} where one option takes
            several keys.
    """
    for key, option in options.items():
        name = rf"(?<![\w.-]){re.escape(key)}"
        if option.endswith("="):
            line = re.sub(f"{name}=", option, line)
        line = re.sub(rf"{name}='([^']*)'", rf"{option} \1", line)
        line = re.sub(f"{name}=", f"{option} ", line)
        if "." in key or key.isupper():  # a plain word is an argument only if its value follows
            line = re.sub(rf"{name}\b(?!\.\w)", option + "..." * option.endswith("="), line)
    return line


def _is_of_config(error: ValueError) -> bool:
    """Whether a config dataclass or a layer's capacity raised the error. Any other ValueError is a bug."""
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.name == "__post_init__" for frame in frames):
        return True
    from vmoe.moe.assignment import CapacityError  # here: it imports torch

    return isinstance(error, CapacityError)
