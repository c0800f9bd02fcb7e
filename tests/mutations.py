"""Breaks routing, losses, capacity, resumption and the count of FLOPs in small ways, and sees whether tests notice.

    python tests/mutations.py            # all, a few minutes
    python tests/mutations.py capacity   # those whose name begins so

Works on a copy of the tracked files. Exit code 1 if a mutation survives that is not explained below.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
SECONDS = 1200  # on a machine that is busy too; a mutation that hangs is not caught, but seen


class Mutation(NamedTuple):
    """A change of one place, the tests that should fail, and, of one that none can notice, why."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    survives: str = ""


TESTS = {
    "layer": ["test_parity", "test_routers", "test_slot_routers", "test_auxiliary_loss", "test_layer"],
    "resume": ["test_resume", "test_training"],
    "training": ["test_training"],
    "cost": ["test_cost"],
}
FOLDERS = {"layer": "moe", "resume": "training", "training": "training", "cost": "models"}
MUTATIONS = [Mutation(**entry) for entry in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())]


def main() -> int:
    """Tries the mutations, prints a line each, and gives the exit code."""
    wanted = [mutation for mutation in MUTATIONS if mutation.name.startswith(tuple(sys.argv[1:]) or "")]
    unexplained = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for mutation in wanted:
            start = time.monotonic()
            is_caught = _is_caught(copy, mutation)
            outcome = "caught" if is_caught else f"SURVIVES: {mutation.survives or 'unexplained'}"
            print(f"{mutation.name}: {outcome} ({time.monotonic() - start:.0f} s)", flush=True)
            unexplained += not is_caught and not mutation.survives
    print(f"{len(wanted)} mutations, {unexplained} unexplained survivors")
    return 1 if unexplained else 0


def _is_caught(copy: Path, mutation: Mutation) -> bool:
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) < 1:
        raise SystemExit(f"{mutation.name}: {mutation.file} no longer holds {mutation.old!r}; mend this script")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [f"tests/{FOLDERS[mutation.tests]}/{name}.py" for name in TESTS[mutation.tests]]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=SECONDS)
        return done.returncode == 1  # 2 and more: pytest could not run
    except subprocess.TimeoutExpired:
        print(f"{mutation.name}: the tests took longer than {SECONDS} s")
        return False
    finally:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
