"""What cannot be compiled still runs."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from vmoe.data.fusing import Fused

ON_GPU = SimpleNamespace(is_cuda=True, value=1)


def test_compiling_is_tried_once_and_its_failure_told(monkeypatch):
    tried = []

    def compiled(*_):
        tried.append(None)
        raise TorchDynamoException("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled)
    call = Fused(lambda x: x.value + 1)
    with pytest.warns(UserWarning, match="uncompiled code, which is slower: no compiler here"):
        assert call(ON_GPU) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(ON_GPU) == 2
    assert len(tried) == 1


def test_only_gpus_are_compiled_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: "compiled")
    call = Fused(lambda x: "plain")
    assert call(ON_GPU) == "compiled" and call(torch.zeros(1)) == "plain"
