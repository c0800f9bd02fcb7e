"""The short help of `vmoe train`: examples and the options that most runs need. `--help-all` prints all options."""

import argparse
import textwrap
from collections.abc import Iterable
from typing import get_args

from vmoe.data.config import SetName
from vmoe.data.sections import Preset
from vmoe.training.recipes import recipe_names

_SHORT = """\
usage: vmoe train [IMAGES] [--config RECIPE] [--SECTION.NAME VALUE ...]

Trains a timm model, dense or with sparse MoE layers, on images, and tests its best checkpoint.

  vmoe train --config digits                                    # a V-MoE on digits, in minutes on a CPU
  vmoe train --config digits --moe null --output_dir runs/dense # its dense twin
  vmoe train --config digits --moe.num_experts 16 --optim.lr 5e-4 --seed 1 --output_dir runs/more
  vmoe train photos/ --init_from pretrained --moe.layers last-2 # your own class folders
  vmoe train labels.csv --model.name vit_small_patch16_224      # a table: path,label[,split]
  vmoe train --config digits --find_lr                          # only finds a learning rate, by a range test
  vmoe train --config digits --find_batch_size                  # only finds the largest batch that fits the memory
  vmoe train --config cifar10_vit_tiny --print_config           # what comes out, without training
  vmoe train --resume --output_dir runs/digits                  # goes on with a run that was stopped
  torchrun --nproc-per-node 8 -m vmoe train --config imagenet_vmoe_s16 --data.root imagenet

IMAGES is a folder of class folders, of tar shards or of a Hugging Face data set, a table (.csv, .tsv, .parquet), an
.npz file or a set's name.
RECIPE is a YAML file or a recipe that comes with vmoe:
{recipes}

Every value of a config is an option by its dotted name. The main ones:

{options}

--help-all explains all {count}; --print_config shows what they come to.

The run's folder gets config.yaml, checkpoints/last.ckpt and best.ckpt, metrics.csv, TensorBoard events, summary.json.
SIGTERM or Ctrl-C finishes the step, saves and exits with 143 or 130; --resume then goes on as if nothing had happened.
Exit codes: 0 done; 2 a mistake in options, config or data, or a loss that became NaN; 130, 143 stopped, resumable.
"""
# Option -> its value and its effect
MAIN = {  # the five most used ones first
    "output_dir": ("DIR", "the run's folder; runs/RECIPE where none is given"),
    "init_from": (
        "WHAT",
        "start from a checkpoint, a run, a file of timm, or timm's weights: pretrained",
    ),
    "trainer.epochs": ("N", "times over the training images"),
    "optim.lr": ("RATE", "highest learning rate"),
    "moe.num_experts": ("E", "experts per layer"),
    "seed": ("N", "of everything random"),
    "data.name": ("SET", ", ".join(get_args(SetName))),
    "data.root": ("PATH", "its images: class folders in PATH/train and PATH/val, or in PATH alone; or the set's file"),
    "data.image_size": ("PIXELS", "side of the images that the model sees"),
    "data.batch_size": ("B", "images per step"),
    "data.workers": ("N", "processes that load images"),
    "data.augment.preset": ("NAME", ", ".join(get_args(Preset))),
    "model.name": ("NAME", "a timm model"),
    "model.kwargs.NAME": ("VALUE", "an argument of that model, such as --model.kwargs.drop_path_rate 0.1"),
    "moe": ("null", "a dense model; any option of moe makes some layers sparse"),
    "moe.layers": ("WHICH", "which MLPs become MoE layers: every-2, last-2, [3,5]"),
    "moe.top_k": ("K", "experts per token"),
    "moe.router": ("NAME", "token_choice, expert_choice, soft, sigmoid, ..."),
    "moe.capacity_factor": ("F", "slots of the experts, 1 being enough for a perfectly even load"),
    "trainer.precision": ("32|bf16|fp16", "what is computed in"),
    "trainer.device": ("NAME", "where it is computed: auto, cpu, cuda, mps"),
    "trainer.compile": ("true|false", "compile the model"),
    "parallel.strategy": ("NAME", "how processes share the work: auto, none, ddp, fsdp, expert"),
}
_MOST_USED, _COLUMN, _WIDTH = 5, 36, 120


def short_help(actions: Iterable[argparse.Action]) -> str:
    """The help page. It takes defaults from `actions`, all options including those of `moe`."""
    by_name = {action.dest: action for action in actions if action.help is not argparse.SUPPRESS}
    recipes = ", ".join(name for name in recipe_names() if "/" not in name)
    lines = [_option_line(name, *text, by_name[name.removesuffix(".NAME")]) for name, text in MAIN.items()]
    return _SHORT.format(
        recipes=textwrap.fill(recipes, _WIDTH, initial_indent="  ", subsequent_indent="  "),
        options="\n".join([*lines[:_MOST_USED], "", *lines[_MOST_USED:]]),
        count=len(by_name),
    )


def _option_line(name: str, value: str, text: str, action: argparse.Action) -> str:
    default = ""
    if isinstance(action.default, str | int | float) and action.default != argparse.SUPPRESS:
        default = f" (default: {str(action.default).lower() if isinstance(action.default, bool) else action.default})"
    start, indent = f"  --{name} {value}".ljust(_COLUMN), " " * _COLUMN
    return textwrap.fill(text + default, _WIDTH, initial_indent=start, subsequent_indent=indent)
