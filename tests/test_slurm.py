"""launch/submit.py and its jobs, without SLURM. A real SLURM: test_slurm_cluster.py."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import yaml
from submitit.helpers import DelayedSubmission
from test_train import flags as tiny_flags

from ssl_xcit.__main__ import COMMANDS
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.evaluation.config import KnnConfig, LinearConfig
from ssl_xcit.runtime.config import load_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.signals import EXIT_STOPPED, Stopped
from ssl_xcit.slurm import evaluations as submission
from ssl_xcit.slurm import folder as job_folder
from ssl_xcit.slurm import job
from ssl_xcit.slurm import submit as slurm
from ssl_xcit.slurm.config import SlurmConfig, SubmitConfig

ROOT = Path(__file__).parents[1]
SUBMIT = ROOT / "launch/submit.py"
FILES = ("slurm.yaml", "pretrain/{arch}.yaml")
GIVEN = ["--arch", "xcit_nano_12_p8", "--data", "train.beton"]


def run_submit(
    *flags: str, cwd: Path, path: str = "/nowhere", start=forked.run, **variables: str
) -> subprocess.CompletedProcess:
    return start(
        [sys.executable, str(SUBMIT), *flags],
        cwd=cwd,
        env={"PATH": path} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path):
    """A folder with something in the place of the images."""
    (tmp_path / "train.beton").touch()
    return tmp_path


@pytest.fixture
def sbatch(tmp_path):
    """A PATH with an sbatch that keeps the scripts it was given and its environment; says REPLY."""

    def make(reply: str, status: int = 0) -> str:
        bin_folder = tmp_path / "bin"
        bin_folder.mkdir(exist_ok=True)
        script = f"""#!/bin/sh
