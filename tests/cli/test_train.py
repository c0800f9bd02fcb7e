"""`vmoe train`: options and configs, and what a mistake in them is told."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

import vmoe
from vmoe.checkpoints import build_model
from vmoe.cli.common import run
from vmoe.cli.main import main as vmoe_main
from vmoe.cli.train import main
from vmoe.cli.train_options import parse
from vmoe.config_values import from_plain, to_plain
from vmoe.data.config import DEFAULTS, SetName
from vmoe.errors import UserError
from vmoe.models.cost import count_parameters
from vmoe.training.config import TrainConfig
from vmoe.training.options import option_names

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "some_name.yaml"
    path.write_text(
        "seed: 3\ndata: {name: digits}\noptim: {lr: 0.01}\nmoe: {num_experts: 4}\nmodel: {kwargs: {depth: 2}}\n"
    )
    return str(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_builds_its_model(path):
    config = parse(["--config", str(path)])
    assert config.output_dir == f"runs/{path.stem}"
    image_size = config.data.image_size or DEFAULTS[config.data.name].image_size or 32
    with torch.device("meta"):
        model = build_model(config.model.name, config.model.kwargs, config.moe, 10, image_size)
    parameters = count_parameters(model)
    assert (parameters.total > parameters.active) == (config.moe is not None)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_opens_with_its_command(path):
    assert f"vmoe train --config configs/{path.name}" in path.read_text().partition("data:")[0]


NAMES = [
    "00014",
    "010",
    "08",
    "yes",
    "no",
    "on",
    "null",
    "~",
    "1e3",
    "1.10",
    "2026-01-01",
    "1:30",
    "0x10",
    "1_000",
    "true",
]


def test_names_are_taken_as_they_are_written(tmp_path):
    """By YAML, 00014 is twelve, no is false, and 2026-01-01 a date."""
    path = tmp_path / "names.yaml"
    flow, block = f"[{', '.join(NAMES)}]", "".join(f"\n    - {name}" for name in NAMES)
    for written in (flow, block):
        path.write_text(f"data:\n  name: folder\n  root: 010\n  subset:\n    classes: {written}\noutput_dir: 2026\n")
        config = parse(["--config", str(path)])
        assert (config.data.subset.classes, config.data.root, config.output_dir) == (NAMES, "010", "2026")
    for options in (
        ["--data.subset.classes", flow],
        [f"--data.subset.classes={flow}"],
        ["--data.subset", f"{{classes: {flow}}}"],
        ["--data.subset.classes", f"[{', '.join(NAMES[:-1])}]", "--data.subset.classes+", NAMES[-1]],
    ):
        config = parse(["--data.name", "folder", "--data.root", "010", "--init_from", "010", *options])
        assert (config.data.subset.classes, config.data.root, config.init_from) == (NAMES, "010", "010")
    written_down = yaml.safe_dump(to_plain(config))
    path.write_text(written_down)
    assert parse(["--config", str(path)]).data.subset.classes == NAMES


def test_numbers_stay_numbers(tmp_path):
    path = tmp_path / "numbers.yaml"
    path.write_text(
        "data: {name: digits, batch_size: 010}\noptim: {lr: 1e-3, min_lr: 1.0e-6, clip_norm: null, betas: [0.9, 0.99]}"
        "\nmodel: {kwargs: {depth: 012}}\nmoe: {layers: [01]}\ntrainer: {compile: no, precision: 32}\ninit_from: ~\n"
    )
    config = parse(["--config", str(path)])
    assert (config.data.batch_size, config.model.kwargs["depth"], config.moe.layers) == (10, 12, [1])
    assert (config.optim.lr, config.optim.min_lr, config.optim.clip_norm) == (1e-3, 1e-6, None)
    assert (config.optim.betas, config.trainer.compile, config.init_from) == ((0.9, 0.99), False, None)
    options = ["--data.batch_size", "010", "--moe.layers", "[010,3]", "--optim.lr", "1e-3"]
    config = parse(["--data.name", "digits", *options])
    assert (config.data.batch_size, config.moe.layers, config.optim.lr) == (10, [10, 3], 1e-3)


def test_the_command_line_wins_over_the_file(recipe):
    config = parse(
        ["--config", recipe, "--optim.lr", "0.5", "--moe.layers", "[0,1]", "--model.kwargs.drop_path_rate", "0.2"]
    )
    assert (config.seed, config.optim.lr, config.moe.num_experts, config.moe.layers) == (3, 0.5, 4, [0, 1])
    assert config.model.kwargs == {"depth": 2, "drop_path_rate": 0.2}
    assert config.output_dir == "runs/some_name"


def test_null_is_the_dense_twin_and_an_option_turns_moe_on(recipe):
    assert parse(["--config", recipe, "--moe", "null"]).moe is None
    assert parse(["--data.name", "digits"]).moe is None
    assert parse(["--data.name", "digits", "--moe.top_k", "1"]).moe == vmoe.MoeConfig(top_k=1)


@pytest.mark.parametrize(
    ("recipe", "options", "sides"),
    [
        ("cifar10_cpu", ["--data.name", "folder"], ["32 as the recipe", "224 as folder has it"]),
        ("digits", ["--data.name", "folder"], ["16 as the recipe", "224 as folder has it"]),
        ("digits", ["--data.name", "npz", "--data.root", "x.npz"], ["16 as the recipe"]),
        ("cifar10_cpu", ["--data.name", "folder", "--data.image_size", "64"], None),
        ("cifar10_cpu", ["--data.name", "cifar100"], None),
        ("cifar10_cpu", ["--data.name", "npz", "--data.root", "x.npz"], None),  # its arrays' own size
        ("imagenette_vit_tiny", ["--data.name", "folder"], None),
    ],
)
def test_a_recipe_s_size_goes_with_its_set(recipe, options, sides):
    argv = ["--config", recipe, *options]
    if sides is None:
        assert parse(argv).data.name == options[1]
        return
    with pytest.raises(UserError, match=r"give --data\.image_size too") as error:
        parse(argv)
    assert all(side in str(error.value) for side in sides)


@pytest.mark.parametrize(("text", "magnitude"), [("null", None), ("9", 9), ("[0, 30]", (0, 30))])
def test_plain_types_and_back(recipe, text, magnitude):
    config = parse(["--config", recipe, "--data.augment.randaugment_magnitude", text])
    assert config.data.augment.randaugment_magnitude == magnitude
    plain = to_plain(config)
    assert from_plain(TrainConfig, yaml.safe_load(yaml.safe_dump(plain))) == config


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    """In arguments, where a shell leaves it, and in configs."""
    monkeypatch.setenv("HOME", str(tmp_path))
    written = tmp_path / "mine.yaml"
    written.write_text(
        "data: {name: folder, root: ~/pictures}\noutput_dir: ~/run\ninit_from: ~/start.ckpt\n"
        "distill: {teacher: ~/teacher}\nmodel: {kwargs: {checkpoint_path: ~/w.pth}}\n"
    )
    config = parse(["--config", str(written)])
    paths = (config.data.root, config.output_dir, config.init_from, config.distill.teacher)
    assert paths == tuple(str(tmp_path / name) for name in ("pictures", "run", "start.ckpt", "teacher"))
    assert config.model.kwargs == {"checkpoint_path": str(tmp_path / "w.pth")}
    got = []
    arguments = ["~/a.png", "--out=~/b", "--config", "~", "a~b", "--x=1"]
    assert run(lambda argv: got.extend(argv), arguments) == 0
    assert got == [str(tmp_path / "a.png"), f"--out={tmp_path}/b", "--config", str(tmp_path), "a~b", "--x=1"]


def test_precision_32_needs_no_quotes(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {name: digits}\ntrainer: {precision: 32}")
    assert parse(["--config", str(path)]).trainer.precision == "32"
    digits = ["--data.name", "digits"]
    assert parse([*digits, "--trainer.precision", "32"]) == parse([*digits, "--output_dir", "runs/digits"])


def test_print_config_gives_a_config(recipe, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["--config", recipe, "--print_config"])
    assert end.value.code == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert parse(["--config", str(again), "--output_dir", "x"]) == parse(["--config", recipe, "--output_dir", "x"])


@pytest.fixture
def moved(tmp_path) -> Path:
    """The folder of a run that was begun as runs/n1, with an older version's config.yaml."""
    folder = tmp_path / "moved"
    (folder / "checkpoints").mkdir(parents=True)
    written = {"seed": 5, "output_dir": "runs/n1", "resume": False, "data": {"name": "digits"}}
    (folder / "config.yaml").write_text(f"# vmoe 0.1.0\n{yaml.safe_dump(written)}")
    return folder


