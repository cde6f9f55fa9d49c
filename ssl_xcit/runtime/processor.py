"""The processor as a command finds it: the cores that it may use, and memory.

Nothing here imports torch: the variables are read when its libraries are loaded.
"""

import contextlib
import ctypes
import functools
import os
from pathlib import Path

MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy, at least 1: its affinity, and its cgroup's CPU quota.

    A container that was given 2 CPUs of 64 sees all 64, and is stopped for most of each period of
    0.1 s when it uses more than 2. `root`: where /proc and /sys are, for the tests.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """CPUs that each cgroup of this process allows, its own and those above; none: no limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 at the one place, version 1 at the other. A container sees its own group as the
        # root, whatever /proc calls it, hence the folders above, too.
        mount = root / ("sys/fs/cgroup/cpu" if controllers else "sys/fs/cgroup")
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            with contextlib.suppress(OSError, ValueError):
                found.append(_quota(folder, version=1 if controllers else 2))
    return found


def _quota(folder: Path, version: int) -> float:
    """CPUs; ValueError: as many as there are."""
    if version == 2:
        quota, period = (folder / "cpu.max").read_text().split()  # "200000 100000", "max 100000"
    else:
        quota = (folder / "cpu.cfs_quota_us").read_text()
        period = (folder / "cpu.cfs_period_us").read_text()
    if float(quota) <= 0:
        raise ValueError("no quota")
    return float(quota) / float(period)


@functools.cache
def made_by_intel() -> bool:
    """Whether the processor is one of Intel's; False where Linux does not say."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def prepare() -> None:
    """What a command sets before torch is loaded; what the user has set stays.

    As many threads as there are usable cores. And huge pages from Linux, free memory kept by glibc:
    a training step's tensors come and go, and on a CPU small pages, and giving memory back to take
    it again, cost 6 % of the time of a large network's step and more of a small one's.
    """
    if usable_cores() < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks when it first allocates
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MALLOC_MMAP_THRESHOLD, 32 * 2**20)  # the largest that it takes
        mallopt(MALLOC_TRIM_THRESHOLD, -1)
