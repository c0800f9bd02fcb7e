"""Every mistake of the table is one line and exit code 2, names only options that the command has, writes nothing, and
is in docs/errors.md as it is printed.
"""

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from reliability.errors_page import answer, line_of, row
from reliability.mistakes import MISTAKES, Mistake
from reliability.spoilt import spoil

import vmoe
from vmoe.cli.main import JOBS, main
from vmoe.cli.short_help import SHORT
from vmoe.training.config import TrainConfig
from vmoe.training.options import option_names

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| mistake |")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("spoilt")
    spoil(path)
    return path


def _state(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("job", "mistake"),
    [
        pytest.param(job, mistake, id=f"{job}: {mistake.what}")
        for job, mistakes in MISTAKES.items()
        for mistake in mistakes
    ],
)
def test_a_mistake_is_the_documented_line(folder, monkeypatch, job, mistake):
    monkeypatch.chdir(folder)
    before = _state(folder)
    code, error = answer(job, mistake)
    assert code == 2, error
    assert error.startswith(f"vmoe {job}: error: " if job else "vmoe: error: ") and error.count("\n") == 1
    assert _state(folder) == before, "something was written"
    assert_names_what_is_there(job, mistake, line_of(error, mistake))
    found = row(mistake, line_of(error, mistake))
    assert found in ROWS, f"now {found}; to renew the page: python tests/reliability/errors_page.py > docs/errors.md"


def assert_names_what_is_there(job: str, mistake: Mistake, line: str) -> None:
    """A line names no option, key or word that its own command does not take; `vmoe JOB ...` is of another one."""
    arguments = mistake.arguments.split()
    sub_job = arguments[:1] if job == "benchmark" and "layers" not in arguments else []
    text = help_of(job, *sub_job)
    options = set(re.findall(r"--[a-z][\w-]*", text))
    takes_keys = job in ("train", "plan", "distill", "data", "tune") or sub_job == ["data"]
    if takes_keys:
        options |= {f"--{name}" for name in (*option_names(TrainConfig), "config", "print_config", "resume")}
    elsewhere = re.sub(r"`[^`]*`|'[^']*'|\.NAME\b", "", line)
    unknown = [option for option in re.findall(r"--[a-z][\w.-]*\w", elsewhere) if option not in options]
    assert not [name for name in unknown if name not in arguments and not name.startswith("--model.kwargs.")], line
    if not takes_keys and not line.startswith(tuple(f"{argument}:" for argument in arguments)):
        keys = re.sub(r"the run's \S+", "", elsewhere)
        assert not re.search(r"\b(data|model|moe|optim|trainer|parallel)\.[a-z_]+", keys), line
        plain = re.match(r"(\w+)=", line)
        assert not (plain and f"--{plain[1].replace('_', '-')}" in options), line
    if word := re.match(r"([A-Z]+): ", line):
        assert word[1] in text, line


@cache
def help_of(job: str, *sub_job: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit):
        main([*([job] if job else []), *sub_job, "--help-all" if job in SHORT else "--help"])
    return told.getvalue()


def test_the_page_tells_of_nothing_else():
    assert len(ROWS) == sum(map(len, MISTAKES.values())) >= 80


def _messages(file: Path) -> Iterator[str]:
    """The texts of the errors that a file raises, with their literal parts only."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "ArgumentTypeError"):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield re.sub(r"`[^`]*`", "", part.value)


@cache
def options_of_jobs() -> dict[str, set[str]]:
    """The options of each job, and of training where they are passed on."""
    of_training = {f"--{name}" for name in (*option_names(TrainConfig), "config", "resume")}
    options = {job: set(re.findall(r"--[a-z][\w-]*", help_of(job))) | of_training for job in JOBS}
    for sub_job in ("layer", "model", "data", "serve", "scaling"):
        options["benchmark"] |= set(re.findall(r"--[a-z][\w-]*", help_of("benchmark", sub_job)))
    return options


def test_no_message_names_an_option_that_no_command_has():
    """A job's own file names its own options; other rooms, whose callers vary, an option of some job."""
    package = Path(vmoe.__file__).parent
    options = options_of_jobs()
    every = set().union(*options.values())
    for file in package.rglob("*.py"):
        known = options.get(file.stem.replace("_", "-"), every) if file.parent.name == "cli" else every
        for message in _messages(file):
            found = re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", message)
            assert not [option for option in found if option not in known], (file, message)


def test_no_page_shows_an_option_that_its_job_has_not():
    root = Path(__file__).parents[2]
    for path in (root / "README.md", *(root / "docs").rglob("*.md")):
        blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            command = re.search(r"(?:vmoe |tools/)([a-z][\w-]*)(?:\.py)?([^#]*)", line)
            if command and command[1] in JOBS and path.name != "errors.md":
                for option in re.findall(r"(?<=\s)--[a-z][\w.-]*", command[2]):
                    known = options_of_jobs()[command[1]] | {"--help", "--help-all"}
                    assert option in known or option.startswith("--model.kwargs."), (path.name, line)
