"""The machine's memory, and out-of-memory errors with their messages."""

import gc
import os
import re
import sys


def host_memory() -> int:
    """The bytes of memory of this machine."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    import psutil  # from the extra `train` on Windows

    return psutil.virtual_memory().total


def peak_host_memory() -> int:
    """The peak memory of this process so far in bytes."""
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        import psutil

        held = psutil.Process().memory_info()
        return getattr(held, "peak_wset", held.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak if sys.platform == "darwin" else peak * 2**10


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a GPU or the machine ran out of memory."""
    text = str(error)
    of_gpu = type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in text
    return of_gpu or "CUBLAS_STATUS_ALLOC_FAILED" in text or _is_of_host(error)


def memory_line(error: BaseException, advice: str) -> str:
    """One line on an out-of-memory error: the memory, who holds the rest, and what to do."""
    if _is_of_host(error):
        return f"out of memory; {advice}"
    text = " ".join(str(error).split())
    facts = []
    if found := re.search(r"GPU (\d+) has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text):
        facts.append(f"GPU {found[1]} has {found[2]}, of which {found[3]} is free")
    if found := re.search(r"this process has ([\d.]+ \w+) memory in use", text):
        facts.append(f"this process holds {found[1]}")
    facts += [f"process {pid} holds {size}" for pid, size in re.findall(r"Process (\d+) has ([\d.]+ \w+) memory", text)]
    return f"out of GPU memory{': ' * bool(facts)}{', '.join(facts)}; {advice}"


def _is_of_host(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def free_memory() -> None:
    """Frees unreferenced memory."""
    import torch  # here, so that --help and mistyped options do not wait for it

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
