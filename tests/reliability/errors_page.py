"""Makes the mistakes and writes down what the tools print.

`python tests/reliability/errors_page.py > docs/errors.md` writes that page again.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is run as a script

from reliability.mistakes import MISTAKES, Mistake
from reliability.spoilt import spoil

from vmoe.cli.main import main

PAGE = """# Errors

This page lists the mistakes that the jobs know, so that you find what a line means. A mistake in an option, a config, a
checkpoint or the data is one line on stderr, `vmoe JOB: error: LINE`, and exit
code 2; nothing is written. Below are {count} kinds of mistakes with their lines, as the tools print them; `…` stands
for words of a library, which change with its version. Whatever ends in a traceback is a bug: please report it.

Exit codes: 0 done; 1 a run of a sweep failed; 2 a mistake; 130 and 143 stopped by Ctrl-C or SIGTERM, where `vmoe train`
can be resumed. A run of several processes of which one is killed ends with torchrun's exit code 1.

```sh
vmoe train --config digits --optim.lrr 3   # vmoe train: error: --optim.lrr: no such option; did you mean optim.lr?
```
{sections}
"""
SECTION = """
## vmoe{job}

| mistake | arguments | line |
|---|---|---|
{rows}
"""


def answer(job: str, mistake: Mistake) -> tuple[int, str]:
    """The exit code and all of stderr, in the folder that `spoil` made."""
    arguments = shlex.split(mistake.arguments)
    with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
        code = main([job, *arguments] if job else arguments)
    return code, told.getvalue()


def line_of(error: str, mistake: Mistake) -> str:
    """The line of docs/errors.md: without the job, and without a library's words."""
    line = error.strip().partition(" error: ")[2]
    return re.sub(mistake.foreign, "…", line, count=1)


def row(mistake: Mistake, line: str) -> str:
    """A row of the page."""
    quoted = f"`` {line} ``" if "`" in line else f"`{line}`"
    cells = [mistake.what, f"`{mistake.arguments}`" if mistake.arguments else "", quoted]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """The whole page; the mistakes are made in a new folder."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        spoil(Path(folder))
        os.chdir(folder)
        try:
            sections = [
                SECTION.format(
                    job=f" {job}".rstrip(),
                    rows="\n".join(row(each, line_of(answer(job, each)[1], each)) for each in mistakes),
                ).rstrip()
                for job, mistakes in MISTAKES.items()
            ]
        finally:
            os.chdir(before)
    count = sum(map(len, MISTAKES.values()))
    return PAGE.format(count=count, sections="\n".join(sections)).rstrip() + "\n"


if __name__ == "__main__":
    importlib.import_module("torch").set_num_threads(1)
    print(page(), end="")
