"""The C library's memory: kept for the next tensor instead of given back at every free."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_KEPT_UP_TO = (2**30, 2**25)  # bytes; older versions of glibc refuse more than the second


def keep_freed_memory(device: torch.device) -> None:
    """Where models compute on the CPU, let this process keep what their tensors leave free (glibc; elsewhere nothing
    happens).

    glibc takes every large block new from the system and gives it back when it is freed; then each page is a fault at
    its first touch, which costs more than the arithmetic on it, most of all on a virtual machine (BENCHMARKS.md).
    Blocks of at most 1 GiB now come from memory that the process has held before. The peak did not rise where we
    measured it; between peaks the process does not shrink. The settings are those of the environment variables
    MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_, for the whole process; calling twice does nothing more.
    """
    if device.type != "cpu":
        return
    with suppress(AttributeError, OSError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        if any(mallopt(_MMAP_THRESHOLD, size) for size in _KEPT_UP_TO):
            mallopt(_TRIM_THRESHOLD, -1)  # never
