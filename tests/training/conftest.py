"""What tests of several processes train."""

from pathlib import Path

import pytest
from parallel_runs import TINY


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """One epoch of three updates."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path
