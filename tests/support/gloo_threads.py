"""Counts the threads of gloo in a process, which belong to groups that have not ended."""

from pathlib import Path


def gloo_threads() -> int:
    """The number of gloo's threads in this process, on Linux."""
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    return names.count("pt_gloo_runloop")
