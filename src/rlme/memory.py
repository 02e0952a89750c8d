"""The C library's memory: kept for the next tensor instead of given back at every free, and in huge pages."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_MADV_HUGEPAGE = 14  # sys/mman.h
_BLOCK = 2**29  # bytes; less than what the heap takes by itself
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


@cache
def prefer_huge_pages(device: torch.device) -> None:
    """Where a model is trained on the CPU, let what the heap grows by from now on be huge pages (Linux with glibc,
    after `keep_freed_memory`; elsewhere nothing happens, and calling twice does nothing more).

    What a step needs moves with the lengths of its completions, and the heap grows a little for many steps: with huge
    pages by one fault for each 2 MiB instead of 512. Addresses for half of the machine's memory are reserved for it;
    memory is taken when it is used. Nothing is reserved where addresses are limited or counted as memory. On virtual
    machines the first touch of a huge page may cost more than its 512 small ones: the first step then takes seconds
    longer, once.
    """
    if device.type != "cpu":
        return
    with suppress(AttributeError, ImportError, OSError, TypeError, ValueError):  # no glibc, or no such system
        import resource

        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":  # addresses count as memory here
            return
        limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
        if any(limit != resource.RLIM_INFINITY for limit in limits):
            return
        libc = ctypes.CDLL(None)
        libc.mallopt  # noqa: B018  # glibc's alone
        libc.malloc.restype = ctypes.c_void_p
        libc.malloc.argtypes = [ctypes.c_size_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.free.argtypes = [ctypes.c_void_p]
        page = os.sysconf("SC_PAGE_SIZE")
        blocks: list[int] = []
        while len(blocks) * _BLOCK < os.sysconf("SC_PHYS_PAGES") * page // 2 and (block := libc.malloc(_BLOCK)):
            blocks.append(block)
            first = -(-block // page) * page
            libc.madvise(first, block + _BLOCK - first, _MADV_HUGEPAGE)
        for block in reversed(blocks):
            libc.free(block)  # freed, they stay the heap's
