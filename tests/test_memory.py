"""What tensors leave free stays with the process, where models compute on the CPU."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from rlme.memory import keep_freed_memory

if sys.argv[1] != "as it is":
    keep_freed_memory(torch.device(sys.argv[1]))
for n in range(40):
    if n == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, 16,384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's settings are glibc's")
def test_freed_memory_is_kept_on_the_cpu_only():
    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("cpu") < 20_000  # the pages of one tensor, and some
    assert faults("cuda") > 0.5 * faults("as it is") > 100_000
