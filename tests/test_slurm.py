"""launch/submit.py and the job, without SLURM. A real submission is tested with a real cluster."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from submitit.helpers import DelayedSubmission

from ssl_xcit import slurm
from ssl_xcit.config import SlurmConfig, SubmitConfig, TrainConfig, load_config

SUBMIT = Path(__file__).parents[1] / "launch/submit.py"
FILES = ("slurm.yaml", "pretrain/{arch}.yaml")
GIVEN = ["--arch", "xcit_nano_12_p8", "--data", "train.beton"]


def run_submit(*flags: str, cwd: Path, path: str = "/nowhere") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SUBMIT), *GIVEN, *flags],
        cwd=cwd,
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_prints_the_resolved_settings_and_makes_nothing(tmp_path):
    flags = ["--out", "runs/a", "--slurm.nodes", "3", "--partition", "gpu", "--lr", "1e-3"]
    done = run_submit(*flags, "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    printed = yaml.safe_load(done.stdout)
    assert printed["slurm"]["nodes"] == 3
    assert printed["slurm"]["partition"] == "gpu"
    assert printed["optim"]["lr"] == 1e-3
    assert printed["loss"]["teacher_temp"] == 0.07  # the recipe
    assert list(tmp_path.iterdir()) == []


def test_without_sbatch_there_is_one_line_and_exit_status_2(tmp_path):
    done = run_submit("--out", "runs/a", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no sbatch on this machine")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def sbatch(tmp_path):
    """A folder with an sbatch that keeps what it was given and says REPLY."""

    def make(reply: str, status: int = 0) -> str:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        script = (
            f"#!/bin/sh\ncp \"$1\" {folder}/submitted.sh\necho '{reply}' >&{1 + bool(status)}\n"
        )
        for name in ("sbatch", "srun"):
            (folder / name).write_text(f"{script}exit {status}\n")
            (folder / name).chmod(0o755)
        return f"{folder}:/usr/bin:/bin"

    return make


def test_a_job_is_submitted_with_its_logs_in_the_run_folder(tmp_path, sbatch):
    path = sbatch("Submitted batch job 123")
    flags = ["--slurm.nodes", "2", "--gpus_per_node", "4", "--hours", "1.5", "--partition", "gpu"]
    done = run_submit("--out", "runs/a", *flags, cwd=tmp_path, path=path)
    assert done.returncode == 0, done.stderr
    logs = tmp_path / "runs/a/slurm"
    assert f"job 123, run folder runs/a, log {logs}/123_0_log.out" in done.stdout
    script = (tmp_path / "bin/submitted.sh").read_text()
    for line in (
        *("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=10"),
        *("--time=90", "--partition=gpu", "--requeue", "--job-name=xcit_nano_12_p8"),
        *("--signal=USR2@120", f"--output={logs}/%j_0_log.out"),
    ):
        assert f"#SBATCH {line}\n" in script
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n" in script
    assert "--kill-on-bad-exit=1" in script
    for absent in ("--account", "--qos", "--constraint", "--mem"):
        assert absent not in script
    # What the job's processes will run.
    submission = DelayedSubmission.load(logs / "123_submitted.pkl")
    argv = [*GIVEN, "--out", "runs/a"]
    assert submission.function.config == load_config(TrainConfig, FILES[1:], argv)


def test_a_refusal_of_slurm_is_one_line(tmp_path, sbatch):
    done = run_submit("--out", "runs/a", cwd=tmp_path, path=sbatch("no such partition", 1))
    assert done.returncode == 2
    sbatchs, ours = done.stderr.splitlines()
    assert sbatchs == "no such partition"
    assert ours == "error: SLURM refused the job: no such partition"
    done = run_submit("--out", "runs/a", cwd=tmp_path, path=sbatch("good morning"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: SLURM refused the job")
    assert done.stderr.count("\n") == 1


def test_an_unwritable_folder_is_one_line(tmp_path, sbatch):
    (tmp_path / "file").touch()
    path = sbatch("Submitted batch job 123")
    done = run_submit("--out", "file/a", cwd=tmp_path, path=path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "choose another --out" in done.stderr


def test_a_local_job_has_one_machine(tmp_path):
    done = run_submit("--out", "a", "--cluster", "local", "--nodes", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: nodes must be 1 with cluster local, got 2\n"


def test_what_is_left_empty_is_left_to_the_cluster():
    parameters = slurm.job_parameters(SlurmConfig(gpus_per_node=0, hours=0.001))
    assert parameters["tasks_per_node"] == 1
    assert parameters["timeout_min"] == 1
    for name in ("slurm_partition", "slurm_account", "slurm_qos", "slurm_constraint", "mem_gb"):
        assert parameters[name] is None


def test_the_job_survives_pickling_and_is_queued_again_unchanged():
    config = load_config(TrainConfig, (), [*GIVEN, "--out", "a"])
    job = pickle.loads(pickle.dumps(slurm.PretrainJob(config)))
    assert job == slurm.PretrainJob(config)
    assert job.checkpoint().function == job


def test_the_job_tells_the_ranks_about_each_other_and_trains(tmp_path, monkeypatch):
    seen = []
    train = SimpleNamespace(train=lambda config: seen.append((config, dict(os.environ))))
    monkeypatch.setitem(sys.modules, "ssl_xcit.train", train)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ |= {"RANK": "7", "WORLD_SIZE": "9"}  # of an outer torchrun: overwritten
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    argv = [*GIVEN, "--out", str(tmp_path / "a"), "--cluster", "debug"]
    config = load_config(SubmitConfig, FILES, argv)
    slurm.submit(config)
    ((trained, environment),) = seen
    assert trained == load_config(TrainConfig, FILES[1:], argv[:-2])
    assert type(trained) is TrainConfig
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
    assert environment["LOCAL_RANK"] == "0"
    assert environment["MASTER_ADDR"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_an_error_in_a_debug_job_is_raised(tmp_path, monkeypatch):
    def fail(config):
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "ssl_xcit.train", SimpleNamespace(train=fail))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    argv = [*GIVEN, "--out", str(tmp_path / "a"), "--cluster", "debug"]
    with pytest.raises(ZeroDivisionError):
        slurm.submit(load_config(SubmitConfig, FILES, argv))
