"""What README shows, run as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vmoe

REPOSITORY = Path(__file__).parents[1]
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The working folder of the snippet: the repository's assets and a few pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(REPOSITORY / "assets")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    image.save("photo.jpg")
    for folder in ("holiday", *(f"photos/{split}/{name}" for split in ("train", "test") for name in CLASSES)):
        Path(folder).mkdir(parents=True)
        image.save(Path(folder) / "a.png")
        image.save(Path(folder) / "b.png")
    return tmp_path


def run_block(word):
    """Runs README's only Python block that holds a word, and gives the names that it defined."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    names = {}
    exec(block, names)
    return names


def test_a_trained_model_is_used_as_readme_shows(pictures):
    names = run_block("vmoe.load(")
    assert len(names["labels"]) == 3 and names["probabilities"].shape == (3, 10)
    assert tuple(names["model"].class_names) == CLASSES
    assert (pictures / "heatmaps" / "photo-overview.png").exists() and (pictures / "heatmaps" / "index.html").exists()


def test_a_timm_model_becomes_sparse_as_readme_shows():
    names = run_block("vmoe.auxiliary_loss(")
    assert names["loss"].isfinite() and names["trace"].layers["blocks.1.mlp"].chosen.shape == (2, 197, 2)


def test_training_with_lightning_works_as_readme_shows(pictures):
    """With timm's smallest model and one epoch in the place of README's."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    snippet = "".join(block for block in blocks if "L.Trainer(" in block or "vmoe.fit(" in block)
    small = {"vit_tiny_patch16_224": "test_vit", "batch_size=128": "batch_size=8, image_size=160"}
    for theirs, ours in (small | {"epochs=5": "epochs=1", "epochs=10": "epochs=1"}).items():
        assert theirs in snippet
        snippet = snippet.replace(theirs, ours)
    names = {"vmoe": vmoe}
    exec(snippet, names)
    assert tuple(names["task"].model.class_names) == CLASSES
    assert tuple(names["vmoe"].load(names["best"].best_model_path).class_names) == CLASSES
    assert tuple(names["run"].model.class_names) == CLASSES and "test/top1" in names["run"].metrics
