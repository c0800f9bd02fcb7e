"""Several processes: results do not depend on their number, and mistakes and failures are told once."""

import json
import pickle
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from parallel_runs import TINY, assert_close, assert_same_run, launch, strategy_options, tensors
from safetensors import safe_open

from vmoe.checkpoints import ENTRY, RunFolder, load_checkpoint, read_checkpoint
from vmoe.cli.consolidate import main as consolidate
from vmoe.cli.train import main as train
from vmoe.errors import UserError
from vmoe.moe import MoeConfig
from vmoe.training.config import ParallelConfig, TrainConfig, TrainerConfig
from vmoe.training.parallel import check_parts

TRAIN = Path(__file__).parents[2] / "tools" / "train.py"  # in float32, which the compiler is used with


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def alone(recipe) -> RunFolder:
    """The run of one process."""
    folder = recipe.parent / "alone"
    done = launch(recipe, folder, 1)
    assert done.returncode == 0, done.stderr
    return RunFolder(folder)


@pytest.fixture(scope="module")
def cut(recipe) -> RunFolder:
    """A run of two processes, of which each has two experts of four; its checkpoints are folders."""
    folder = recipe.parent / "cut"
    done = launch(recipe, folder, 2, *strategy_options("expert 2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1  # one process shows progress
    assert done.stderr.count("made on cpu") == 1  # and one has the whole model on its host
    return RunFolder(folder)


def test_experts_in_two_processes_change_nothing(cut, alone):
    assert_same_run(cut, alone)


def test_one_process_trains_the_same_whatever_the_strategy(recipe, alone, tmp_path):
    done = launch(recipe, tmp_path / "run", 1, *strategy_options("expert 4"))
    assert done.returncode == 0, done.stderr
    ours = RunFolder(tmp_path / "run")
    assert ours.last.is_file()
    one, other = read_checkpoint(alone.last), read_checkpoint(ours.last)
    assert_close(tensors(other["state_dict"]), tensors(one["state_dict"]), 0.0)
    assert_same_run(ours, alone)


FAST_CASES = [(2, "ddp"), (2, "expert 2 whole")]
SLOW_CASES = [(2, "fsdp"), *((4, how) for how in ("ddp", "fsdp", "expert 4", "expert 2", "expert 2 whole"))]


@pytest.mark.parametrize(
    ("processes", "strategy"), [*FAST_CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_the_number_of_processes_changes_nothing(recipe, alone, tmp_path, processes, strategy):
    done = launch(recipe, tmp_path / "run", processes, *strategy_options(strategy))
    assert done.returncode == 0, done.stderr
    assert_same_run(RunFolder(tmp_path / "run"), alone)


@pytest.fixture(scope="module")
def alone_without_noise(recipe) -> RunFolder:
    """What a captured step can do too: nothing random but by image."""
    folder = recipe.parent / "alone_without_noise"
    done = launch(recipe, folder, 1, *WITHOUT_NOISE)
    assert done.returncode == 0, done.stderr
    return RunFolder(folder)


WITHOUT_NOISE = ("--moe.noise_std", "0", "--parallel.draws", "process")


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "expert 2 whole"])
def test_the_step_that_processes_capture_is_lightning_s(recipe, alone_without_noise, tmp_path, strategy):
    """On CPUs there is no graph: the same step runs as it is. Its learning rate is a tensor in float32."""
    options = (*strategy_options(strategy), *WITHOUT_NOISE, "--trainer.cuda_graph", "true", "--trainer.device", "auto")
    done = launch(recipe, tmp_path / "run", 2, *options, UNCAPTURED="1")
    assert done.returncode == 0, done.stderr
    assert_same_run(RunFolder(tmp_path / "run"), alone_without_noise, tolerance=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["ddp", "expert 2 whole"])
def test_processes_replay_the_step_that_they_captured(recipe, tmp_path, strategy):
    options = (*WITHOUT_NOISE, "--trainer.device", "cuda", "--trainer.epochs", "3")  # of 3 updates; 6 are replayed
    done = launch(recipe, tmp_path / "alone", 1, *options)
    assert done.returncode == 0, done.stderr
    done = launch(recipe, tmp_path / "run", 2, *options, *strategy_options(strategy), "--trainer.cuda_graph", "true")
    assert done.returncode == 0, done.stderr
    assert_same_run(RunFolder(tmp_path / "run"), RunFolder(tmp_path / "alone"), tolerance=1e-6)


def test_a_scalar_that_all_processes_keep_is_trained_as_in_one(recipe, tmp_path):
    soft = ("--moe.router", "soft", "--moe.soft_scale", "10", "--moe.group", "image", "--moe.noise_std", "0")
    soft += ("--moe.batch_priority", "false", "--moe.capacity_factor", "1")
    for processes, strategy in ((1, "none"), (2, "fsdp")):
        done = launch(recipe, tmp_path / strategy, processes, *strategy_options(strategy), *soft)
        assert done.returncode == 0, done.stderr
    assert_same_run(RunFolder(tmp_path / "fsdp"), RunFolder(tmp_path / "none"))


def test_a_mistake_is_told_once(recipe, tmp_path):
    done = launch(recipe, tmp_path / "run", 2, "--parallel.strategy", "ddp", "--data.batch_size", "40")
    assert done.returncode != 0
    assert done.stderr.count("data.batch_size=40: 2 processes must get equally many whole groups") == 1
    assert "use 32 or 48" in done.stderr
    assert not (tmp_path / "run").exists()


def test_experts_that_cannot_be_dealt_out():
    config = TrainConfig(moe=MoeConfig(num_experts=4), parallel=ParallelConfig("expert", expert_size=3))
    with pytest.raises(UserError, match=r"parallel\.expert_size=3: must divide the number of processes, 2"):
        check_parts(config, 32, 2)
    with pytest.raises(UserError, match=r"parallel\.expert_size=3: must divide moe\.num_experts=4"):
        check_parts(config, 32, 3)


def test_a_captured_step_needs_experts_that_are_cut_no_further():
    parallel = ParallelConfig("expert", expert_size=2, dense="whole")
    config = TrainConfig(
        moe=MoeConfig(num_experts=4, group=8), trainer=TrainerConfig(cuda_graph=True), parallel=parallel
    )
    check_parts(config, 32, 2)
    with pytest.raises(UserError, match=r"parallel\.expert_size=2: must be 4, the number of processes"):
        check_parts(config, 32, 4)


@pytest.mark.parametrize("rank", [0, 1])
def test_several_processes_need_a_strategy(recipe, tmp_path, monkeypatch, capsys, rank):
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "one"}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    assert train(["--config", str(recipe), "--output_dir", str(tmp_path / "run")]) == 2
    line = "--parallel.strategy none: torchrun started 2 processes; use auto, ddp, fsdp or expert"
    assert capsys.readouterr().err.count(line) == (rank == 0)  # the first process tells it
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain",
    [
        [(2, "expert 2"), (1, "none")],
        [(1, "none"), (4, "expert 2"), (2, "fsdp")],
        [(2, "ddp"), (4, "fsdp"), (2, "ddp")],
        [(2, "expert 2 whole"), (4, "expert 2 whole"), (2, "expert 2")],
    ],
    ids=str,
)
def test_a_run_goes_on_with_other_processes_as_if_it_had_never_stopped(recipe, tmp_path, chain):
    longer = ("--data.repeat", "3")  # 9 updates, of which each part of the chain does 2 or more
    assert launch(recipe, tmp_path / "alone", 1, *longer).returncode == 0
    for number, (processes, strategy) in enumerate(chain):
        stop = (
            {} if number + 1 == len(chain) else {"SIGNAL": str(int(signal.SIGTERM)), "SIGNAL_AT": str(1 + 4 * number)}
        )
        options = (*longer, *strategy_options(strategy), "--resume")
        done = launch(recipe, tmp_path / "chain", processes, *options, **stop)
        assert done.stderr.count("the run is saved, go on with") == bool(stop), done.stderr
    assert done.returncode == 0, done.stderr
    assert_same_run(RunFolder(tmp_path / "chain"), RunFolder(tmp_path / "alone"))


