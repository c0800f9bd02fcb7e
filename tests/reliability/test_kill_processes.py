"""Of two processes one is killed: the other ends too, with a line that says which, and one or two go on."""

import shutil
import signal

import pytest
from support.parallel_runs import TINY, assert_same_run, launch, strategy_options, train_forked

from vmoe.checkpoints import ENTRY, RunFolder, read_checkpoint

EPOCHS = ("--trainer.epochs", "2")


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "rank"), [("ddp", "0"), ("expert 2", "1")])
def test_one_of_two_is_killed(tmp_path, strategy, rank):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    assert train_forked(recipe, tmp_path / "alone", 1, *EPOCHS).returncode == 0
    killed = {"SIGNAL": str(int(signal.SIGKILL)), "SIGNAL_AT": "4", "SIGNALLED_RANK": rank}
    done = launch(recipe, tmp_path / "run", 2, *EPOCHS, *strategy_options(strategy), **killed)
    assert done.returncode == 1
    assert f"failed (exitcode: -9) local_rank: {rank}" in done.stderr
    assert read_checkpoint(RunFolder(tmp_path / "run").last)[ENTRY]["epochs_done"] == 1
    for processes in (1, 2):
        folder = RunFolder(shutil.copytree(tmp_path / "run", tmp_path / f"again{processes}"))
        how = strategy_options(strategy) if processes > 1 else strategy_options("none")
        again = train_forked(recipe, folder.path, processes, *EPOCHS, *how, "--resume")
        assert again.returncode == 0, again.stderr
        assert "resuming" in again.stdout
        assert_same_run(folder, RunFolder(tmp_path / "alone"))