n=$(ls {bin_folder} | grep -c submitted)
cp "$1" {bin_folder}/submitted_$n.sh
env > {bin_folder}/environment
echo '{reply}' >&{1 + bool(status)}
exit {status}
"""
        for name in ("sbatch", "srun"):
            (bin_folder / name).write_text(script)
            (bin_folder / name).chmod(0o755)
        return f"{bin_folder}:/usr/bin:/bin"

    return make


def settings_of(printed: str) -> dict:
    """The settings that a dry run prints as comments."""
    lines = printed.split("# settings\n")[1].split("\n\n")[0].splitlines()
    return yaml.safe_load("\n".join(line[2:] for line in lines))


# What would be submitted


def test_a_dry_run_works_without_data_and_slurm_and_makes_nothing(tmp_path):
    done = run_submit("--arch", "xcit_small_12_p8", "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    assert done.stdout.startswith("#!/bin/bash\n")
    settings = settings_of(done.stdout)
    assert settings["data"].startswith("PLACEHOLDER")
    assert settings["out"] == "runs/xcit_small_12_p8"
    assert settings["loss"]["teacher_temp"] == 0.07  # the recipe
    assert settings["slurm"]["gpus_per_node"] == 8
    # As a whole a script that does no more than the job
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0


def test_a_dry_run_prints_the_script_and_the_resolved_settings(tmp_path):
    flags = ["--out", "a", "--nodes", "2", "--gpus_per_node", "4", "--time", "1.5", "--lr", "1e-3"]
    flags += ["--partition", "gpu", "--mem", "0.5", "--account", "us", "--qos", "low"]
    flags += ["--constraint", "big", "--slurm.additional", "nodelist=n[1-2] exclusive"]
    flags += ["--setup", "module load cuda"]
    done = run_submit(*GIVEN, *flags, "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    logs = tmp_path / "a/slurm"
    for line in (
        *("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=10"),
        *("--time=90", "--partition=gpu", "--requeue", "--job-name=a", "--mem=512MB"),
        *("--account=us", "--qos=low", "--constraint=big", "'--nodelist=n[1-2]'", "--exclusive"),
        *("--signal=USR2@120", f"--output={logs}/%j_0_log.out"),
    ):
        line = line.replace("'--nodelist=n[1-2]'", "--nodelist='n[1-2]'")
        assert f"#SBATCH {line}\n" in done.stdout
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n" in done.stdout
    assert f"export PYTHONPATH={logs}/code_1${{PYTHONPATH:+:$PYTHONPATH}}\n" in done.stdout
    assert done.stdout.index("module load cuda\n") < done.stdout.index("\nsrun ")
    assert "--kill-on-bad-exit=1" in done.stdout
    settings = settings_of(done.stdout)
    assert settings["optim"]["lr"] == 1e-3
    assert settings["slurm"]["additional"] == "nodelist=n[1-2] exclusive"
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_empty_is_left_to_the_cluster(tmp_path):
    done = run_submit(*GIVEN, "--gpus_per_node", "0", "--time", "0.04", "--dry-run", cwd=tmp_path)
    for absent in ("--account", "--qos", "--constraint", "--mem", "--partition", "--gpus"):
        assert absent not in done.stdout.split("# settings")[0]
    assert "#SBATCH --ntasks-per-node=1\n" in done.stdout
    assert "#SBATCH --time=2\n" in done.stdout


def test_data_and_run_folder_default_to_the_facts_of_the_cluster(tmp_path):
    facts = tmp_path / "facts.yaml"
    facts.write_text("slurm: {runs: /shared/runs, images: /shared/train.beton}\n")
    flags = ["--arch", "xcit_nano_12_p8", "--config", str(facts), "--dry-run"]
    settings = settings_of(run_submit(*flags, cwd=tmp_path).stdout)
    assert settings["data"] == "/shared/train.beton"
    assert settings["out"] == "/shared/runs/xcit_nano_12_p8"
    settings = settings_of(run_submit(*flags, "--data", "b", "--out", "c", cwd=tmp_path).stdout)
    assert (settings["data"], settings["out"]) == ("b", "c")


def test_a_sweep_is_an_array_of_every_combination(tmp_path):
    flags = ["--sweep", "optim.lr=2.5e-4,5e-4", "seed=0,1", "--out", "sweep", "--dry-run"]
    done = run_submit(*GIVEN, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-3%4\n" in done.stdout
    expected = [f"# sweep/lr={lr}_seed={seed}\n" for lr in ("2.5e-4", "5e-4") for seed in (0, 1)]
    assert "# run folders\n" + "".join(expected) in done.stdout


def test_the_members_of_a_sweep_differ_in_what_is_swept_alone():
    argv = [*GIVEN, "--out", "s", "--sweep", "lr=1e-3,2e-3", "out_dim=64"]
    runs = slurm._sweep(load_config(SubmitConfig, FILES, argv))
    assert [point for _, point in runs] == [
        {"optim.lr": 1e-3, "head.out_dim": 64},
        {"optim.lr": 2e-3, "head.out_dim": 64},
    ]
    for (train, point), name in zip(runs, ("1e-3", "2e-3"), strict=True):
        argv = [*GIVEN, "--out", f"s/lr={name}_out_dim=64", "--out_dim", "64"]
        argv += ["--lr", str(point["optim.lr"])]
        assert train == load_config(TrainConfig, FILES[1:], argv)


def test_a_sweep_of_pairs_is_in_brackets_and_its_folders_need_no_quotes(tmp_path):
    scales = "crops.local_crops_scale=[0.05,0.4],[0.1, 0.5]"
    for words in ([scales, "seed=0,1"], [*scales.split(), "seed=0,1"]):  # quoted or not
        argv = [*GIVEN, "--out", "s", "--sweep", *words]
        runs = slurm._sweep(load_config(SubmitConfig, FILES, argv))
        found = [(train.out, train.crops.local_crops_scale, train.seed) for train, _ in runs]
        assert found == [
            ("s/local_crops_scale=0.05-0.4_seed=0", (0.05, 0.4), 0),
            ("s/local_crops_scale=0.05-0.4_seed=1", (0.05, 0.4), 1),
            ("s/local_crops_scale=0.1-0.5_seed=0", (0.1, 0.5), 0),
            ("s/local_crops_scale=0.1-0.5_seed=1", (0.1, 0.5), 1),
        ]
    facts = tmp_path / "sweep.yaml"
    facts.write_text(f"slurm: {{sweep: ['{scales}', 'data=/a=b/c.beton']}}\n")
    argv = ["--arch", "xcit_nano_12_p8", "--out", "s", "--config", str(facts)]
    runs = slurm._sweep(load_config(SubmitConfig, FILES, argv))
    assert [train.crops.local_crops_scale for train, _ in runs] == [(0.05, 0.4), (0.1, 0.5)]
    assert runs[0][0].data == "/a=b/c.beton"


# What is submitted


def test_a_job_is_submitted_with_logs_and_program_in_the_run_folder(folder, sbatch):
    path = sbatch("Submitted batch job 123")
    outer = {"RANK": "3", "WORLD_SIZE": "4", "SUBMITIT_EXECUTOR": "slurm", "SLURM_NTASKS": "9"}
    outer |= {"SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/s.conf", "HOME": "/root"}
    done = run_submit(*GIVEN, "--out", "runs/a", cwd=folder, path=path, **outer)
    assert done.returncode == 0, done.stderr
    logs = folder / "runs/a/slurm"
    assert done.stdout.splitlines() == [
        "job 123, run folder runs/a",
        f"follow: tail -F {logs}/123_0_log.out",
        "all runs: ssl-xcit runs runs",
        "stop: scancel 123",
    ]
    dry = run_submit(*GIVEN, "--out", "runs/a", "--dry-run", cwd=folder).stdout
    submitted = (folder / "bin/submitted_0.sh").read_text()
    assert dry.replace("code_2", "code_1").startswith(submitted)
    # Nothing of a job that it was submitted from
    environment = (folder / "bin/environment").read_text().splitlines()
    names = {line.partition("=")[0] for line in environment}
    assert not names & {*outer} - {"SLURM_CONF", "HOME"}
    assert "SLURM_CONF=/etc/s.conf" in environment
    # What the job's processes will run
    found = DelayedSubmission.load(logs / "123_submitted.pkl").function
    config = load_config(TrainConfig, FILES[1:], [*GIVEN, "--out", "runs/a"])
    assert found == job.PretrainJob(str(logs / "code_1"), "runs/a", 10, config)
    described = json.loads((logs / "submission.json").read_text())
    assert described["job"] == "123"
    assert described["command"][1:5] == GIVEN


def test_the_copy_of_the_program_is_the_program(tmp_path):
    code = tmp_path / "code"
    job_folder.freeze(code)
    for name in job_folder.PROGRAM:
        files = [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*")
        for path in files:
            copied = code / path.relative_to(ROOT)
            if path.is_file() and path.parent.name != "__pycache__":
                assert copied.read_bytes() == path.read_bytes()
                assert copied.stat().st_mtime_ns == path.stat().st_mtime_ns  # numba asks
    compiled = {path.suffix for path in code.rglob("__pycache__/*")}
    assert compiled <= {".nbi", ".nbc"}
    assert (code / "COMMIT").exists()


def test_the_copy_wins_over_the_installed_program_wherever_the_job_starts(tmp_path):
    """By the lines of the script, also where the working directory is a checkout."""
    code = tmp_path / "it's code"
    job_folder.freeze(code)
    jobs = (job.ScriptJob(str(code), "", 1, "knn", ()),)
    lines = slurm.Submission("x", tmp_path, SlurmConfig(), jobs).environment()
    command = f"{sys.executable} -m ssl_xcit runs --help; {sys.executable} -c "
    command += "'import ssl_xcit.runtime.config as c; print(c.__file__); print(c.CONFIGS)'"
    (tmp_path / "ssl_xcit").mkdir()
    (tmp_path / "ssl_xcit/__init__.py").write_text("raise SystemExit('the wrong one')")
    for cwd in (ROOT, tmp_path):
        printed = subprocess.run(
            ["bash", "-ec", "\n".join([*lines, command])],
            cwd=cwd, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert printed.endswith(f"{code}/ssl_xcit/runtime/config.py\n{code}/configs\n")


def test_evaluations_wait_for_the_training(folder, sbatch):
    path = sbatch("Submitted batch job 123")
    flags = ["--out", "runs/a", "--nodes", "2", "--eval", "knn,linear"]
    flags += ["--eval_train", "t.beton", "--eval_test", "v.beton"]
    done = run_submit(*GIVEN, *flags, cwd=folder, path=path)
    assert done.returncode == 0, done.stderr
    assert "evaluation knn after it: job 123\nevaluation linear after it: job 123\n" in done.stdout
    for number, name in enumerate(("knn", "linear"), 1):
        script = (folder / f"bin/submitted_{number}.sh").read_text()
        for line in (
            *("--dependency=afterok:123", "--kill-on-invalid-dep=yes", "--nodes=1"),
            f"--job-name={name}_a",
        ):
            assert f"#SBATCH {line}\n" in script
    found = DelayedSubmission.load(folder / "runs/a/slurm/123_submitted.pkl").function
    assert (found.script, found.code) == ("linear", str(folder / "runs/a/slurm/code_1"))
    settings = load_config(submission.settings_of("linear"), argv=found.arguments)
    assert (settings.checkpoint, settings.out) == ("runs/a", "runs/a/eval/linear")
    assert (settings.train, settings.test) == ("t.beton", "v.beton")


def test_a_sweep_ends_with_a_job_that_writes_its_table(folder, sbatch):
    path = sbatch("Submitted batch job 123")
    flags = ["--out", "runs/a", "--nodes", "2", "--sweep", "seed=0,1", "--eval", "knn"]
    flags += ["--eval_train", "t.beton", "--eval_test", "v.beton"]
    done = run_submit(*GIVEN, *flags, cwd=folder, path=path)
    assert done.returncode == 0, done.stderr
    said = "table of the sweep when all have ended: job 123, runs/a/sweep.txt\n"
    assert said in done.stdout
    script = (folder / "bin/submitted_2.sh").read_text()
    for line in (
        *("--dependency=afterany:123:123", "--nodes=1", "--ntasks-per-node=1", "--time=15"),
        *("--cpus-per-task=1", "--job-name=table_a"),
    ):
        assert f"#SBATCH {line}\n" in script
    assert "--gpus" not in script
    found = DelayedSubmission.load(folder / "runs/a/slurm/123_submitted.pkl").function
    table = str(folder / "runs/a/sweep.txt")
    assert (found.script, found.arguments) == ("runs", (str(folder / "runs/a"), "--out", table))
    dry = run_submit(*GIVEN, *flags, "--dry-run", cwd=folder).stdout
    assert "# table of the sweep\n" in dry
    assert "# #SBATCH --dependency=afterany:ID\n" in dry


def test_an_evaluation_alone_has_its_own_options_and_the_jobs(folder, sbatch):
    path = sbatch("Submitted batch job 123")
    evaluation = ["--pixels", "--train", "t.beton", "--test", "v.beton", "--k", "5", "10"]
    done = run_submit("eval", "knn", *evaluation, "--partition", "p", cwd=folder, path=path)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --partition=p\n" in (folder / "bin/submitted_0.sh").read_text()
    (run,) = (folder / "runs/evaluations").iterdir()
    found = DelayedSubmission.load(run / "slurm/123_submitted.pkl").function
    result = str(Path("runs/evaluations") / run.name / "knn.json")
    assert found.arguments == (*evaluation, "--out", result)


def test_an_evaluation_of_a_run_lies_in_its_folder(folder, sbatch):
    (folder / "runs/a").mkdir(parents=True)
    (folder / "runs/a/run.json").write_text("{}")
    path = sbatch("Submitted batch job 123")
    evaluation = ["--checkpoint", "runs/a", "--train=t", "--test=v", "--mode", "fast"]
    done = run_submit("eval", "linear", *evaluation, cwd=folder, path=path)
    assert done.returncode == 0, done.stderr
    found = DelayedSubmission.load(folder / "runs/a/slurm/123_submitted.pkl").function
    assert found.arguments == (*evaluation, "--out", "runs/a/eval/linear")
    # also where the run is named without its option
    dry = run_submit("eval", "visualize", "runs/a", "x.png", "--dry-run", cwd=folder).stdout
    assert "# ssl-xcit visualize runs/a x.png --out runs/a/eval/visualize\n" in dry


@pytest.mark.parametrize("path", sorted((ROOT / "eval").glob("*.py")), ids=lambda path: path.stem)
def test_every_script_of_eval_can_be_submitted(path, tmp_path):
    settings = submission.settings_of(path.stem)
    assert submission.CONFIGURATIONS[path.stem] == COMMANDS[path.stem].config
    helped = run_submit("eval", path.stem, "--help", cwd=tmp_path)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "--slurm.partition" in helped.stdout
    job_options, own = submission.split_arguments(settings, ["--nodes=2", "--out", "x"])
    assert (job_options, own) == (["--nodes=2"], ["--out", "x"])


def test_options_are_parted_by_whose_they_are():
    part = submission.split_arguments
    argv = ["--k", "5", "10", "--partition", "p", "--train", "t", "--gpus-per-node=2", "--pixels"]
    job_options, own = part(KnnConfig, argv)
    assert job_options == ["--partition", "p", "--gpus-per-node=2"]
    assert own == ["--k", "5", "10", "--train", "t", "--pixels"]
    # what both have is the evaluation's, unless named in full
    assert part(LinearConfig, ["--mode", "fast", "--slurm.time", "2"])[0] == ["--slurm.time", "2"]


# What is refused, in one line


def refused(done: subprocess.CompletedProcess) -> str:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_without_sbatch_nothing_is_made(folder):
    assert "no sbatch on this machine" in refused(run_submit(*GIVEN, "--out", "a", cwd=folder))
    assert [path.name for path in folder.iterdir()] == ["train.beton"]


def test_a_real_submission_without_data_is_refused(folder, sbatch):
    path = sbatch("Submitted batch job 123")
    assert "missing --data" in refused(run_submit(*GIVEN[:2], cwd=folder, path=path))
    flags = ["--data", "no.beton"]
    assert "no file no.beton" in refused(run_submit(*GIVEN[:2], *flags, cwd=folder, path=path))
    assert not (folder / "runs").exists()


def test_a_refusal_of_slurm_is_one_line_and_leaves_nothing(folder, sbatch):
    path = sbatch("sbatch: error: no such partition", 1)
    said = refused(run_submit(*GIVEN, "--out", "runs/a", cwd=folder, path=path))
    assert said == "error: SLURM refused the job: no such partition\n"
    path = sbatch("good morning")
    assert "refused the job" in refused(
        run_submit(*GIVEN, "--out", "runs/a", cwd=folder, path=path)
    )
    assert not (folder / "runs").exists()


def test_a_refused_evaluation_takes_its_training_with_it(folder, sbatch):
    path = sbatch("Submitted batch job 123")
    (folder / "bin/sbatch").write_text(
        f"#!/bin/sh\n[ -e {folder}/once ] && echo 'too many jobs' >&2 && exit 1\n"
        f"touch {folder}/once; echo 'Submitted batch job 123'\n"
    )
    (folder / "bin/scancel").write_text(f"#!/bin/sh\necho $* > {folder}/cancelled\n")
    (folder / "bin/scancel").chmod(0o755)
    flags = ["--out", "a", "--eval", "knn", "--eval_train", "t", "--eval_test", "v"]
    said = refused(run_submit(*GIVEN, *flags, cwd=folder, path=path))
    assert "too many jobs (evaluation knn; job 123 is cancelled)" in said
    assert (folder / "cancelled").read_text() == "123\n"


@pytest.mark.parametrize("cluster", ["slurm", "local", "debug"])
def test_an_unwritable_folder_is_refused(folder, sbatch, cluster):
    path = sbatch("Submitted batch job 123")
    flags = ["--out", "train.beton/a", "--cluster", cluster]
    assert "choose another --out" in refused(run_submit(*GIVEN, *flags, cwd=folder, path=path))
    assert (folder / "bin").exists()  # nothing but what was made is removed


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory here")
@pytest.mark.parametrize("hosts", ["elsewhere", "here"])
def test_a_folder_in_memory_is_refused_unless_the_cluster_is_this_machine(folder, sbatch, hosts):
    path = sbatch("Submitted batch job 123")
    name = os.uname().nodename if hosts == "here" else "gpu07"
    sinfo = folder / "bin/sinfo"
    sinfo.write_text(f"#!/bin/sh\necho {name}\n")
    sinfo.chmod(0o755)
    out = Path("/dev/shm") / f"{folder.name}_{hosts}_{os.getpid()}"
    try:
        done = run_submit(*GIVEN, "--out", str(out), cwd=folder, path=path)
        if hosts == "here":
            assert done.returncode == 0, done.stderr
        else:
            assert "in the memory of this machine (tmpfs at /dev/shm)" in refused(done)
            assert not out.exists()
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_another_configuration_in_the_same_folder_is_refused(folder, sbatch):
    path = sbatch("Submitted batch job 123")
    described = folder / "a/config.yaml"
    described.parent.mkdir()
    described.write_text("arch: xcit_nano_12_p8\ndata: train.beton\nout: a\noptim: {lr: 0.1}\n")
    said = refused(run_submit(*GIVEN, "--out", "a", cwd=folder, path=path))
    assert "optim.lr: 0.1 -> 0.00025" in said
    assert not (folder / "a/slurm").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--cluster local --nodes 2", "nodes must be 1 with cluster local, got 2"),
        ("--time 0.03", "signal_delay must be < the time limit (108 s), got 120"),
        ("--eval knn", "--eval knn needs labelled images: pass --eval_train and --eval_test"),
        ("--eval dreams --eval_train a", "--eval takes knn, linear, finetune, got dreams"),
        ("--eval knn --cluster local --gpus_per_node 0", "--eval needs SLURM, got cluster local"),
        ("--sweep lr", "--sweep takes name=value,value ..., or for"),
        ("--sweep lrr=1,2", "unknown option --lrr; nearest: --optim.lr"),
        ("--sweep lr=fast", "--optim.lr: expected a number, got fast"),
        ("--sweep arch=xcit_nano_12_p8", "--sweep cannot vary arch"),
        ("--sweep seed=1,1", "--sweep names a value twice"),
        ("--sweep seed=", "got no value of seed"),
        ("--sweep local_crops_scale=[0.05,0.4", "several numbers name=[a,b],[c,d], got local"),
        ("--sweep local_crops_scale=[[0.05,0.4]]", "several numbers name=[a,b],[c,d], got local"),
        ("--sweep local_crops_scale=0.05,0.4", "2 numbers, got 0.05 (--sweep takes name=value,"),
        ("--sweep local_crops_scale=[1],[1,2]", "2 numbers, got [1] (--sweep takes name=value,"),
    ],
)
def test_bad_options_are_refused(folder, sbatch, flags, complaint):
    path = sbatch("Submitted batch job 123")
    done = run_submit(*GIVEN, "--out", "a", *flags.split(), cwd=folder, path=path)
    assert complaint in refused(done)
    assert not (folder / "a").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("", "expected an evaluation ("),
        ("dreams", "got dreams"),
        ("knn --pixels --train a --test b --kk 3", "unknown option --kk"),
        ("knn --train a --test b", "give exactly one of --checkpoint"),
        ("knn --pixels --train a --test b --nodes many", "--slurm.nodes: expected an integer"),
    ],
)
def test_bad_evaluations_are_refused(folder, sbatch, flags, complaint):
    path = sbatch("Submitted batch job 123")
    assert complaint in refused(run_submit("eval", *flags.split(), cwd=folder, path=path))
    assert not (folder / "runs").exists()


# What a job does


def test_the_job_survives_pickling():
    config = load_config(TrainConfig, (), [*GIVEN, "--out", "a"])
    for work in (
        job.PretrainJob("", "a", 3, config),
        job.ScriptJob("/code", "a", 3, "knn", ("--pixels",)),
    ):
        assert pickle.loads(pickle.dumps(work)) == work


@pytest.fixture
def in_slurm(tmp_path, monkeypatch):
    """As if submitit had started this process on SLURM; the commands called are kept in a list."""
    called = []

    def run(command, **_):
        called.append(" ".join(command))
        return SimpleNamespace(stdout="RUNNING\n" if command[0] == "squeue" else "")

    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMITIT_FOLDER": str(tmp_path),
        "SLURM_JOB_ID": "12",
        "SLURM_PROCID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(job.subprocess, "run", run)
    before = {number: signal.getsignal(number) for number in job.SIGNALS}
    yield monkeypatch, called
    for number, handler in before.items():
        signal.signal(number, handler)


def run_job(work, tmp_path, code: str = "") -> int:
    """Run a job whose work is the function `work`; its exit status."""

    class Work(job.Job):
        def work(self) -> None:
            work()

    try:
        Work(code, str(tmp_path), 2)()
    except SystemExit as ended:
        return ended.code
    return 0


def kill_self(name: str):
    def work():
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(5)
        raise AssertionError("no signal")

    return work


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_a_job_that_was_told_to_stop_is_queued_again(in_slurm, tmp_path, name):
    _, called = in_slurm
    assert run_job(kill_self(name), tmp_path) == EXIT_STOPPED
    assert called[-2:] == ["squeue --noheader --jobs 12 --format %T", "scontrol requeue 12"]
    os.kill(os.getpid(), signal.SIGUSR2)  # SLURM's second signal finds nobody
    os.kill(os.getpid(), signal.SIGTERM)


def test_only_rank_0_queues_the_job_again_and_no_other_ends_it(in_slurm, tmp_path):
    monkeypatch, called = in_slurm
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert run_job(kill_self("SIGUSR2"), tmp_path) == 0
    assert called == []


def test_the_member_of_an_array_queues_itself_again(in_slurm, tmp_path):
    monkeypatch, called = in_slurm
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "11")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    run_job(kill_self("SIGUSR2"), tmp_path)
    assert called[-1] == "scontrol requeue 11_3"


def test_a_cancelled_or_interrupted_job_is_not_queued_again(in_slurm, tmp_path):
    monkeypatch, called = in_slurm
    assert run_job(kill_self("SIGINT"), tmp_path) == EXIT_STOPPED
    assert called == []
    answer = SimpleNamespace(stdout="COMPLETING\n")
    monkeypatch.setattr(job.subprocess, "run", lambda words, **_: called.append(words) or answer)
    assert run_job(kill_self("SIGTERM"), tmp_path) == EXIT_STOPPED
    assert [words[0] for words in called] == ["squeue"]


def test_attempts_without_progress_end_the_job(in_slurm, tmp_path, capsys):
    def work():
        raise Stopped("SIGUSR2")

    def attempt() -> int:
        return run_job(work, tmp_path)

    checkpoints = tmp_path / "checkpoints"
    assert attempt() == attempt() == EXIT_STOPPED
    (checkpoints / "step_00000007").mkdir(parents=True)
    assert attempt() == attempt() == EXIT_STOPPED
    capsys.readouterr()
    assert attempt() == 2
    assert "2 attempts of job 12 have ended without a step after 7" in capsys.readouterr().err
    rows = (tmp_path / "12_attempts.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 0, 7, 7, 7]


def test_a_job_that_imports_another_program_is_refused(in_slurm, tmp_path, capsys):
    assert run_job(lambda: None, tmp_path, code=str(tmp_path / "code_1")) == 2
    assert "but Python imports" in capsys.readouterr().err
    assert run_job(lambda: None, tmp_path, code=str(ROOT)) == 0


def test_a_users_mistake_is_one_line_in_the_log(in_slurm, tmp_path, capsys):
    def work():
        raise UserError("no such\nfile")

    assert run_job(work, tmp_path) == 2
    assert capsys.readouterr().err == "error: no such file\n"


# Without SLURM


def test_a_debug_job_trains_in_this_process(folder, monkeypatch):
    seen = []
    train = SimpleNamespace(train=lambda config: seen.append((config, dict(os.environ))))
    monkeypatch.setitem(sys.modules, "ssl_xcit.dino.train", train)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(folder)
    os.environ |= {"RANK": "7", "WORLD_SIZE": "9"}  # of an outer torchrun
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    argv = [*GIVEN, "--out", "a", "--cluster", "debug"]
    slurm.submit(load_config(SubmitConfig, FILES, argv))
    ((trained, environment),) = seen
    assert trained == load_config(TrainConfig, FILES[1:], argv[:-2])
    assert type(trained) is TrainConfig
    assert "RANK" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_an_error_in_a_debug_job_is_raised(folder, monkeypatch):
    def fail(config):
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "ssl_xcit.dino.train", SimpleNamespace(train=fail))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(folder)
    argv = [*GIVEN, "--out", "a", "--cluster", "debug"]
    with pytest.raises(ZeroDivisionError):
        slurm.submit(load_config(SubmitConfig, FILES, argv))


def test_a_local_job_trains_here_with_its_copy_of_the_program(photos, tmp_path):
    """Two processes, which are two ranks of one run. Each process is an interpreter of its own."""
    job_flags = ["--cluster", "local", "--gpus_per_node", "0", "--tasks_per_node", "2"]
    flags = tiny_flags(photos, "runs/a", epochs=1, batch_size_per_gpu=6, num_workers=1)
    environment = {"OMP_NUM_THREADS": "1", "path": os.environ["PATH"]}
    done = run_submit(*flags, *job_flags, cwd=tmp_path, start=subprocess.run, **environment)
    assert done.returncode == 0, done.stderr
    number = done.stdout.split()[1].rstrip(",")
    logs = tmp_path / "runs/a/slurm"
    end = time.monotonic() + 120
    while not all((logs / f"{number}_{task}_result.pkl").exists() for task in range(2)):
        assert time.monotonic() < end, (logs / f"{number}_0_log.err").read_text()
        time.sleep(0.05)
    log = (logs / f"{number}_0_log.out").read_text()
    assert f"program in {logs}/code_1" in log
    assert "rank 0 of 2 (submitit)" in log
    assert (tmp_path / "runs/a/checkpoints/step_00000004/manifest.json").exists()