def test_a_folder_is_one_file_for_those_who_want_one(cut, tmp_path):
    assert cut.best.is_dir()
    out = tmp_path / "weights.safetensors"
    assert consolidate([str(cut.path), "--out", str(out)]) == 0
    weights = load_checkpoint(cut.path).model.state_dict()
    with safe_open(out, "pt") as file:
        assert set(file.keys()) == set(weights)
        for name, value in weights.items():
            torch.testing.assert_close(file.get_tensor(name).to(value.dtype), value)
        assert json.loads(file.metadata()["vmoe"])["config"]["moe"]["num_experts"] == 4


@pytest.mark.parametrize("missing", ["__1_0.distcp", ".metadata", "plain.pt"])
def test_a_folder_that_lacks_a_part_names_it(cut, tmp_path, missing):
    folder = shutil.copytree(cut.last, tmp_path / "last.ckpt")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=f"{missing}: is missing"):
        load_checkpoint(folder)


class _Calls:
    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def _by_dots(name):
    """A pickle that calls what a dotted name of the metadata's module leads to."""
    module = b"torch.distributed.checkpoint.metadata"
    parts = (module, name.encode())
    words = b"".join(b"\x8c" + bytes([len(part)]) + part for part in parts)
    return b"\x80\x04" + words + b"\x93)R."


