"""The mistakes that users make, with a line for each in docs/errors.md.

`python tests/reliability/mistakes.py > docs/errors.md` writes that page from what the tools print.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is run as a script

from reliability.spoilt import spoil

from vmoe.cli.main import main

PAGE = """# Errors

A mistake in an option, a config, a checkpoint or the data is one line on stderr, `vmoe JOB: error: LINE`, and exit
code 2; nothing is written. Below are {count} kinds of mistakes with their lines, as the tools print them; `…` stands
for words of a library, which change with its version. Whatever ends in a traceback is a bug: please report it.

Exit codes: 0 done; 1 a run of a sweep failed; 2 a mistake; 130 and 143 stopped by Ctrl-C or SIGTERM, where `vmoe train`
can be resumed. A run of several processes of which one is killed ends with torchrun's exit code 1.
{sections}
"""
SECTION = """
## vmoe{job}

| mistake | arguments | line |
|---|---|---|
{rows}
"""


class Mistake(NamedTuple):
    """What is wrong, the arguments after `vmoe JOB` in a folder that `spoil` made, and the words of a library."""

    what: str
    arguments: str
    library: str = r"(?!)"


def _config(what: str, options: str, library: str = r"(?!)") -> Mistake:
    return Mistake(what, f"--config tiny.yaml --output_dir new {options}", library)


def _file(what: str, name: str, library: str = r"(?!)") -> Mistake:
    return Mistake(what, f"--config {name} --output_dir new", library)


# What torch, safetensors or Python find wrong with a file
_OF_TORCH = r"(?<=damaged \().*(?=\))|(?<=model \()(Error|MoeConfig\.__init__).*(?=\))"
_OPENED = [
    ("a file that is not there", "lost.ckpt"),
    ("a folder without a checkpoint", "nothing"),
    ("a text file", "text.ckpt"),
    ("a checkpoint that was cut off", "cut.ckpt"),
    ("a checkpoint with damaged bytes", "flipped.ckpt"),
    ("another zip file", "zip.ckpt"),
    ("a pickle that runs code", "code.ckpt"),
    ("a plain pickle", "pickle.ckpt"),
    ("a checkpoint of other software", "foreign.ckpt"),
    ("a checkpoint of a newer version", "newer.ckpt"),
    ("a checkpoint without a version", "versionless.ckpt"),
    ("fewer class names than the weights have", "classes.ckpt"),
    ("class names that are a number", "class_number.ckpt"),
    ("an image size that is a word", "image_size.ckpt"),
    ("an image size of ten million", "huge.ckpt"),
    ("one channel's mean for three", "mean.ckpt"),
    ("a standard deviation of 0", "zero_std.ckpt"),
    ("a config without data", "without_data.ckpt"),
    ("data that are a number", "data_number.ckpt"),
    ("a batch size that is a word", "data_value.ckpt"),
    ("a config that is a text", "config_text.ckpt"),
    ("a model of a hub", "hub.ckpt"),
    ("model arguments that are a number", "kwargs.ckpt"),
    ("a model argument that names a function", "class_argument.ckpt"),
    ("an MoE option of another version", "knob.ckpt"),
    ("a number of experts that is a word", "knob_type.ckpt"),
    ("a checkpoint without weights", "without_weights.ckpt"),
    ("weights that are a list", "weights_list.ckpt"),
    ("a checkpoint without its step", "without_step.ckpt"),
    ("weights that are NaN", "nan.ckpt"),
    ("a text file as safetensors", "text.safetensors"),
    ("a safetensors header of 2^60 bytes", "header.safetensors"),
    ("a safetensors tensor of 2^40 numbers", "shape.safetensors"),
    ("safetensors of other software", "foreign.safetensors"),
    ("safetensors of a newer version", "newer.safetensors"),
]

MISTAKES: dict[str, list[Mistake]] = {
    "train": [
        _config("an unknown option", "--optim.lrr 3"),
        _config("an option without its section", "--lr 3"),
        _config("an option like no other", "--zzz 3"),
        _config("a stray word", "stray"),
        _config("an option without its value", "--optim.lr", r"[Ee]xpected.*"),
        _config("a word for a number", "--optim.lr fast"),
        _config("a fraction for a whole number", "--trainer.epochs 1.5"),
        _config("a number for a section", "--moe 3"),
        _config("a name for a section", "--data.augment light"),
        _config("a choice that is none", "--optim.name sgd"),
        _config("a seed below 0", "--seed -1"),
        _config("a learning rate of 0", "--optim.lr 0"),
        _config("a smallest rate above the largest", "--optim.min_lr 1"),
        _config("a decay of 1", "--optim.betas [0.9,1]"),
        _config("one number for two", "--optim.betas [1]"),
        _config("no epochs", "--trainer.epochs 0"),
        _config("a precision that is none", "--trainer.precision 16"),
        _config("fp16 on the CPU", "--trainer.precision fp16"),
        _config("a CUDA graph on the CPU", "--trainer.cuda_graph true"),
        _config("more choices than experts", "--moe.top_k 9"),
        _config("no experts", "--moe.num_experts 0"),
        _config("a capacity of 0", "--moe.capacity_factor 0"),
        _config("a capacity that leaves no place", "--moe.capacity_factor 0.001 --moe.capacity_rounding round"),
        _config("an unknown router", "--moe.router top"),
        _config("a router's impossible combination", "--moe.router soft --moe.batch_priority true"),
        _config("a layer that is not there", "--moe.layers [7]"),
        _config("a pattern of layers that is none", "--moe.layers often-2"),
        _config("batches of 0", "--data.batch_size 0"),
        _config("images that patches do not fill", "--data.image_size 18"),
        _config("a share over 1", "--data.val_fraction 2"),
        _config("two subsets in one", "--data.subset.fraction 0.5"),
        _config("a class that is not there", "--data.subset.classes [cat]"),
        _config("an unknown model", "--model.name vit_tinny"),
        _config("a model without MLPs", "--model.name resnet18 --model.kwargs {}"),
        _config("an unknown model argument", "--model.kwargs.depht 3", r"(?<=: ).*depht.*"),
        _config("a model argument that the data decide", "--model.kwargs.num_classes 3"),
        _config("an unknown data set", "--data.name digitz"),
        _config("a parallel strategy that is none", "--parallel.strategy all"),
        _config("a folder that is a file", "--output_dir tiny.yaml/run"),
        _config("a checkpoint to start from that is not there", "--init_from lost.ckpt"),
        _config("a folder that holds a run", "--output_dir finished"),
        _config("a finished run without its checkpoint", "--output_dir finished --resume"),
        _file("a config that is not there", "lost.yaml"),
        _file("a config that is a folder", "nothing"),
        _file("a config that is a list", "list.yaml"),
        _file("an empty config", "empty.yaml"),
        _file("broken YAML", "broken.yaml", r"(?<=YAML: ).*"),
        _file("a config that is no UTF-8", "latin.yaml", r"(?<=YAML: ).*"),
        _file("a key given twice", "twice.yaml", r" in .*"),
        _file("YAML that runs code", "code.yaml", r"(?<=YAML: ).*"),
        _file("an unknown section", "unknown_section.yaml"),
        _file("an unknown key", "unknown_key.yaml"),
        _file("a word for a number in a config", "word.yaml"),
        _file("a number for a section in a config", "flat.yaml"),
        _file("null for a section", "null.yaml"),
        _file("an infinite rate", "infinite.yaml"),
        _file("NaN in a config", "nan.yaml"),
        _config("a data folder that is not there", "--data.name folder --data.root lost"),
        _config("no train folder", "--data.name folder --data.root without_train"),
        _config("no val or test folder", "--data.name folder --data.root without_val"),
        _config("images without class folders", "--data.name folder --data.root class_folders", r"Couldn.*folder in"),
        _config("a class folder without images", "--data.name folder --data.root tree", r"Supported.*webp"),
        _config("a test class unknown in training", "--data.name folder --data.root other_class"),
        _config("an npz that is not there", "--data.name npz --data.root lost.npz"),
        _config("an npz that is a folder", "--data.name npz --data.root run"),
        _config("an npz that is a text", "--data.name npz --data.root text.npz"),
        _config("an npz without test labels", "--data.name npz --data.root npz_without.npz"),
        _config("an npz of fractions", "--data.name npz --data.root npz_float.npz"),
        _config("an npz of another shape", "--data.name npz --data.root npz_shape.npz"),
        _config("an npz with labels below 0", "--data.name npz --data.root npz_labels.npz"),
        _config("an npz with labels far apart", "--data.name npz --data.root npz_gaps.npz"),
        _config("an npz with too few labels", "--data.name npz --data.root npz_few.npz"),
        _config("an npz with too few names", "--data.name npz --data.root npz_names.npz"),
        _config("an npz that runs code", "--data.name npz --data.root npz_code.npz", r"(?<=file \().*(?=\);)"),
        _config("a folder without shards", "--data.name webdataset --data.root nothing"),
        _config("shards that are no tar files", "--data.name webdataset --data.root shards", r"(?<=d \().*(?=\))"),
    ],
    "evaluate": [
        *(Mistake(what, f"{name} --out new", _OF_TORCH) for what, name in _OPENED),
        Mistake("other classes than the data's", "three --out new"),
        Mistake("an option of experts for a dense model", "dense --capacity-factor 1 --out new"),
        Mistake("a capacity that is a word", "run --capacity-factor much --out new"),
        Mistake("a capacity that leaves no place", "rounded --capacity-factor 0.01 --out new"),
        Mistake("more choices than experts", "run --top-k 5 --out new"),
        Mistake("an unknown data set", "run --data digitz --out new"),
        Mistake("a data folder that is not there", "run --data folder --root lost --out new"),
        Mistake("no images a batch", "run --batch-size 0 --out new"),
        Mistake("a split that is none", "run --split train --out new", r"\(choose.*\)"),
        Mistake("an option without the one it belongs to", "run --shots 5 --out new"),
        Mistake("a corruption that is none", "run --corruptions gausian_noise --out new"),
        Mistake("a severity that is none", "run --corruptions --severities 6 --out new", r"\(choose.*\)"),
        Mistake("a device that is not there", "run --device cuda:77 --out new"),
        Mistake("a device that is none", "run --device abacus --out new"),
        Mistake("an output folder that is a file", "run --out tiny.yaml"),
        Mistake("a result in a place that is a file", "run --json tiny.yaml/x.json"),
        Mistake("an ensemble of other classes", "run --ensemble-with three --out new"),
        Mistake("an unknown option", "run --capacity 1 --out new"),
        Mistake("a damaged image", "one --data folder --root damaged_val --out new", r"(?<=image \().*(?=\);)"),
    ],
    "heatmap": [
        Mistake("an image that is not there", "run lost.png --out new"),
        Mistake("a folder without images", "run nothing --out new"),
        Mistake("a text file", "run text.jpg --out new"),
        Mistake("an empty file", "run empty.png --out new"),
        Mistake("an image that was cut off", "run cut.png --out new", r"(?<=image \().*(?=\);)"),
        Mistake("an image of too many pixels", "run bomb.png --out new", r"(?<=image \().*(?=\);)"),
        Mistake("an image of floating-point pixels", "run float.tif --out new"),
        Mistake("a dense model", "dense photo.png --out new"),
        Mistake("a layer that is not there", "run photo.png --layers 0 --out new"),
        Mistake("a capacity below 0", "run photo.png --capacity-factor -1 --out new"),
        Mistake("a capacity that leaves no place", "rounded photo.png --capacity-factor 0.01 --out new"),
        Mistake("weights that are NaN", "nan.ckpt photo.png --out new"),
        Mistake("no place for the pages", "run photo.png"),
        Mistake("an output folder that is a file", "run photo.png --out tiny.yaml"),
    ],
    "explore": [
        Mistake("a dense model", "dense --out new"),
        Mistake("the same checkpoint twice", "run run --out new"),
        Mistake("checkpoints of other classes", "run three --out new"),
        Mistake("no images in the sample", "run --out new --sample 0"),
        Mistake("too few replicates", "run --out new --replicates 5"),
        Mistake("a seed below 0", "run --out new --seed -1"),
        Mistake("images and a data set", "run --out new --images photo.png --data digits"),
        Mistake("a damaged image", "run --out new --images cut.png", r"(?<=image \().*(?=\);)"),
        Mistake("an output folder that is a file", "run --out tiny.yaml --images photo.png"),
    ],
    "predict": [
        Mistake("a model that is not there", "lost.onnx photo.png"),
        Mistake("an ONNX file that is a text", "text.onnx photo.png"),
        Mistake("an image that is not there", "run lost.png"),
        Mistake("no image that can be read", "run text.jpg empty.png"),
        Mistake("no answers", "run photo.png --top 0"),
        Mistake("the routing of a dense model", "dense photo.png --routing"),
        Mistake("weights that are NaN", "nan.ckpt photo.png"),
        Mistake("a result in a place that is a file", "run photo.png --csv tiny.yaml/x.csv"),
    ],
    "export": [
        Mistake("a checkpoint that is not there", "lost.ckpt --out new.safetensors"),
        Mistake("a name of another format", "run --out new.bin"),
        Mistake("an option of another format", "run --format onnx --out new.onnx --dtype float16"),
        Mistake("a licence without a hub", "run --out new.safetensors --license mit"),
        Mistake("a place that is a file", "run --out tiny.yaml/new.safetensors"),
    ],
    "consolidate": [
        Mistake("a run that is not there", "lost --out new.safetensors"),
        Mistake("a name of another format", "run --out new.ckpt"),
    ],
    "compare": [
        Mistake("a run that is not there", "lost --out new"),
        Mistake("a folder that is no run's", "nothing --out new"),
        Mistake("a damaged summary", "finished --out new", r"(?<=run \().*(?=\))"),
        Mistake("no runs", "--out new"),
    ],
    "sweep": [
        Mistake("a study that is not there", "lost.yaml --out new", r"\[Errno.*"),
        Mistake("a study without a config", "study_without.yaml --out new"),
        Mistake("a study whose config is lost", "study_lost.yaml --out new"),
        Mistake("seeds that are a number", "study_seeds.yaml --out new"),
        Mistake("arms that are a list", "study_arms.yaml --out new"),
        Mistake("an arm that is not there", "study.yaml --out new --arms b"),
        Mistake("no runs at once", "study.yaml --out new --jobs 0"),
        Mistake("a place that is a file", "study.yaml --out tiny.yaml/runs"),
    ],
    "plan": [
        Mistake("no config", "--out new"),
        Mistake("an unknown GPU", "--config tiny.yaml --gpu h1000 --out new"),
        Mistake("an unknown network", "--config tiny.yaml --network pigeon --out new"),
        Mistake("no GPUs", "--config tiny.yaml --gpus 0 --out new"),
        Mistake("an unknown option", "--config tiny.yaml --data.batch_sizes 8 --out new"),
    ],
    "benchmark": [
        Mistake("no job", ""),
        Mistake("a job that is none", "layers", r"\(choose.*\)"),
        Mistake("a size that is none", "layer --cases S17"),
        Mistake("more choices than experts", "layer --device cpu --top-k 64"),
        Mistake("no rounds", "layer --rounds 0"),
        Mistake("an unknown model", "model --device cpu --model vit_none"),
        Mistake("a config that is not there", "data --config lost.yaml"),
        Mistake("no seconds", "data --config tiny.yaml --seconds 0 --out new"),
    ],
    "make-shards": [
        Mistake("a folder that is not there", "lost --out new"),
        Mistake("no train folder", "without_train --out new"),
        Mistake("a test class unknown in training", "other_class --out new"),
        Mistake("a place that is taken", "tree --out run"),
        Mistake("a place that is a file", "tree --out tiny.yaml/new"),
        Mistake("no images a shard", "tree --out new --images 0"),
    ],
    "import_jax": [
        Mistake("a checkpoint that is not there", "lost --out new.ckpt"),
        Mistake("a name of another format", "jax --out new.npz"),
        Mistake("more choices than experts", "jax --out new.ckpt --top-k 9"),
        Mistake("images that patches do not fill", "jax --out new.ckpt --img-size 31"),
        Mistake("class names that are too few", "jax --out new.ckpt --class-names tiny.yaml"),
        Mistake("class names that are not there", "jax --out new.ckpt --class-names lost.txt"),
        Mistake("a place that is a file", "jax --out tiny.yaml/new.ckpt"),
    ],
    "": [Mistake("a job that is none", "trian"), Mistake("a job like no other", "dance")],
}  # fmt: skip


def answer(job: str, mistake: Mistake) -> tuple[int, str]:
    """The exit code and all of stderr, in the folder that `spoil` made."""
    arguments = shlex.split(mistake.arguments)
    with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
        code = main([job, *arguments] if job else arguments)
    return code, told.getvalue()


def line_of(error: str, mistake: Mistake) -> str:
    """The line of docs/errors.md: without the job, and without a library's words."""
    line = error.strip().partition(" error: ")[2]
    return re.sub(mistake.library, "…", line, count=1)


def row(mistake: Mistake, line: str) -> str:
    """A row of the page."""
    quoted = f"`` {line} ``" if "`" in line else f"`{line}`"
    cells = [mistake.what, f"`{mistake.arguments}`" if mistake.arguments else "", quoted]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """The whole page; the mistakes are made in a new folder."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        spoil(Path(folder))
        os.chdir(folder)
        try:
            sections = [
                SECTION.format(
                    job=f" {job}".rstrip(),
                    rows="\n".join(row(each, line_of(answer(job, each)[1], each)) for each in mistakes),
                ).rstrip()
                for job, mistakes in MISTAKES.items()
            ]
        finally:
            os.chdir(before)
    count = sum(map(len, MISTAKES.values()))
    return PAGE.format(count=count, sections="\n".join(sections)).rstrip() + "\n"


if __name__ == "__main__":
    importlib.import_module("torch").set_num_threads(1)
    print(page(), end="")
