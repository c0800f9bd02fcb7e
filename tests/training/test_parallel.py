"""Several processes: results do not depend on their number, and neither do checkpoints."""

import json
import pickle
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.parallel_runs import TINY, assert_close, assert_same_run, launch, strategy_options, tensors, train_forked

from vmoe.checkpoints import RunFolder, load_checkpoint, read_checkpoint
from vmoe.cli.consolidate import main as consolidate
from vmoe.errors import UserError

TRAIN = Path(__file__).parents[2] / "tools" / "train.py"  # in float32, which the compiler is used with

# Nothing random but by image, for captured steps.
WITHOUT_NOISE = ("--moe.noise_std", "0", "--parallel.draws", "process")
CAPTURED = (*WITHOUT_NOISE, "--trainer.cuda_graph", "true", "--trainer.device", "auto")
SOFT = ("--moe.router", "soft", "--moe.soft_scale", "10", "--moe.group", "image", "--moe.noise_std", "0")
SOFT += ("--moe.batch_priority", "false", "--moe.capacity_factor", "1")


OF_ONE = {"alone": (), "expert 4": strategy_options("expert 4"), "without noise": WITHOUT_NOISE, "soft": SOFT}
OF_TWO = {strategy: strategy_options(strategy) for strategy in ("expert 2", "ddp", "expert 2 whole")}
OF_TWO |= {"captured": (*OF_TWO["expert 2 whole"], *CAPTURED), "soft": (*strategy_options("fsdp"), *SOFT)}


class Runs:
    """Runs of so many ranks; each is trained when a test first asks for it."""

    def __init__(self, recipe: Path, ranks: int, options: dict[str, Sequence[str]]) -> None:
        self._recipe, self._ranks, self._options = recipe, ranks, options

    def __getitem__(self, name: str) -> RunFolder:
        folder = RunFolder(self._recipe.parent / str(self._ranks) / name)
        if not folder.path.exists():
            done = train_forked(self._recipe, folder.path, self._ranks, *self._options[name], UNCAPTURED="1")
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("threads of gloo at the end: 0") == self._ranks  # one that is left may abort it
            assert done.stdout.count("epoch 1/1") == 1  # one rank shows progress
            if name == "expert 2":
                assert done.stderr.count("made on cpu") == 1  # one has the whole model on its host
        return folder


@pytest.fixture(scope="module")
def of_one(recipe) -> Runs:
    """Runs of one rank."""
    return Runs(recipe, 1, OF_ONE)


@pytest.fixture(scope="module")
def of_two(recipe) -> Runs:
    """Runs of two ranks; one has a step that would be captured on a GPU."""
    return Runs(recipe, 2, OF_TWO)


@pytest.fixture(scope="module")
def alone(of_one) -> RunFolder:
    """The run of one process."""
    return of_one["alone"]


@pytest.fixture(scope="module")
def sharded(of_two) -> RunFolder:
    """A run of two processes, of which each has two experts of four; its checkpoints are folders."""
    return of_two["expert 2"]


def test_experts_in_two_processes_change_nothing(sharded, alone):
    assert_same_run(sharded, alone)


def test_one_process_trains_the_same_whatever_the_strategy(of_one, alone):
    ours = of_one["expert 4"]
    assert ours.last.is_file()
    one, other = read_checkpoint(alone.last), read_checkpoint(ours.last)
    assert_close(tensors(other["state_dict"]), tensors(one["state_dict"]), 0.0)
    assert_same_run(ours, alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "expert 2 whole"])
def test_two_processes_change_nothing(of_two, alone, strategy):
    assert_same_run(of_two[strategy], alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "expert 2", "expert 2 whole"])
def test_four_processes_change_nothing(recipe, alone, tmp_path, strategy):
    done = train_forked(recipe, tmp_path / "run", 4, *strategy_options(strategy))
    assert done.returncode == 0, done.stderr
    assert_same_run(RunFolder(tmp_path / "run"), alone)