@pytest.mark.parametrize(
    "attack",
    [pickle.dumps(Path.unlink), _by_dots("os.getcwd"), pickle.dumps(_Calls(torch.PyTorchFileWriter, "overwritten"))],
    ids=["method", "dots", "torch"],
)
def test_a_table_of_contents_that_would_run_something_is_refused(cut, tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(cut.last, tmp_path / "last.ckpt")
    (folder / ".metadata").write_bytes(attack)
    with pytest.raises(UserError, match="is damaged or foreign"):
        load_checkpoint(folder)
    assert not (tmp_path / "overwritten").exists()


def test_a_process_that_dies_ends_the_job_with_a_line_that_says_which(recipe, tmp_path):
    killed = {"SIGNAL": str(int(signal.SIGKILL)), "SIGNAL_AT": "1", "SIGNALLED_RANK": "1"}
    start = time.monotonic()
    done = launch(recipe, tmp_path / "run", 2, *strategy_options("expert 2"), **killed)
    assert time.monotonic() - start < 60
    assert done.returncode != 0
    assert "failed (exitcode: -9) local_rank: 1" in done.stderr


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_full_disk_is_told_in_a_line_and_leaves_the_checkpoint_of_before(recipe, tmp_path, rank):
    full = {"SIGNAL_AT": "4", "SIGNALLED_RANK": rank, "FILE_BYTES": "20000"}
    options = (*strategy_options("fsdp"), "--trainer.epochs", "2", "--optim.lr", "1e-5")
    done = launch(recipe, tmp_path / "run", 2, *options, **full)
    assert done.returncode != 0
    assert done.stderr.count("last.ckpt: cannot be written") + done.stderr.count("best.ckpt: cannot be written") == 1
    assert "Traceback" not in done.stderr.partition("ChildFailedError")[0].partition("elastic")[0]
    assert read_checkpoint(RunFolder(tmp_path / "run").last)[ENTRY]["epochs_done"] == 1
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.new"))


@pytest.mark.slow
def test_torchrun_does_not_resume_the_run_of_another_start(recipe, cut, tmp_path):
    folder = shutil.copytree(cut.path, tmp_path / "run")
    done = launch(recipe, folder, 2, *strategy_options("expert 2"), restarts=1)
    assert done.returncode != 0
    assert "resuming" not in done.stdout and "is finished" not in done.stdout
    assert done.stderr.count("holds a run already") == 2  # in both attempts


@pytest.mark.slow
def test_a_folder_moved_aside_when_a_process_was_killed_is_found_again(recipe, cut, tmp_path):
    folder = RunFolder(shutil.copytree(cut.path, tmp_path / "run"))
    folder.last.rename(folder.last.with_name(".last.ckpt.old"))
    folder.summary.unlink()
    done = launch(recipe, folder.path, 2, *strategy_options("expert 2"), "--resume")
    assert done.returncode == 0, done.stderr
    assert "starts from the beginning" not in done.stdout
    assert folder.last.is_dir() and folder.summary.exists()


@pytest.fixture(scope="module")
def cut_with_muon(recipe) -> RunFolder:
    """Two processes, in which AdamW trains the dense matrices, which are cut."""
    folder = recipe.parent / "muon"
    done = launch(recipe, folder, 2, *strategy_options("fsdp"), "--optim.name", "muon")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AdamW trains the matrices that parallel.strategy=fsdp cuts, but whole experts") == 1
    return RunFolder(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "strategy"), [(4, "fsdp"), (2, "expert 2")])
