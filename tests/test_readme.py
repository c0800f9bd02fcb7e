"""What README and the pages for newcomers show, run as it stands there; links, pictures and code of every page."""

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vmoe
from vmoe.cli.main import JOBS, main
from vmoe.config_values import section_type
from vmoe.training.config import TrainConfig
from vmoe.training.options import option_types

REPOSITORY = Path(__file__).parents[1]
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SMALL = {  # timm's smallest model and one epoch in the place of what a page shows
    'model="vit_tiny_patch16_224"': 'model="test_vit"',
    "epochs=10": 'epochs=1, options={"data.image_size": 64, "data.batch_size": 8}',
    '"vit_tiny_patch16_224", moe, num_classes=data': '"test_vit", moe, num_classes=data',
    "batch_size=128": "batch_size=8, image_size=160",
    "max_epochs=5": "max_epochs=1",
    "--trainer.epochs 10": "--trainer.epochs 1 --model.name test_vit --data.image_size 64 --data.batch_size 8",
    # the page's other way to the same folder, which a reader takes in the place of the first
    "safetensors --output_dir runs/photos": "safetensors --output_dir runs/few --trainer.epochs 1",
    "--config digits": "--config digits --trainer.epochs 1 --data.subset.fraction 0.05",
}


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The working folder of the snippets: the repository's assets and a few pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(REPOSITORY / "assets")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    image.save("photo.jpg")
    image.save("new.jpg")
    for folder in ("holiday", *(f"photos/{split}/{name}" for split in ("train", "test") for name in CLASSES)):
        Path(folder).mkdir(parents=True)
        image.save(Path(folder) / "a.png")
        image.save(Path(folder) / "b.png")
    return tmp_path


def blocks(page, language):
    """The code blocks of a page, made small."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    for theirs, ours in SMALL.items():
        found = [block.replace(theirs, ours) for block in found]
    return found


def run_python(page):
    """Runs the Python blocks of a page one after the other; the names that they defined."""
    names = {}
    for block in blocks(page, "python"):
        exec(block, names)
    return names


def run_commands(page):
    """Runs the `vmoe` commands of a page but the server, which does not end, and gives the jobs."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("vmoe ")]
    lines = [line for line in lines if not line.startswith("vmoe serve ")]
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    return {line.split()[1] for line in lines}


def pages():
    """Every page of the documentation, with the code that it shows taken out of its text."""
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")):
        yield path, re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def headings(path):
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", each.lower()).strip().replace(" ", "-") for each in found}
    return anchors | set(re.findall(r'<a id="(.*?)">', text))


def test_every_link_leads_to_a_file_and_a_heading():
    broken = []
    for path, text in pages():
        for link, anchor in re.findall(r"\]\((?!\w+:)([^)\s#]*)#?([^)\s]*)\)", text):
            target = (path.parent / link).resolve() if link else path
            known = target.exists() and (target.suffix != ".md" or not anchor or anchor in headings(target))
            if not known and "::: " + anchor not in target.read_text(encoding="utf-8"):  # a name of mkdocstrings'
                broken.append(f"{path.name}: {link}#{anchor}")
    assert broken == []


def test_every_page_opens_with_what_it_is_for_and_an_example():
    for path, _ in pages():
        _, opening, *rest = path.read_text(encoding="utf-8").split("\n\n")
        before, fence, _ = "\n\n".join(rest).partition("```")
        assert re.match(r"\w", opening.lstrip("`*")) and fence, path.name
        assert before.count("\n") < 30, f"{path.name}: more than a screen before the first example"


def test_every_picture_says_what_it_shows():
    for path, text in pages():
        for words in re.findall(r"!\[(.*?)\]", text):
            assert len(words) > 50, f"{path.name}: {words}"


def test_python_of_every_page_can_be_parsed():
    for path, _ in pages():
        for block in blocks(path.relative_to(REPOSITORY), "python"):
            compile(block, path.name, "exec")


@pytest.mark.slow  # the names of options alone are checked by tests/reliability/test_errors.py
def test_recipes_take_the_options_that_pages_show(tmp_path, monkeypatch):
    """`vmoe train --config RECIPE` of every page, up to the point where it would train."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    tried = set()
    for path, _ in pages():
        for block in (*blocks(path.relative_to(REPOSITORY), "sh"), *blocks(path.relative_to(REPOSITORY), "bash")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                recipe = REPOSITORY / "configs" / f"{Path(words[3]).stem}.yaml" if len(words) > 3 else None
                is_made = words[:3] == ["vmoe", "train", "--config"] and recipe.exists()
                if is_made and not {"--find_lr", "--resume"} & set(words) and path.name != "errors.md":
                    tried.add(tuple(words[1:]))
    assert len(tried) >= 15
    for words in tried:
        with pytest.raises(SystemExit) as end:
            main([*words, "--print_config"])
        assert end.value.code == 0, words


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_python_of_readme_runs(pictures):
    names = run_python("README.md")
    assert len(names["labels"]) == 3 and names["probabilities"].shape == (3, 100)
    assert (pictures / "heatmaps" / "photo-overview.png").exists() and (pictures / "heatmaps" / "index.html").exists()
    assert tuple(names["run"].model.class_names) == CLASSES and "test/top1" in names["twin"].metrics
    assert not list(vmoe.moe_layers(names["twin"].model)) and list(vmoe.moe_layers(names["run"].model))


def test_commands_of_readme_run(pictures):
    assert run_commands("README.md") == {"train", "compare", "evaluate", "predict", "heatmap", "explore"}
    assert (pictures / "explorer" / "index.html").exists() and list((pictures / "comparison").glob("*.png"))


def test_python_in_ten_minutes_runs(pictures):
    names = run_python("docs/tour.md")
    assert names["layer"].chosen.shape == (2, 197, 2) and names["loss"].isfinite()
    assert tuple(names["model"].class_names) == CLASSES and names["result"]["top1"] >= 0


@pytest.mark.slow  # the commands are README's, and a few more
def test_a_folder_in_ten_minutes_runs(pictures):
    run_python("docs/folder.md")
    jobs = {"train", "data", "compare", "evaluate", "predict", "calibrate", "heatmap", "explore"}
    assert run_commands("docs/folder.md") == jobs


def test_picture_of_the_rooms_is_that_of_the_imports():
    drawn = runpy.run_path(str(REPOSITORY / "docs" / "rooms.py"))["picture"]()
    kept = (REPOSITORY / "assets" / "rooms.svg").read_text(encoding="utf-8")
    assert drawn == kept, "draw it again: python docs/rooms.py"


def test_every_config_key_is_documented_with_its_default():
    text = runpy.run_path(str(REPOSITORY / "docs" / "tables.py"))["config_keys"]()
    listed = re.findall(r"^\| `([\w.]+)` \| `[^`]+` \| `[^`]+` \| \S", text, re.MULTILINE)
    assert listed and set(listed) == {
        name for name, kind in option_types(TrainConfig).items() if not section_type(kind)
    }


def test_every_job_is_on_the_page_of_commands():
    text = runpy.run_path(str(REPOSITORY / "docs" / "tables.py"))["jobs"]()
    assert re.findall(r"^\| `vmoe ([\w-]+)` \| [A-Z]", text, re.MULTILINE) == list(JOBS)


def test_example_of_the_glossary_runs():
    names = run_python("docs/glossary.md")
    assert names["trace"].layers["blocks.11.mlp"].chosen.shape == (1, 197, 1)


def test_example_of_the_routers_runs():
    names = run_python("docs/routers.md")
    assert names["model"](names["images"]).shape == (4, 10)
