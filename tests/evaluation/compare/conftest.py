"""A finished run of which only a comparison asks."""

import json

import pytest
import yaml


@pytest.fixture
def make_run(tmp_path):
    def make(
        name,
        top1=0.9,
        seed=0,
        moe=None,
        flops=100,
        device="a CPU",
        model="vit",
        data="digits",
        speed=50.0,
        train=None,
        lr=0.001,
        validated=True,
        epochs=20,
    ):
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "seed": seed,
            "output_dir": str(folder),
            "data": {"name": data, "image_size": 16},
            "model": {"name": model, "kwargs": {}},
            "moe": moe,
            "optim": {"lr": lr},
            "trainer": {"epochs": epochs},
        }
        summary = {
            "metrics": {"test/top1": top1}
            | ({} if train is None else {"train_clean/top1": train})
            | ({"val/top1": 0.8} if validated else {}),
            "parameters": {"total": 4000 if moe else 1000, "active": 1200 if moe else 1000},
            "flops_per_image": flops,
            "images_per_second": speed,
            "device": device,
            "seed": seed,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "summary.json").write_text(json.dumps(summary))
        rows = "epoch,step,val/top1\n0,10,0.5\n1,20,0.8\n" if validated else "epoch,step\n0,10\n1,20\n"
        (folder / "metrics.csv").write_text(rows)
        return folder

    return make
