"""How soon the commands answer: by what they import, which does not depend on how busy the machine is."""

import runpy
import subprocess
import sys

import pytest

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
