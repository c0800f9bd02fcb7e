"""What a run says of the place where it trains."""

import pytest
import torch

from vmoe.training.run.summary import device_line


@pytest.mark.parametrize(
    ("device", "wanted", "gpus", "expected"),
    [
        (
            "cpu",
            "cpu",
            1,
            "device: cpu, by trainer.device=cpu, which repeats runs that were measured on a CPU; "
            "--trainer.device auto trains on the H200 that is here",
        ),
        ("cpu", "auto", 0, "device: cpu, by trainer.device=auto; there is no usable GPU"),
        ("cuda", "auto", 1, "device: H200, by trainer.device=auto"),
        ("cuda:1", "cuda", 2, "device: H200, GPU 1 of 2, by trainer.device=cuda"),
    ],
)
def test_the_device_and_why_it_is_that_one(monkeypatch, device, wanted, gpus, expected):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H200")
    assert device_line(torch.device(device), wanted) == expected
