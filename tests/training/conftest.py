"""What tests of several processes train."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """One epoch of three updates."""
    from support.parallel_runs import TINY  # here, since it needs the extra `train`

    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path
