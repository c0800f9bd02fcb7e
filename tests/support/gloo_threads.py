"""Threads of gloo in a process: those of groups that have not ended."""

from pathlib import Path


def gloo_threads() -> int:
    """How many work for the groups of this process, where Linux tells."""
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    return names.count("pt_gloo_runloop")