def test_muon_keeps_experts_that_are_whole(recipe, cut_with_muon, tmp_path, processes, strategy):
    done = launch(recipe, tmp_path / "run", processes, *strategy_options(strategy), "--optim.name", "muon")
    assert done.returncode == 0, done.stderr
    ours = RunFolder(tmp_path / "run")
    assert_same_run(ours, cut_with_muon)
    states = read_checkpoint(ours.last)["optimizer_states"][0]["state"]
    by_muon = {name for name, state in states.items() if "momentum_buffer" in state}
    assert by_muon and all(".experts.fc" in name and name.endswith("weight") for name in by_muon)


@pytest.mark.slow
def test_muon_has_all_matrices_where_none_is_cut(recipe, tmp_path):
    for processes, strategy in ((1, "none"), (2, "expert 2 whole")):
        options = (*strategy_options(strategy), "--optim.name", "muon")
        done = launch(recipe, tmp_path / strategy, processes, *options)
        assert done.returncode == 0, done.stderr
        assert "AdamW" not in done.stdout
    folders = (RunFolder(tmp_path / name) for name in ("expert 2 whole", "none"))
    ours, alone = (tensors(read_checkpoint(folder.last)["state_dict"]) for folder in folders)
    assert_close(ours, alone, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["none", "fsdp"])  # in one process the same
def test_with_muon_the_strategy_cannot_change(recipe, cut_with_muon, strategy):
    options = ("--optim.name", "muon", "--resume")
    done = launch(recipe, cut_with_muon.path, 1, *strategy_options(strategy), *options)
    assert done.returncode == 2
    assert "parallel.strategy (was 'fsdp', now 'none')" in done.stderr


@pytest.mark.slow
def test_torchrun_starts_a_run_that_died_anew_from_its_last_checkpoint(recipe, tmp_path):
    epochs = ("--trainer.epochs", "2")
    assert launch(recipe, tmp_path / "alone", 1, *epochs).returncode == 0
    killed = {"SIGNAL": str(int(signal.SIGKILL)), "SIGNAL_AT": "4", "SIGNALLED_RANK": "1"}
    done = launch(recipe, tmp_path / "run", 2, *epochs, *strategy_options("ddp"), restarts=1, **killed)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert_same_run(RunFolder(tmp_path / "run"), RunFolder(tmp_path / "alone"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "expert 2", "expert 2 whole"])
def test_compiled_it_trains_the_same(recipe, tmp_path, strategy):
    weights = []
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        options = ("--trainer.compile", compiled, "--parallel.draws", "process", "--moe.noise_std", "0")
        done = launch(recipe, folder, 2, *strategy_options(strategy), *options, script=TRAIN, TORCH_LOGS="graph_code")
        assert done.returncode == 0, done.stderr
        assert ("TRACED GRAPH" in done.stderr) is (compiled == "true")
        weights.append(read_checkpoint(RunFolder(folder).last)["state_dict"])
    assert_close(*weights, 1e-5)