def test_a_run_s_config_says_neither_where_nor_whether_it_goes_on(moved):
    """In any order of the options."""
    config, folder = ["--config", str(moved / "config.yaml")], ["--output_dir", "runs/o1"]
    for argv, expected in (
        ([*config], (str(moved), False)),
        ([*config, "--resume"], (str(moved), True)),
        (["--resume", *config], (str(moved), True)),
        (["--resume=auto", *config], (str(moved), "auto")),
        ([*folder, *config], ("runs/o1", False)),
        ([*config, *folder], ("runs/o1", False)),
        (["--resume", *folder, *config], ("runs/o1", True)),
        (["--resume", "--output_dir", str(moved)], (str(moved), True)),
    ):
        parsed = parse(argv)
        assert (parsed.seed, parsed.output_dir, parsed.resume) == (5, *expected), argv


def test_the_command_line_s_resume_wins_over_a_recipe_s(recipe):
    Path(recipe).write_text(f"{Path(recipe).read_text()}resume: auto\n")
    assert parse(["--config", recipe]).resume == "auto"
    for argv in (["--resume", "no", "--config", recipe], ["--config", recipe, "--resume", "no"]):
        assert parse(argv).resume is False


def test_of_two_configs_the_later_one_s_folder_is_taken(recipe, moved):
    Path(recipe).write_text(f"{Path(recipe).read_text()}output_dir: elsewhere\n")
    own = str(moved / "config.yaml")
    assert parse(["--config", own, "--config", recipe]).output_dir == "elsewhere"
    assert parse(["--config", recipe, "--config", own]).output_dir == str(moved)


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "True"], ["--resume=yes"], ["--resume", "on"]])
def test_every_way_to_say_yes_to_resume_needs_a_run(tmp_path, resume):
    with pytest.raises(UserError, match=r"--resume: there is no run in .*lost"):
        parse([*resume, "--output_dir", str(tmp_path / "lost")])