@pytest.mark.slow
def test_experts_in_processes_share_a_learned_activation(tmp_path):
    """Experts are spread over two of four processes, and their weights once more over the others."""
    recipe = tmp_path / "learned.yaml"
    recipe.write_text(TINY.replace("num_heads: 2}", "num_heads: 2, act_layer: prelu}"))
    runs = {"one": (1, ()), "four": (4, strategy_options("expert 2"))}
    for name, (processes, options) in runs.items():
        done = train_forked(recipe, tmp_path / name, processes, *options)
        assert done.returncode == 0, done.stderr
    assert_same_run(RunFolder(tmp_path / "four"), RunFolder(tmp_path / "one"))


@pytest.mark.slow
def test_the_step_that_processes_capture_is_lightning_s(of_two, of_one):
    """On CPUs there is no graph: the same step runs as it is. Its learning rate is a tensor in float32."""
    assert_same_run(of_two["captured"], of_one["without noise"], tolerance=1e-7)


@pytest.mark.slow
def test_the_step_that_processes_capture_with_ddp_is_lightning_s(recipe, of_one, tmp_path):
    done = train_forked(recipe, tmp_path / "run", 2, *strategy_options("ddp"), *CAPTURED, UNCAPTURED="1")
    assert done.returncode == 0, done.stderr
    assert_same_run(RunFolder(tmp_path / "run"), of_one["without noise"], tolerance=1e-7)


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


@pytest.mark.slow
def test_a_scalar_that_all_processes_keep_is_trained_as_in_one(of_two, of_one):
    assert_same_run(of_two["soft"], of_one["soft"])


LONGER = ("--data.repeat", "3")  # 9 updates, of which each part of a chain does 2 or more


@pytest.fixture(scope="module")
def longer(recipe) -> RunFolder:
    """The run of one process with more updates."""
    folder = recipe.parent / "longer"
    assert train_forked(recipe, folder, 1, *LONGER).returncode == 0
    return RunFolder(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain",
    [
        [(2, "expert 2"), (1, "none")],
        [(1, "none"), (4, "expert 2"), (2, "fsdp")],
        [(2, "expert 2 whole"), (4, "expert 2 whole"), (2, "expert 2")],
    ],
    ids=str,
)
def test_a_run_goes_on_with_other_processes_as_if_it_had_never_stopped(recipe, longer, tmp_path, chain):
    for number, (processes, strategy) in enumerate(chain):
        stop = (
            {} if number + 1 == len(chain) else {"SIGNAL": str(int(signal.SIGTERM)), "SIGNAL_AT": str(1 + 4 * number)}
        )
        options = (*LONGER, *strategy_options(strategy), "--resume", "auto")
        done = train_forked(recipe, tmp_path / "chain", processes, *options, **stop)
        assert done.stderr.count("the run is saved, go on with") == bool(stop), done.stderr
    assert done.returncode == 0, done.stderr
    assert_same_run(RunFolder(tmp_path / "chain"), longer)


def test_a_folder_is_one_file_for_those_who_want_one(sharded, tmp_path):
    assert sharded.best.is_dir()
    out = tmp_path / "weights.safetensors"
    assert consolidate([str(sharded.path), "--out", str(out)]) == 0
    weights = load_checkpoint(sharded.path).model.state_dict()
    with safe_open(out, "pt") as file:
        assert set(file.keys()) == set(weights)
        for name, value in weights.items():
            torch.testing.assert_close(file.get_tensor(name).to(value.dtype), value)
        assert json.loads(file.metadata()["vmoe"])["config"]["moe"]["num_experts"] == 4


