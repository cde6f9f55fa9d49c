"""The cores that a process may use: never more than its cgroup's CPU quota."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from ssl_xcit.data import batches
from ssl_xcit.runtime import processor
from ssl_xcit.runtime.processor import usable_cores

V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    files = {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{k}": v for k, v in files.items()}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000\n"}, 4),
        ("0::/", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/", {"cpu.max": "250000 100000\n"}, 2),  # rounded down
        ("0::/", {"cpu.max": "50000 100000\n"}, 1),  # at least one
        ("0::/", {"cpu.max": "800000 100000\n"}, 4),  # more than there are
        ("0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        # a container whose own group is mounted as the root, whatever /proc calls it
        ("0::/docker/1234", {"cpu.max": "100000 100000\n"}, 1),
        (
            "4:cpu,cpuacct:/job\n1:memory:/x\n",
            {"cpu/job/cpu.cfs_quota_us": "200000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        (
            "4:cpu:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        ("0::/", {}, 4),
        ("0::/", {"cpu.max": "nonsense\n"}, 4),
    ],
)
def test_the_quota_of_every_kind_of_cgroup_is_heeded(tmp_path, four_cores, groups, files, expected):
    assert usable_cores(system(tmp_path, groups, files)) == expected


def test_without_cgroups_the_affinity_counts(tmp_path, four_cores):
    assert usable_cores(tmp_path) == 4


def test_the_loaders_threads_are_no_more(monkeypatch):
    monkeypatch.setattr(batches, "usable_cores", lambda: 3)
    assert batches.default_threads() == 3


def test_a_command_computes_with_no_more_threads_unless_the_user_says_so(monkeypatch, four_cores):
    monkeypatch.setattr(processor, "usable_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    processor.prepare()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    processor.prepare()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(processor, "usable_cores", lambda: 4)
    processor.prepare()
    assert "OMP_NUM_THREADS" not in os.environ  # torch's own choice


@pytest.fixture
def one_core_group():
    """A real cgroup with a quota of one CPU, of either version."""
    base = V1 if (V1 / "cpu.cfs_quota_us").exists() else V2
    group = base / f"test-{uuid.uuid4().hex}"
    try:
        group.mkdir()
        if base == V1:
            (group / "cpu.cfs_quota_us").write_text("100000")
        else:
            (group / "cpu.max").write_text("100000 100000")
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no cgroup with a CPU quota can be made here: {error}")
    yield group
    group.rmdir()


def test_a_real_quota_gives_a_real_command_that_many_threads(one_core_group):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core is all there is")
    code = (
        "import os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "from ssl_xcit.runtime import processor\n"
        "processor.prepare()\n"
        "import torch\n"
        "print(processor.usable_cores(), torch.get_num_threads())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(one_core_group / "cgroup.procs")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["1", "1"]
