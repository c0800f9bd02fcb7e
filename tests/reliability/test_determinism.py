"""Two runs of one seed are one, bit for bit on the CPU: with every router, any number of workers, one thread or two."""

import pytest
import torch
from reliability.children import assert_equal, rows

from vmoe.checkpoints import RunFolder
from vmoe.cli.train import main
from vmoe.moe.config import ROUTER_NAMES

RECIPE = """
data: {name: digits, batch_size: 40, subset: {per_class: 12}, augment: {preset: strong}}
model:
  name: vit_tiny_patch16_224
  kwargs: {patch_size: 4, embed_dim: 64, depth: 2, num_heads: 2, drop_path_rate: 0.2, proj_drop_rate: 0.1}
moe: {num_experts: 4, expert_dropout: 0.1}
trainer: {epochs: 2, device: cpu, ema_decay: 0.9}
"""


@pytest.fixture
def run(tmp_path):
    """A function that trains with so many threads and options, and gives the run's folder."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    before = torch.get_num_threads()

    def start(name: str, *options: str, threads: int = 1) -> RunFolder:
        torch.set_num_threads(threads)
        torch.manual_seed(hash(name) % 1000)  # whatever the process did before must not matter
        assert main(["--config", str(recipe), "--output_dir", str(tmp_path / name), *options]) == 0
        return RunFolder(tmp_path / name)

    yield start
    torch.set_num_threads(before)


def _assert_same(one: RunFolder, other: RunFolder) -> None:
    assert rows(one) == rows(other)
    for name in ("last", "best"):
        ours, theirs = (torch.load(getattr(folder, name), weights_only=True) for folder in (one, other))
        assert_equal(ours["state_dict"], theirs["state_dict"], name)
        assert_equal(ours["optimizer_states"], theirs["optimizer_states"], name)


SLOW = [*((router, 1) for router in ROUTER_NAMES[1:]), (ROUTER_NAMES[0], 2)]


@pytest.mark.parametrize(
    ("router", "threads"), [(ROUTER_NAMES[0], 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_seed_repeats(run, router, threads):
    options = ("--moe.router", router)
    one = run("one", *options, threads=threads)
    _assert_same(one, run("other", *options, threads=threads))
    different = torch.load(run("different", *options, "--seed", "1").last, weights_only=True)["state_dict"]
    weights = torch.load(one.last, weights_only=True)["state_dict"]
    assert not torch.equal(different["model.head.weight"], weights["model.head.weight"])


@pytest.mark.slow
def test_workers_change_nothing(run):
    _assert_same(run("alone"), run("helped", "--data.workers", "2"))


@pytest.mark.slow
def test_muon_repeats(run):
    _assert_same(run("one", "--optim.name", "muon"), run("other", "--optim.name", "muon"))


@pytest.mark.slow
def test_a_second_thread_changes_no_more_than_rounding(run):
    """Sums over many numbers are added up in another order, so bits are not promised."""
    one, two = (torch.load(run(f"{n}", threads=n).last, weights_only=True)["state_dict"] for n in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
