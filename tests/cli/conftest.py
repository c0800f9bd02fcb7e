"""Small untrained checkpoints, as a run leaves them."""

import pytest


@pytest.fixture
def save_run(tmp_path):
    """Writes the run folder NAME with a checkpoint for digits at 16 px; `moe` as keyword arguments or None."""
    from support import saved_runs  # here, since it needs the extra `train`

    return lambda name="run", *args, **kwargs: saved_runs.save_run(tmp_path / name, *args, **kwargs)