@pytest.mark.parametrize("missing", ["__1_0.distcp", ".metadata", "plain.pt"])
def test_a_folder_that_lacks_a_part_names_it(sharded, tmp_path, missing):
    folder = shutil.copytree(sharded.last, tmp_path / "last.ckpt")
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
def test_a_table_of_contents_that_would_run_something_is_refused(sharded, tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(sharded.last, tmp_path / "last.ckpt")
    (folder / ".metadata").write_bytes(attack)
    with pytest.raises(UserError, match="is damaged or foreign"):
        load_checkpoint(folder)
    assert not (tmp_path / "overwritten").exists()


@pytest.mark.long  # torchrun starts twice: 40 s of CPU time
def test_torchrun_does_not_resume_the_run_of_another_start(recipe, sharded, tmp_path):
    folder = shutil.copytree(sharded.path, tmp_path / "run")
    done = launch(recipe, folder, 2, *strategy_options("expert 2"), restarts=1)
    assert done.returncode != 0
    assert "resuming" not in done.stdout and "is finished" not in done.stdout
    assert done.stderr.count("holds a run already") == 2  # in both attempts


@pytest.mark.slow
def test_a_folder_moved_aside_when_a_process_was_killed_is_found_again(recipe, sharded, tmp_path):
    folder = RunFolder(shutil.copytree(sharded.path, tmp_path / "run"))
    folder.last.rename(folder.last.with_name(".last.ckpt.old"))
    folder.summary.unlink()
    done = train_forked(recipe, folder.path, 2, *strategy_options("expert 2"), "--resume")
    assert done.returncode == 0, done.stderr
    assert "starts from the beginning" not in done.stdout
    assert folder.last.is_dir() and folder.summary.exists()


@pytest.fixture(scope="module")
def sharded_with_muon(recipe) -> RunFolder:
    """Two processes, in which AdamW trains the dense matrices, which are sharded."""
    folder = recipe.parent / "muon"
    done = train_forked(recipe, folder, 2, *strategy_options("fsdp"), "--optim.name", "muon")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AdamW trains the matrices that parallel.strategy=fsdp shards, but whole experts") == 1
    return RunFolder(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "strategy"), [(4, "fsdp"), (2, "expert 2")])
def test_muon_keeps_experts_that_are_whole(recipe, sharded_with_muon, tmp_path, processes, strategy):
    done = train_forked(recipe, tmp_path / "run", processes, *strategy_options(strategy), "--optim.name", "muon")
    assert done.returncode == 0, done.stderr
    ours = RunFolder(tmp_path / "run")
    assert_same_run(ours, sharded_with_muon)
    states = read_checkpoint(ours.last)["optimizer_states"][0]["state"]
    by_muon = {name for name, state in states.items() if "momentum_buffer" in state}
    assert by_muon and all(".experts.fc" in name and name.endswith("weight") for name in by_muon)


@pytest.mark.slow
def test_muon_has_all_matrices_where_none_is_sharded(recipe, tmp_path):
    for processes, strategy in ((1, "none"), (2, "expert 2 whole")):
        options = (*strategy_options(strategy), "--optim.name", "muon")
        done = train_forked(recipe, tmp_path / strategy, processes, *options)
        assert done.returncode == 0, done.stderr
        assert "AdamW" not in done.stdout
    folders = (RunFolder(tmp_path / name) for name in ("expert 2 whole", "none"))
    ours, alone = (tensors(read_checkpoint(folder.last)["state_dict"]) for folder in folders)
    assert_close(ours, alone, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["none", "fsdp"])  # in one process the same
def test_with_muon_the_strategy_cannot_change(recipe, sharded_with_muon, strategy):
    options = ("--optim.name", "muon", "--resume")
    done = train_forked(recipe, sharded_with_muon.path, 1, *strategy_options(strategy), *options)
    assert done.returncode == 2
    assert "parallel.strategy (was 'fsdp', now 'none')" in done.stderr


@pytest.mark.long  # each takes 80 s of CPU time
@pytest.mark.parametrize("strategy", ["expert 2", "expert 2 whole"])  # fsdp is a part of the first
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
