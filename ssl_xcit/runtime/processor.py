"""The processor as a command finds it: the cores that it may use, and settings for memory.

Nothing here imports torch: its libraries read these variables when they are loaded.
"""

import contextlib
import ctypes
import functools
import os
from pathlib import Path

MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy, at least 1: by affinity and its cgroup's CPU quota.

    A container limited to 2 CPUs of 64 sees all 64. If it uses more than 2, it is stopped for most
    of each period of 0.1 s. `root`: where /proc and /sys are, for the tests.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """CPUs that each cgroup of this process allows, its own and those above; empty: no limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # cgroup version 1 and 2 have different mount points. A container sees its own group as the
        # root, whatever /proc calls it, so the folders above count too.
        mount = root / ("sys/fs/cgroup/cpu" if controllers else "sys/fs/cgroup")
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            with contextlib.suppress(OSError, ValueError):
                found.append(_quota(folder, version=1 if controllers else 2))
    return found


def _quota(folder: Path, version: int) -> float:
    """CPUs that one cgroup allows. Raises ValueError if it sets no limit."""
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
    """Whether the processor is Intel's; False where that is unknown."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def prepare() -> None:
    """Settings that a command makes before torch is loaded; the user's own settings stay.

    One thread per usable core. Huge pages, and free memory that glibc keeps: a training step
    allocates and frees its tensors, and small pages and memory returned to the system cost 6 % of
    the time of a large network's step on a CPU, and more of a small one's.
    """
    if usable_cores() < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MALLOC_MMAP_THRESHOLD, 32 * 2**20)  # the largest value allowed
        mallopt(MALLOC_TRIM_THRESHOLD, -1)
