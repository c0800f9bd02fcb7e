"""When a run opens all its images first."""

import pytest

from vmoe.data.checking import is_worth_checking


@pytest.mark.parametrize(
    ("count", "passes", "expected"),
    [(900, 1, True), (5_000, 4, False), (5_000, 5, True), (150_000, 60, True), (1_300_000, 300, False)],
)
def test_images_are_opened_where_that_is_little_work_beside_the_run(count, passes, expected):
    assert is_worth_checking(count, passes) == expected