def test_the_first_word_says_which_images(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    config = parse([str(tmp_path / "photos"), "--optim.lr", "0.01"])
    assert (config.data.name, config.data.root) == ("folder", str(tmp_path / "photos"))
    assert (config.output_dir, config.optim.lr) == ("runs/photos", 0.01)
    (tmp_path / "labels.csv").write_text("path,label\n")
    assert parse([f"{tmp_path}/labels.csv"]).data.name == "table"
    assert parse(["cifar10", "--data.root", "pictures"]).data.root == "pictures"
    later = parse(["digits", "--config", "cifar100_tiny", "--data.image_size", "16"])  # comes after a recipe
    assert (later.data.name, later.trainer.epochs) == ("digits", 10)
    for arguments, line in (
        (["stray"], "stray: is no folder, table .* or name of a set"),
        (["digits", "stray"], "stray: belongs to no option"),
        ([""], "the first word is empty"),
        (["cifar100_tiny"], "cifar100_tiny: is a recipe; give it as --config cifar100_tiny"),
        (["~nobody_here/photos/"], "no such folder"),
        (["x" * 5000], "is no folder, table"),
        (["digits", "--data.name", "cifar10"], "digits: says which images to train on, and so does --data.name"),
        ([f"{tmp_path}/lost/"], "lost/': no such folder"),
    ):
        with pytest.raises(UserError, match=line):
            parse(arguments)


def test_a_run_s_folder_alone_is_told_of_resume(moved):
    with pytest.raises(UserError, match=r"--output_dir .*moved: holds a run already; .* --resume to go on with it"):
        parse(["--output_dir", str(moved)])
    with pytest.raises(UserError, match=r"--data.name: must be given"):
        parse(["--output_dir", str(moved / "new")])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--optim.lrr", "3"], ["--optim.lrr", "did you mean optim.lr"]),
        (["--lr", "3"], ["--lr", "optim.lr"]),
        (["--moe.num_expert", "3"], ["did you mean moe.num_experts?"]),
        (["--data.augment.presett", "none"], ["did you mean data.augment.preset?"]),
        (["--zzz", "3"], ["--zzz", "sections", "--help"]),
        (["stray"], ["stray: belongs to no option"]),
        (["--data.table.label", "kind"], ["data.table: is for data.name=table and huggingface, not digits"]),
        (["--optim.lr", "x"], ["--optim.lr x: must be a number"]),
        (["--trainer.epochs", "1.5"], ["--trainer.epochs 1.5: must be a whole number"]),
        (["--moe.num_experts", "x"], ["--moe.num_experts x: must be a whole number"]),
        (["--moe.capacity_factor", "x"], ["--moe.capacity_factor x: must be a number or null"]),
        (["--moe", "3"], ["--moe 3: must be a section of options or null"]),
        (["--trainer.precision", "16"], ["trainer.precision='16': must be 32, bf16 or fp16"]),
        (["--model.kwargs", "3"], ["--model.kwargs 3: must be keys and values"]),
        (["--moe.layers", "{a: 1}"], ["--moe.layers {a: 1}: must be a text or a list"]),
        (["--data.subset.classes", "00014"], ["classes 00014: must be a list, such as [00014], or null"]),
        (["--data.subset.classes", "{a: b}"], ["--data.subset.classes {a: b}: must be a list or null"]),
        (["--optim.betas", "[1]"], ["--optim.betas [1]: must be a list of 2 numbers"]),
        (["--optim.lr"], ["--optim.lr"]),
        (["--config", "missing.yaml"], ["missing.yaml", "No such file"]),
        (["--seed", "-1"], ["seed=-1"]),
        (["--optim.lr", "0"], ["optim.lr=0.0: must be above 0"]),
        (["--optim.name", "sgd"], ["optim.name='sgd': must be adamw, muon or timm:NAME"]),
        (["--optim.adamw_lr", "1e-3"], ["null with optim.name=adamw, which takes optim.lr=0.01"]),
        (["--optim.name", "muon", "--optim.adamw_lr", "0"], ["optim.adamw_lr=0.0: must be above 0"]),
        (["--optim.expert_weight_decay", "-1"], ["optim.expert_weight_decay=-1.0"]),
        (["--optim.layer_decay", "0"], ["optim.layer_decay=0.0: must be in (0, 1]"]),
        (["--model.moe_drop_path", "1"], ["model.moe_drop_path=1.0: must be in [0, 1)"]),
        (["--optim.min_lr", "1"], ["optim.min_lr=1.0"]),
        (["--optim.warmup_epochs", "-1"], ["optim.warmup_epochs=-1.0"]),
        (["--optim.weight_decay", "-1"], ["optim.weight_decay=-1.0"]),
        (["--optim.betas", "[0.9,1]"], ["optim.betas=(0.9, 1.0)"]),
        (["--optim.clip_norm", "0"], ["optim.clip_norm=0.0"]),
        (["--optim.label_smoothing", "1"], ["optim.label_smoothing=1.0"]),
        (["--trainer.epochs", "0"], ["trainer.epochs=0"]),
        (["--trainer.accumulate", "0"], ["trainer.accumulate=0"]),
        (["--trainer.early_stopping", "0"], ["trainer.early_stopping=0"]),
        (["--trainer.log_every", "51"], ["trainer.log_every=51"]),
        (["--trainer.device", "cpu", "--trainer.precision", "fp16"], ["precision='fp16'", "trainer.device=cpu"]),
        (["--trainer.ema_decay", "1"], ["trainer.ema_decay=1.0: must be in (0, 1)"]),
        (["--trainer.cuda_graph", "true", "--trainer.precision", "fp16"], ["cuda_graph=True", "precision=fp16"]),
        (["--trainer.cuda_graph", "true", "--trainer.accumulate", "2"], ["cuda_graph=True", "trainer.accumulate=2"]),
        (["--trainer.cuda_graph", "true", "--trainer.grad_checkpointing", "true"], ["with trainer.grad_checkpointing"]),
        (["--data.pipeline", "device", "--data.augment.preset", "augmix"], ["data.pipeline=device", "data.pipeline=w"]),
        (["--loss.name", "bce", "--loss.logit_adjustment", "1"], ["must be 0 with loss.name=bce"]),
        (["--loss.guidance_weight", "1"], ["left out without loss.super_classes"]),
        (["--loss.clip", "1", "--loss.name", "asymmetric"], ["loss.clip=1.0: must be in [0, 1)"]),
        (["--finetune.lora.alpha", "3"], ["left out without finetune.lora.rank"]),
        (
            ["--trainer.cuda_graph", "true", "--trainer.device", "auto", "--parallel.strategy", "fsdp"],
            ["trainer.cuda_graph=True", "parallel.strategy=fsdp"],
        ),
        (
            ["--trainer.cuda_graph", "true", "--trainer.device", "auto", "--parallel.draws", "sample"],
            ["trainer.cuda_graph=True", "parallel.draws=sample"],
        ),
        (["--moe.expert_width", "0"], ["moe.expert_width=0"]),
        (["--moe.num_experts", "0"], ["moe.num_experts=0"]),
        (["--moe.inject_auxiliary_loss", "true"], ["moe.inject_auxiliary_loss=True"]),
        (["--data.batch_size", "0"], ["data.batch_size=0"]),
        (["--model.kwargs.num_classes", "3"], ["model.kwargs.num_classes=3"]),
        (["--model.kwargs.in_chans", "1"], ["model.kwargs.in_chans=1"]),
        (["--model.kwargs.drop_path_rate", "2"], ["model.kwargs.drop_path_rate=2: must be in [0, 1)"]),
        (["--data.eval_batch_size", "1" + 24 * "0"], ["data.eval_batch_size=1000"]),
        (["--data.augment", "light"], ["--data.augment light: must be a section of options", "--data.augment.NAME"]),
        (["--model.name", "resnet18", "--model.kwargs", "{}", "--moe.num_experts", "4"], ["resnet18", "MLP"]),
        (["--model.name", "vit_tinny"], ["vit_tinny"]),
        (["--model.kwargs.depht", "3"], ["depht"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else "",
)
def test_mistakes_are_one_line_and_exit_code_2(recipe, tmp_path, capsys, options, told):
    output = tmp_path / "run"
    assert main(["--config", recipe, "--output_dir", str(output), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vmoe train: error: ") and error.count("\n") == 1
    assert all(part in error for part in told), error
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optim: {lrr: 1}", "unknown key optim.lrr; did you mean optim.lr"),
        ("optm: {lr: 1}", "unknown key optm; did you mean optim?"),
        ("moe: {top_k: 1, experts: 4}", "unknown key moe.experts; did you mean moe.num_experts"),
        (
            "data: {augment: {preset: none, flipp: 1}}",
            "unknown key data.augment.flipp; did you mean data.augment.flip?",
        ),
        ("optim: {lr: hello}", "--optim.lr hello: must be a number"),
        ("data: {subset: {classes: 00014}}", "classes 00014: must be a list, such as [00014], or null"),
        ("optim: 3", "optim=3: must be a section of options"),
        ("optim: {lr: 1, lr: 2}", "lr is given twice"),
        ("data: null", "data: must not be null"),
        ("seed: null", "seed: must not be null"),
        ("- a\n- b", "must hold keys"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, told):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse(["--config", str(path)])
    assert told in str(error.value)


def test_help_is_short_with_examples(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "labels.csv").touch()
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 70 and max(map(len, text.splitlines())) <= 120
    examples = [line.strip() for line in text.splitlines() if line.startswith("  vmoe train ")]
    assert len(examples) >= 5
    for example in examples:
        actions = {"--find_lr", "--find_batch_size"}  # of this job alone, not of its config
        arguments = [each for each in shlex.split(example, comments=True)[2:] if each not in actions]
        if "--resume" not in arguments and "--print_config" not in arguments:
            parse(arguments)
    for option in re.findall(r"--([a-z][\w.]*)", text.partition("The main ones:")[2].partition("--help-all")[0]):
        assert option in option_names(TrainConfig) or option.startswith("model.kwargs."), option
    assert set(get_args(SetName)) <= set(
        re.findall(r"\w+", text.partition("--data.name SET")[2].partition("(default")[0])
    )
    assert "(default: 0.001)" in text and "--help-all" in text


def test_help_all_teaches_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help-all"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--optim.warmup_epochs",
        "Length of the linear warm-up",
        "--moe.capacity_factor",
        "--resume",
        "--print_config",
    ):
        assert part in text
    assert "dense twin" in text


@pytest.mark.slow
def test_mistakes_in_options_and_predictions_do_not_wait_for_lightning():
    job = "import sys, vmoe.cli.predict, vmoe.export.predictor; from vmoe.cli.train import main; "
    job += "sys.exit(main(['--optim.lrr', '1']) != 2 or 'lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", job], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and "--optim.lrr" in done.stderr


def test_the_vmoe_command(capsys):
    assert vmoe_main(["train", "--optim.lr", "x"]) == 2
    assert vmoe_main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert vmoe_main([]) == 0
    assert "heatmap" in capsys.readouterr().out
