"""Files of Swin-MoE: any number of ranks gives the same model; missing, damaged and foreign files are one line."""

import shutil
from pathlib import Path

import pytest
import torch

import vmoe
from vmoe.errors import UserError

FOLDER = Path(__file__).parent.parent / "fixtures" / "swin_moe"
NAME = "tiny_cosine_4expert_1rank"
EXPERTS = ".mlp._moe_layer.experts."
SLICED = "tiny_linear_2expert_sliced_4rank"


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def write(path: Path, tensors: dict) -> None:
    torch.save({"model": tensors}, path)


def spread(folder: Path, ranks: int, slices: int, writes_master: bool = True) -> None:
    """Writes the experts of the fixture again as a training on other GPUs would have."""
    experts, master = (load_tensors(FOLDER / NAME / f"{NAME}.pth.{kind}") for kind in ("rank0", "master"))
    for name in [name for name in master if EXPERTS in name]:  # zeros, of which a rank knows its own
        master[name] = master[name].chunk(ranks // slices)[0].chunk(slices, 2)[0].clone()
    for rank in range(ranks):
        own = {}
        for name, value in experts.items():
            axis = 2 if name.endswith("bias") else 1
            own[name] = value.chunk(ranks // slices)[rank // slices].chunk(slices, axis)[rank % slices].clone()
        write(folder / f"x.pth.rank{rank}", own if writes_master else master | own)
    if writes_master:
        write(folder / "x.pth.master", master)


@pytest.fixture(scope="module")
def expected():
    return vmoe.load_swin_moe_checkpoint(FOLDER / NAME).state_dict()


@pytest.mark.parametrize(("ranks", "slices"), [(2, 1), (4, 1), (16, 4)])
def test_any_number_of_ranks_gives_the_same_model(tmp_path, expected, ranks, slices):
    spread(tmp_path, ranks, slices)
    model = vmoe.load_swin_moe_checkpoint(tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert vmoe.moe_layers(model)[0][1].config.capacity_multiple_of == slices


@pytest.mark.parametrize("place", ["x.pth", "x", "x.pth.rank1", "x.pth.master"])
def test_any_name_of_the_files_is_enough(tmp_path, expected, place):
    spread(tmp_path, 2, 1)
    assert vmoe.load_swin_moe_checkpoint(tmp_path / place).state_dict().keys() == expected.keys()


def test_one_merged_file_and_ranks_with_all_tensors_are_read(tmp_path, expected):
    experts, master = (load_tensors(FOLDER / NAME / f"{NAME}.pth.{kind}") for kind in ("rank0", "master"))
    # as current Tutel's merge writes them
    is_bias = {name: EXPERTS in name and name.endswith("bias") for name in master | experts}
    merged = {name: value.squeeze(1) if is_bias[name] else value for name, value in (master | experts).items()}
    merged |= {f"{name.partition(EXPERTS)[0]}.mlp._moe_layer._num_global_experts": 4 for name in experts}
    write(tmp_path / "merged.pth", merged)
    (tmp_path / "ranks").mkdir()
    spread(tmp_path / "ranks", 2, 1, writes_master=False)
    for path in (tmp_path / "merged.pth", tmp_path / "ranks"):
        state = vmoe.load_swin_moe_checkpoint(path).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_trained_biases_of_sliced_experts_are_put_together(tmp_path):
    shutil.copytree(FOLDER / SLICED, tmp_path, dirs_exist_ok=True)
    biases = {}
    for rank in range(4):
        tensors = load_tensors(tmp_path / f"{SLICED}.pth.rank{rank}")
        for layer, width in (("layers.2.blocks.1", 16), ("layers.3.blocks.1", 32)):
            biases[layer, rank] = torch.randn(1, 1, width)
            tensors[f"{layer}{EXPERTS}batched_fc2_bias"] = biases[layer, rank]
        write(tmp_path / f"{SLICED}.pth.rank{rank}", tensors)
    for name, layer in vmoe.moe_layers(vmoe.load_swin_moe_checkpoint(tmp_path)):
        parts = [biases[name.removesuffix(".mlp"), rank].flatten() for rank in range(4)]
        assert torch.equal(layer.experts.fc2.bias, torch.stack([torch.cat(parts[:2]), torch.cat(parts[2:])]))


def change(file: str, **changes):
    """Spoils a file: tensors by the end of their names get a value, or go where it is None."""

    def spoil(folder: Path) -> None:
        tensors = load_tensors(folder / file)
        for end, value in changes.items():
            names = [name for name in tensors if name.endswith(end.replace("__", "."))] or [end.replace("__", ".")]
            for name in names:
                tensors.pop(name, None)
                if value is not None:
                    tensors[name] = value(name) if callable(value) else value
        write(folder / file, tensors)

    return spoil


def cut(file: str):
    def spoil(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:-500])

    return spoil


def flip(file: str):
    def spoil(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        middle = len(content) // 2
        content[middle : middle + 64] = bytes(64)
        (folder / file).write_bytes(bytes(content))

    return spoil


def remove(*files: str):
    return lambda folder: [(folder / file).unlink() for file in files]


def other(name: str, content):
    return lambda folder: torch.save(content, folder / name)


R0, R1, R3, MASTER = "x.pth.rank0", "x.pth.rank1", "x.pth.rank3", "x.pth.master"


@pytest.mark.parametrize(
    ("spoil", "words"),
    {
        "no file": (remove(R0, R1, "x.pth.rank2", R3, MASTER), ["holds no files"]),
        "a rank in the middle is missing": (remove(R1), ["x.pth.rank1: no such file"]),
        "the last rank is missing": (remove(R3), ["in 4 files", "3 are there", "rank 3 to 3"]),
        "the master is missing": (remove(MASTER), ["x.pth.master: no such file"]),
        "the ranks are missing": (remove(R0, R1, "x.pth.rank2", R3), ["x.pth.rank0: no such file"]),
        "a rank too many": (
            lambda folder: shutil.copy(folder / R3, folder / "x.pth.rank4"),
            ["4 files", "5 are there"],
        ),
        "a second checkpoint": (lambda folder: shutil.copy(folder / R3, folder / "y.pth.rank0"), ["several", "x.pth"]),
        "a whole file beside": (other("x.pth.global", {"model": {}}), ["also x.pth.global"]),
        "a rank cut off": (cut("x.pth.rank2"), ["x.pth.rank2", "cut off"]),
        "a master cut off": (cut(MASTER), [MASTER, "cut off"]),
        "a rank damaged": (flip("x.pth.rank2"), ["x.pth.rank2", "damaged"]),
        "Python objects": (other(R0, {"model": {}, "config": Path()}), [R0, "Python objects"]),
        "no state dict": (other(R0, [1]), [R0, "no state dict"]),
        "a rank of another model": (change(R1, layers__3=None, batched_fc1_w=torch.ones(1, 2, 32)), [R1, "rank0"]),
        "a tensor of an expert is missing": (change(R1, batched_fc1_bias=None), [R1, "absent"]),
        "a tensor is missing": (change(MASTER, norm1__weight=None), ["lacks", "norm1.weight"]),
        "no stem": (change(MASTER, patch_embed__proj__weight=None), ["lacks patch_embed.proj.weight"]),
        "no gates": (change(MASTER, sim_matrix=None), ["lacks", "wg.weight"]),
        "an unknown tensor": (change(MASTER, absolute_pos_embed=torch.ones(1, 2)), ["holds absolute_pos_embed"]),
        "a wrong shape": (change(MASTER, head__bias=torch.ones(3)), ["head.bias has shape (3,)"]),
        "an expert of a wrong shape": (change(R0, batched_fc1_w=torch.ones(1, 5, 32)), ["no parts of 4 experts"]),
        "no masks": (change(MASTER, attn_mask=None), ["size of its images", "img_size"]),
        "a table of no offsets": (
            change(MASTER, relative_coords_table=lambda name: torch.full((1, 7, 7, 2), torch.nan)),
            ["relative_coords_table"],
        ),
    }.values(),
    ids=lambda value: None,
)
def test_a_spoilt_set_of_files_is_one_line(tmp_path, spoil, words):
    spread(tmp_path, 4, 1)
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        vmoe.load_swin_moe_checkpoint(tmp_path)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"img_size": 65}, "img_size=65: must be a multiple of 32"),
        ({"img_size": 96}, "img_size=96: a stage of 6x6 tokens is not filled by windows of 4"),
        ({"window_size": 0}, "window_size=0"),
        ({"config": {"TOP_VALUE": 5}}, "top_k=5"),
        ({"config": {"CAPACITY_FACTOR": "much"}}, "CAPACITY_FACTOR='much' must be a number"),
        ({"config": {"USE_BPR": 1}}, "USE_BPR=1 must be true or false"),
        ({"config": {"TOP": 1}}, "TOP is no setting"),
        ({"config": "/no/such.yaml"}, "/no/such.yaml"),
        ({"slices_per_expert": 0}, "capacity_multiple_of=0"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(arguments, word):
    with pytest.raises(UserError) as error:
        vmoe.load_swin_moe_checkpoint(FOLDER / NAME, **arguments)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_the_settings_of_swin_moe_s_configs_are_the_layer_s():
    settings = {
        "TOP_VALUE": 2,
        "CAPACITY_FACTOR": 2.0,
        "NORMALIZE_GATE": True,
        "USE_BPR": False,
        "GATE_NOISE": 0.5,
        "MOE_DROP": 0.2,
        "AUX_LOSS_WEIGHT": 0.03,
        "IS_GSHARD_LOSS": True,
    }
    moe = vmoe.moe_layers(vmoe.load_swin_moe_checkpoint(FOLDER / NAME, config=settings))[0][1].config
    assert (moe.top_k, moe.capacity_factor, moe.eval_capacity_factor, moe.renormalize) == (2, 2.0, 2.0, True)
    assert (moe.batch_priority, moe.noise_std, moe.expert_dropout, moe.group) == (False, 0.5, 0.2, "batch")
    assert (moe.importance_loss_weight, moe.load_loss_weight, moe.gshard_loss_weight) == (0.0, 0.0, 0.03)
    by_file = vmoe.load_swin_moe_checkpoint(FOLDER / NAME, config=FOLDER / NAME / "config.yaml")
    assert vmoe.moe_layers(by_file)[0][1].config.expert_dropout == 0.0


@pytest.mark.parametrize(("given", "factor"), [(1.5, 1.5), (-1.5, 1.5), (0.0, None)])
def test_a_negative_capacity_factor_is_a_bound_and_none_is_no_bound(given, factor):
    model = vmoe.load_swin_moe_checkpoint(FOLDER / NAME, config={"CAPACITY_FACTOR": given})
    moe = vmoe.moe_layers(model)[0][1].config
    assert moe.capacity_factor == moe.eval_capacity_factor == factor
