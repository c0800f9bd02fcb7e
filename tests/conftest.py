"""What all tests stand on: one thread, interpreted Triton without a GPU, imports that are no garbage, unwritten NaN."""

import gc
import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import pytest
import torch

from vmoe.extras import missing_extra

gc.disable()  # until all tests are imported, which takes a third less so

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection of garbage, which benchmarks ask for often, looks at it again."""
    gc.freeze()
    gc.enable()


def _missing_extra(error: BaseException | None) -> str | None:
    """The line on an extra that is not installed, where one of these causes of each other is due to that."""
    while error is not None:
        line = missing_extra(error.name) if isinstance(error, ImportError) else None
        if line is not None and importlib.util.find_spec(error.name.partition(".")[0]) is None:
            return str(line)
        error = error.__cause__ or error.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Skips a file whose imports need an extra that is not installed."""
    report = yield
    call = getattr(report, "call", None)
    if report.failed and call is not None and (line := _missing_extra(call.excinfo.value)):
        report.outcome, report.longrepr = "skipped", (str(collector.path), None, f"Skipped: {line}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skips a test that needs an extra that is not installed."""
    report = yield
    if report.failed and (line := _missing_extra(call.excinfo.value)):
        report.outcome, report.longrepr = "skipped", (str(item.path), None, f"Skipped: {line}")
    return report


@pytest.fixture
def uninitialised_memory_holds_nan():
    """What a kernel reads but nothing wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
