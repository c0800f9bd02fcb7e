"""How soon the commands answer: by what they import, which does not depend on how busy the machine is."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vmoe.cli.main import JOBS, main
from vmoe.cli.short_help import SHORT

HELP_AND_MISTAKES = """
import sys
from vmoe.cli.main import JOBS, main

for arguments in (["--help"], ["--version"], ["trian"], ["train", "--config", "digits", "--optim.lr", "fast"]):
    main(arguments)
for job in JOBS:
    for option in ("--help", "--nonsense"):
        try:
            assert main([job, option]) == 2
        except SystemExit as stop:
            assert option == "--help" and not stop.code
print(sorted({"cv2", "lightning", "matplotlib", "timm", "torch", "torchvision"} & set(sys.modules)))
"""
COMPLETED = """
import json, os, sys
from vmoe.cli.completion import complete

os.environ.update({"_ARGCOMPLETE_IFS": "|", "_ARGCOMPLETE_STDOUT_FILENAME": "answer"})
found = {}
for line in json.loads(sys.argv[1]):
    os.environ.update({"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1"})
    try:
        complete(exit_method=sys.exit)
    except SystemExit:
        found[line] = [word.strip() for word in open("answer").read().split("|")]
print(json.dumps(found))
"""
REGISTERED = """
import vmoe
import sys

assert "timm" not in sys.modules
import timm

print(timm.is_model("vmoe_small_patch4_32"), callable(vmoe.create_model), vmoe.moe.MoeConfig is vmoe.MoeConfig)
"""


def _said(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_help_and_mistakes_in_options_do_not_wait_for_torch():
    assert _said(HELP_AND_MISTAKES) == "[]"


@pytest.mark.slow
def test_timm_knows_our_models_whichever_is_imported_first():
    assert _said(REGISTERED) == _said(f"import timm\n{REGISTERED.replace('assert', '# assert')}") == "True True True"


def test_python_runs_the_package_as_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vmoe", "trian"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("vmoe", run_name="__main__")
    assert stop.value.code == 2 and "did you mean train?" in capsys.readouterr().err


def _printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    assert not stop.value.code
    return capsys.readouterr().out


def test_the_shell_completes(tmp_path):
    pytest.importorskip("argcomplete", reason="the extra `completion` is not installed")
    (tmp_path / "photos").mkdir()
    expected = {
        "vmoe ": ({"train", "evaluate", "import-jax"}, set()),
        "vmoe ev": ({"evaluate"}, {"train"}),
        "vmoe evaluate runs/a --cap": ({"--capacity-factor"}, {"--json"}),
        "vmoe evaluate ": ({"photos/"}, {"--json"}),
        "vmoe train ph": ({"photos/"}, {"digits"}),
        "vmoe train --moe.num": ({"--moe.num_experts"}, {"--moe.top_k"}),
        "vmoe train photos/ --data.crop ": ({"centre", "squash", "letterbox"}, {"photos/"}),
        "vmoe train --config dig": ({"digits"}, {"cifar10_best"}),
        "vmoe train --optim.lr ": (set(), {"photos/"}),
        "vmoe train --loss.super_classes ": ({"cifar100", "photos/"}, {"digits"}),
        "vmoe tune --out runs -- --optim.sch": ({"--optim.schedule"}, {"--out"}),
        "vmoe plan --optim.sch": ({"--optim.schedule"}, {"--gpus"}),
        "vmoe benchmark ": ({"layer", "model"}, {"train"}),
        "vmoe trian --o": (set(), {"--optim.lr"}),
    }
    lines = json.dumps(list(expected))
    done = subprocess.run([sys.executable, "-c", COMPLETED, lines], cwd=tmp_path, capture_output=True, check=True)
    for line, found in json.loads(done.stdout).items():
        some, others = expected.pop(line)
        assert some <= {*found} and not others & {*found}, (line, found)
    assert not expected


def test_help_of_vmoe_has_every_job_and_examples(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert set(JOBS) <= set(re.findall(r"^  ([a-z-]+) +\w", text, re.MULTILINE))
    assert "  vmoe train --config digits" in text


@pytest.mark.parametrize("job", SHORT)
def test_help_is_short_and_help_all_has_the_rest(capsys, job):
    text, all_of_it = _printed(capsys, job, "--help"), _printed(capsys, job, "--help-all")
    assert JOBS[job][1:] in text and len(text.splitlines()) <= 30
    shown = re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)
    assert len(shown) == 5 and all(f"  {example}\n" in text for example in SHORT[job].examples)
    known = set(re.findall(r"^  (--[\w-]+)", all_of_it, re.MULTILINE))
    own = [example for example in SHORT[job].examples if example.startswith(f"vmoe {job} ")]
    used = re.findall(r" (--[\w-]+)", " ".join(own))
    assert {*shown, *used} < known


@pytest.mark.slow  # evaluations of a small model, and its export to ONNX
def test_examples_of_the_short_help_run_as_pasted(tmp_path, monkeypatch, save_run):
    from PIL import Image

    save_run("runs/digits", {"num_experts": 4})
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in ("photo.jpg", "photos/a.jpg", "photos/b.jpg"):
        Image.new("RGB", (40, 30), "teal").save(name)
    for job in ("evaluate", "predict", "export"):
        for example in SHORT[job].examples:
            assert main(shlex.split(example)[1:]) == 0, example
