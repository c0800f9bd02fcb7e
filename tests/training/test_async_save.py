"""parallel.async_save: training goes on while a checkpoint is written, and every promise of a checkpoint is kept."""

import re
import signal
import time
from pathlib import Path

import pytest
from support.forks import run_forked
from support.parallel_runs import TINY, assert_close, assert_same_run, launch, strategy_options, tensors, train_forked

from vmoe.checkpoints import ENTRY, RunFolder, read_checkpoint
from vmoe.config_values import from_plain
from vmoe.errors import UserError
from vmoe.training.config import ParallelConfig, TrainConfig

WORKER = Path(__file__).parents[1] / "support" / "folder_writer_worker.py"
KILLED = {"SIGNAL": str(int(signal.SIGKILL)), "SIGNALLED_RANK": "1"}
ASYNC = ("--parallel.async_save", "true")
NO_THREAD = "threads of gloo at the end: 0"  # of each process: one that is left may abort it


def test_a_folder_written_in_the_background_is_the_one_of_then(tmp_path):
    done = run_forked(WORKER, 2, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "under way: False False False",
        "written: [1.0, 1.0, 1.0, 1.0, 1] [1.0, 1.0, 1.0, 1.0, 1]",
        "the one before: [2.0, 2.0, 2.0, 2.0, 2]",
        "both: [2.0, 2.0, 2.0, 2.0, 2] [3.0, 3.0, 3.0, 3.0, 3]",
        f"failed: True {tmp_path}/best.ckpt: cannot be written ([Errno 28] No space left on device); is the disk full?",
        "left: [2.0, 2.0, 2.0, 2.0, 2] [3.0, 3.0, 3.0, 3.0, 3] ['best.ckpt', 'last.ckpt'] False",
        "again: [5.0, 5.0, 5.0, 5.0, 5]",
        "threads of gloo: 0",
    ]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("strategy", ["auto", "none", "ddp"])
def test_what_is_not_sharded_is_not_saved_so(strategy):
    line = f"parallel.async_save=True: must be false with parallel.strategy={strategy}; it is for fsdp and expert"
    with pytest.raises(UserError, match=line):
        from_plain(TrainConfig, {"parallel": {"strategy": strategy, "async_save": True}})
    assert ParallelConfig(strategy="fsdp", async_save=True).async_save


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Three epochs of nine updates."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY.replace("subset:", "repeat: 3, subset:").replace("epochs: 1", "epochs: 3"))
    return path


def assert_equal(ours: Path, expected: Path) -> None:
    """Two checkpoints with the same numbers, to the last bit, and the same state of the run."""
    one, other = read_checkpoint(expected), read_checkpoint(ours)
    assert_close(tensors(other), tensors(one), 0.0)
    for key in ("epochs_done", "batches_done", "best", "finished"):
        assert one[ENTRY][key] == other[ENTRY][key]


@pytest.mark.slow
def test_a_run_that_saves_so_is_the_run_that_waits(recipe, tmp_path):
    waiting, other = RunFolder(tmp_path / "waiting"), RunFolder(tmp_path / "async")
    options = strategy_options("expert 2")
    train_forked(recipe, waiting.path, 2, *options, **KILLED, SIGNAL_AT="16")  # in the second epoch
    slow = {"WRITE_SECONDS": "1", "STEP_SECONDS": "0.5"}
    done = train_forked(recipe, other.path, 2, *options, *ASYNC, **KILLED, **slow, SIGNAL_AT="16")
    assert int(re.search(r"\.best\.ckpt\.new: written in update (\d+)", done.stderr)[1]) >= 9  # of the next epoch
    for ours, expected in ((other.last, waiting.last), (other.best, waiting.best)):
        assert_equal(ours, expected)
    assert train_forked(recipe, waiting.path, 2, *options, "--resume").returncode == 0
    stop = {"SIGNAL": str(int(signal.SIGTERM)), "SIGNAL_AT": "19"}  # while the second epoch's is under way
    done = train_forked(recipe, other.path, 2, *options, *ASYNC, "--resume", **stop, WRITE_SECONDS="2")
    assert done.stderr.count("the run is saved, go on with") == 1, done.stderr
    assert done.stderr.count(NO_THREAD) == 2, done.stderr
    assert read_checkpoint(other.last)[ENTRY]["batches_done"] == 3
    done = train_forked(recipe, other.path, 2, *options, *ASYNC, "--resume", WRITE_SECONDS="0.3")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(NO_THREAD) == 2, done.stderr
    assert_same_run(other, waiting)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_at_once_and_leaves_the_checkpoint_of_before(recipe, tmp_path):
    full = {"SIGNAL_AT": "16", "SIGNALLED_RANK": "1", "FILE_BYTES": "20000", "STEP_SECONDS": "0.3"}
    done = train_forked(recipe, tmp_path / "run", 2, *strategy_options("fsdp"), *ASYNC, **full)
    assert done.returncode != 0
    assert done.stderr.count("last.ckpt: cannot be written") + done.stderr.count("best.ckpt: cannot be written") == 1
    assert "Traceback" not in done.stderr
    assert "epoch 2/3" in done.stdout and "epoch 3/3" not in done.stdout
    assert read_checkpoint(RunFolder(tmp_path / "run").last)[ENTRY]["epochs_done"] == 1
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.new"))


@pytest.mark.slow
def test_a_run_that_fails_waits_for_the_checkpoint_under_way(recipe, tmp_path):
    failing = {"NAN_AT": "10", "WRITE_SECONDS": "3"}
    done = train_forked(recipe, tmp_path / "run", 2, *strategy_options("expert 2"), *ASYNC, **failing)
    assert done.returncode != 0
    assert done.stderr.count("step 11: the loss or its gradient became NaN or inf") == 1, done.stderr
    assert done.stderr.count(NO_THREAD) == 2, done.stderr
    assert read_checkpoint(RunFolder(tmp_path / "run").last)[ENTRY]["epochs_done"] == 1


@pytest.mark.slow
def test_a_run_that_fails_reports_the_checkpoint_that_failed_too(recipe, tmp_path):
    failing = {"NAN_AT": "10", "WRITE_SECONDS": "3", "SIGNAL_AT": "9", "SIGNALLED_RANK": "1", "FILE_BYTES": "20000"}
    done = train_forked(recipe, tmp_path / "run", 2, *strategy_options("expert 2"), *ASYNC, **failing)
    assert done.stderr.count("step 11: the loss or its gradient became NaN or inf") == 1, done.stderr
    assert done.stderr.count("best.ckpt: cannot be written") == 1


@pytest.mark.slow
def test_a_process_that_dies_while_it_writes_ends_the_job_and_leaves_the_checkpoint_of_before(recipe, tmp_path):
    start = time.monotonic()
    dying = {**KILLED, "SIGNAL_AT": "19", "STEP_SECONDS": "0.3", "WRITE_SECONDS": "2"}
    done = launch(recipe, tmp_path / "run", 2, *strategy_options("fsdp"), *ASYNC, **dying)
    assert time.monotonic() - start < 90
    assert "failed (exitcode: -9) local_rank: 1" in done.stderr
    assert read_checkpoint(RunFolder(tmp_path / "run").last)[ENTRY]["epochs_done"] == 1
