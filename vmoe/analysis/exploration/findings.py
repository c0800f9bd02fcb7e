"""Sentences that the numbers of a report support, and no others."""

from typing import Any


def findings(report: dict[str, Any]) -> list[str]:
    """What the numbers say, the most telling first; specialisation is claimed only where its null is beaten."""
    return []
