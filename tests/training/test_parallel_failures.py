"""Several processes: mistakes and failures are printed once, and a run that died goes on."""

import signal

import pytest
from support.parallel_runs import assert_same_run, launch, strategy_options, train_forked

import vmoe
from vmoe.checkpoints import ENTRY, RunFolder, read_checkpoint
from vmoe.cli.train import main as train
from vmoe.cli.train_options import parse
from vmoe.config_values import from_plain
from vmoe.errors import UserError
from vmoe.moe import MoeConfig
from vmoe.training.config import ParallelConfig, TrainConfig, TrainerConfig
from vmoe.training.parallel.strategies import check_parts


def test_a_mistake_is_printed_once(recipe, tmp_path):
    done = train_forked(recipe, tmp_path / "run", 2, "--parallel.strategy", "ddp", "--data.batch_size", "40")
    assert done.returncode == 2
    assert done.stderr.count("data.batch_size=40: 2 processes must get equally many whole groups") == 1
    assert "use 32 or 48" in done.stderr
    assert not (tmp_path / "run").exists()


def test_experts_that_cannot_be_sharded():
    config = TrainConfig(moe=MoeConfig(num_experts=4), parallel=ParallelConfig("expert", expert_size=3))
    with pytest.raises(UserError, match=r"parallel\.expert_size=3: must divide the number of processes, 2"):
        check_parts(config, 32, 2)
    with pytest.raises(UserError, match=r"parallel\.expert_size=3: must divide moe\.num_experts=4"):
        check_parts(config, 32, 3)


def test_a_captured_step_needs_experts_that_are_sharded_no_further():
    parallel = ParallelConfig("expert", expert_size=2, dense="whole")
    config = TrainConfig(
        moe=MoeConfig(num_experts=4, group=8), trainer=TrainerConfig(cuda_graph=True), parallel=parallel
    )
    check_parts(config, 32, 2)
    with pytest.raises(UserError, match=r"parallel\.expert_size=2: must be 4, the number of processes"):
        check_parts(config, 32, 4)


def test_the_old_name_of_a_sharded_dense_part_still_loads(tmp_path):
    (tmp_path / "old.yaml").write_text(
        "data: {name: digits}\nparallel: {strategy: expert, expert_size: 2, dense: cut}\n"
    )
    new = ParallelConfig("expert", expert_size=2, dense="shard")
    assert parse(["--config", str(tmp_path / "old.yaml")]).parallel == new
    assert from_plain(TrainConfig, {"parallel": {"dense": "cut"}}).parallel == ParallelConfig()
    with pytest.raises(UserError, match=r"parallel\.dense='half': must be shard or whole"):
        parse(["digits", "--parallel.dense", "half"])


@pytest.mark.parametrize("rank", [0, 1])
def test_several_processes_need_a_strategy(recipe, tmp_path, monkeypatch, capsys, rank):
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "one"}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert train(["--config", str(recipe), "--output_dir", str(tmp_path / "run")]) == 2
    line = "--parallel.strategy none: there are 2 processes; use auto, ddp, fsdp or expert"
    assert capsys.readouterr().err.count(line) == (rank == 0)  # the first process prints it
    assert not (tmp_path / "run").exists()


def test_auto_is_chosen_by_the_command_alone(tmp_path, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    with pytest.raises(UserError, match=r"parallel\.strategy=auto: is chosen by `vmoe train`; give ddp"):
        vmoe.fit("digits", options={"parallel.strategy": "auto"}, output_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_of_before(recipe, tmp_path, rank):
    full = {"SIGNAL_AT": "4", "SIGNALLED_RANK": rank, "FILE_BYTES": "20000"}
    options = (*strategy_options("fsdp"), "--trainer.epochs", "2", "--optim.lr", "1e-5")
    done = train_forked(recipe, tmp_path / "run", 2, *options, **full)
    assert done.returncode != 0
    assert done.stderr.count("last.ckpt: cannot be written") + done.stderr.count("best.ckpt: cannot be written") == 1
    assert "Traceback" not in done.stderr
    assert read_checkpoint(RunFolder(tmp_path / "run").last)[ENTRY]["epochs_done"] == 1
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.new"))


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_died_from_its_last_checkpoint(recipe, tmp_path):
    epochs = ("--trainer.epochs", "2")
    assert train_forked(recipe, tmp_path / "alone", 1, *epochs).returncode == 0
    killed = {"SIGNAL": str(int(signal.SIGKILL)), "SIGNAL_AT": "4", "SIGNALLED_RANK": "1"}
    done = launch(recipe, tmp_path / "run", 2, *epochs, *strategy_options("ddp"), restarts=1, **killed)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert_same_run(RunFolder(tmp_path / "run"), RunFolder(tmp_path / "alone"))
