"""ssl-xcit doctor: its lines, on this machine and on machines that lack something."""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch

from ssl_xcit import doctor
from ssl_xcit.data import turbojpeg

SUBJECTS = ["Python", "training", "GPU", "precision", "threads", "JPEG", "ffcv", "SLURM", "disk"]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def examine(capsys, tmp_path, monkeypatch):
    """The lines of the doctor as (state, line) by subject, and its exit status."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def examine() -> tuple[dict[str, tuple[str, str]], int]:
        status = 0
        try:
            doctor.main(["--runs", str(tmp_path / "runs")])
        except SystemExit as left:
            status = left.code
        found = {}
        for line in capsys.readouterr().out.splitlines():
            state, text = line[:9].strip(), line[9:]
            found[text.partition(":")[0].split()[0]] = (state, text)
        return found, status

    return examine


def test_a_machine_that_can_train_has_a_line_for_each_thing(examine, tmp_path):
    found, status = examine()
    assert list(found) == SUBJECTS
    assert status == 0
    assert {state for state, _ in found.values()} <= {"ok", "warn"}
    assert f"torch {torch.__version__.partition('+')[0]}" in found["Python"][1]
    assert "configs" in found["Python"][1]
    assert "libturbojpeg.so" in found["JPEG"][1]
    assert found["disk"][1].endswith(f"free in {tmp_path}")  # runs does not exist yet
    assert not (tmp_path / "runs").exists()


def test_it_takes_less_than_5_seconds(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "ssl_xcit", "doctor", "--runs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert len(done.stdout.splitlines()) == len(SUBJECTS)
    # Processor time, so that a busy machine does not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_without_torch_nothing_can_be_trained(examine, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("ssl_xcit.dino.train", "ssl_xcit.runtime.precision"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found, status = examine()
    assert status == 1
    for subject in ("training", "torch"):
        assert found[subject][0] == "missing"
        assert "torch" in found[subject][1]
    assert found["JPEG"][0] == "ok"


def test_a_torchvision_of_another_build_is_a_warning(examine, monkeypatch, tmp_path):
    (tmp_path / "_C.so").write_text("for another torch")
    spec = mock.Mock(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", {"torchvision": spec}.get)
    found, status = examine()
    assert (found["torchvision"][0], status) == ("warn", 0)
    assert "_C.so: " in found["torchvision"][1]


@pytest.fixture
def no_turbojpeg(monkeypatch):
    """The system has none of its own."""
    monkeypatch.setattr(turbojpeg, "NAMES", ("libnone.so",))


def test_without_a_jpeg_decoder_nothing_can_be_trained(examine, monkeypatch, no_turbojpeg):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found, status = examine()
    assert status == 1
    state, line = found["JPEG"]
    assert state == "missing"
    assert "libnone.so" in line
    assert line.endswith("install libturbojpeg (Debian: libturbojpeg0)")


@pytest.mark.skipif(find_spec("ffcv") is None, reason="ffcv is not installed")
def test_ffcvs_build_leads_to_a_decoder_where_the_system_has_none(no_turbojpeg):
    tried = []

    def load(name: str) -> ctypes.CDLL:
        tried.append(Path(name).name)
        return ctypes.CDLL(name)

    library = turbojpeg.load_turbojpeg(load)
    assert tried[0] == "libnone.so"
    assert tried[1].startswith("_libffcv")
    assert library.tjInitDecompress
    assert "ffcv" not in sys.modules


def test_gpus_decide_the_precision_and_want_shared_memory(examine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    usage = {"/dev/shm": Usage(64 * 2**20, 0, 0)}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage.get(path, Usage(0, 0, 10**12)))
    found, status = examine()
    assert status == 0
    assert found["GPU"][1].startswith("GPU: 8 x Tesla V100, CUDA")
    assert found["precision"] == ("ok", "precision: fp16: compute capability 7.0 has no bfloat16")
    assert found["shared"][0] == "warn"
    assert "0.0671 GB in /dev/shm" in found["shared"][1]
    usage["/dev/shm"] = Usage(8 * 2**30, 0, 0)
    assert examine()[0]["shared"][0] == "ok"


def test_a_quota_is_named_where_it_binds(examine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(doctor.processor, "usable_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    line = examine()[0]["threads"][1]
    assert line == "threads: 2 on 2 of 64 cores, by the quota of the cgroup (it sees 16)"


def test_a_cluster_without_submitit_is_told(examine, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert examine()[0]["SLURM"][0] == "ok"
    versions = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: None if n == "submitit" else versions(n))
    found, status = examine()
    assert (found["SLURM"][0], status) == ("warn", 0)
    assert found["SLURM"][1].endswith("pip install 'ssl_xcit[slurm]'")


def test_little_disk_is_a_warning_and_none_that_can_be_written_is_an_error(examine, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**9))
    found, status = examine()
    assert (found["disk"][0], status) == ("warn", 0)
    assert found["disk"][1].startswith("disk: 1 GB free in ")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found, status = examine()
    assert (found["disk"][0], status) == ("missing", 1)
