"""Of two processes in one run's folder the second is refused; what a process left that is gone is taken over."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vmoe.cli.train import main
from vmoe.errors import UserError
from vmoe.training.run import lock
from vmoe.training.run.lock import LOCK, locked

RUN = [
    "--data.name",
    "digits",
    "--moe",
    "null",
    "--model.kwargs",
    "{depth: 1, embed_dim: 8, num_heads: 1, patch_size: 8}",
]
RUN += ["--data.subset.per_class", "4", "--trainer.epochs", "1", "--trainer.device", "cpu"]


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder until it is ended."""
    code = "import sys, time; from pathlib import Path; from vmoe.training.run.lock import locked\n"
    code += "with locked(Path(sys.argv[1]), print, 'vmoe train --seed 3'): print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_process_is_refused_and_a_dead_one_s_lock_is_taken_over(tmp_path, holder, capsys):
    folder = tmp_path / "run"
    before = (folder / LOCK).read_text()
    assert main([*RUN, "--output_dir", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"process {holder.pid} on {os.uname().nodename} trains there since" in error
    assert "(vmoe train --seed 3)" in error
    assert (folder / LOCK).read_text() == before
    holder.kill()  # leaves its lock
    holder.wait()
    assert (folder / LOCK).exists()
    assert main([*RUN, "--output_dir", str(folder)]) == 0
    assert (folder / "summary.json").exists() and not (folder / LOCK).exists()


def test_a_process_of_the_same_number_is_another(tmp_path):
    with locked(tmp_path, print, "vmoe train"):
        content = json.loads((tmp_path / LOCK).read_text())
        with pytest.raises(UserError, match=f"process {os.getpid()} "), locked(tmp_path, print, "vmoe train"):
            pass
    (tmp_path / LOCK).write_text(json.dumps(content | {"started": "1"}))
    with locked(tmp_path, print, "vmoe train"):
        assert json.loads((tmp_path / LOCK).read_text())["started"] == content["started"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_process_elsewhere_is_known_by_its_signs_of_life(tmp_path, monkeypatch, is_there):
    monkeypatch.setattr(lock, "PATIENCE", 0.4)
    with locked(tmp_path, print, "vmoe train"):
        content = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps(content | {"host": "elsewhere"}))
    ended = threading.Event()
    if is_there:
        monkeypatch.setattr(lock, "BEAT", 0.1)
        threading.Thread(target=lock._beat, args=(tmp_path / LOCK, ended), daemon=True).start()
    told = []
    try:
        if is_there:
            with (
                pytest.raises(UserError, match="on elsewhere trains there"),
                locked(tmp_path, told.append, "vmoe train"),
            ):
                pass
        else:
            with locked(tmp_path, told.append, "vmoe train"):
                assert json.loads((tmp_path / LOCK).read_text())["host"] == content["host"]
    finally:
        ended.set()
    assert "elsewhere; waits 0 s for a sign of life" in told[0]


def test_of_many_that_take_over_one_does(tmp_path):
    with locked(tmp_path, print, "vmoe train"):
        content = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps(content | {"started": "1"}))
    begun, results = threading.Barrier(8), []

    def take():
        begun.wait()
        try:
            with locked(tmp_path, print, "vmoe train"):
                while len(results) < 7:  # until the others are refused
                    time.sleep(0.01)
                results.append(True)
        except UserError:
            results.append(False)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]


def test_what_was_made_for_a_refused_run_is_removed(tmp_path, capsys):
    assert main([*RUN, "--output_dir", str(tmp_path / "a" / "b"), "--data.image_size", "9"]) == 2
    assert "patch size" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    assert main([*RUN, "--output_dir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


@pytest.mark.slow  # a process of its own imports torch
def test_a_run_trains_without_what_windows_lacks(tmp_path):
    pytest.importorskip("psutil")
    script = Path(__file__).parents[1] / "support" / "without_posix.py"
    done = subprocess.run([sys.executable, script, tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, refused = done.stdout.splitlines()[-1].split("; ")[:2]
    assert float(peak.split()[1]) > 100 and "trains there since" in refused
    assert not (tmp_path / "run" / LOCK).exists()
