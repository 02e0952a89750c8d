"""What tensors leave free stays with the process, where models compute on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

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


HUGE = """
import resource, sys, torch
from rlme.memory import keep_freed_memory, prefer_huge_pages

if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_AS, (2**38, 2**38))
keep_freed_memory(torch.device("cpu"))
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(2):
    prefer_huge_pages(torch.device("cuda" if sys.argv[1] == "cuda" else "cpu"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held)  # KiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**26)  # 256 MiB, 65,536 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(), reason="the kernel gives no huge pages"
)
@pytest.mark.parametrize("how", ["cpu", "cuda", "limited"])
def test_training_on_the_cpu_takes_huge_pages(how):
    """Few faults, and no memory before it is used; not where a model trains elsewhere or addresses are limited."""
    done = subprocess.run([sys.executable, "-c", HUGE, how], capture_output=True, text=True, check=True)
    taken, faults = map(int, done.stdout.split())
    assert taken < 2**15
    if how == "cpu":
        assert faults < 20_000
    elif "[madvise]" in HUGE_PAGES.read_text():
        assert faults > 60_000
