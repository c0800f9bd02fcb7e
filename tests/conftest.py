"""What all tests stand on: one thread, interpreted Triton without a GPU, imports that are no garbage, unwritten NaN."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection of garbage, which benchmarks ask for often, looks at it again."""
    gc.freeze()


@pytest.fixture
def uninitialised_memory_holds_nan():
    """What a kernel reads but nothing wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
