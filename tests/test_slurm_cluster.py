"""launch/submit.py against a real SLURM: see slurm_cluster.py. All jobs run side by side.

One run, `whole`, is left in peace; what happens to the others must not change a bit of theirs.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from slurm_cluster import ENDED, WANTED, SlurmCluster, Unavailable, install
from test_train import SMALL

from ssl_xcit.checkpoints.folder import load_latest
from ssl_xcit.data.loader import MultiCropLoader
from ssl_xcit.data.views import View
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.report.runs import list_runs
from ssl_xcit.runtime.config import read_config
from ssl_xcit.training.metrics import read_metrics

# SLURM takes its time: it waits before it queues a job again, before it ends one at its limit and
# before it calls a node lost. test_slurm.py has what a job does without it.
pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
SMALL = SMALL | {"epochs": 12, "num_workers": 1, "local_crops_number": 1}
STEPS = 48
JOB = {"gpus_per_node": 0, "cpus_per_task": 1, "time": 0.2, "signal_delay": 30}


class Run(NamedTuple):
    """A submitted run."""

    job: str
    out: Path
    said: str

    @property
    def rows(self) -> list[dict]:
        """Of metrics.jsonl, so far."""
        path = self.out / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    @property
    def log(self) -> str:
        """What rank 0 has printed."""
        return (self.out / f"slurm/{self.job}_0_log.out").read_text()

    @property
    def attempts(self) -> list[dict]:
        """How far the run had come at the start of each attempt."""
        path = self.out / f"slurm/{self.job}_attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def cluster():
    """Two nodes for whoever comes, and three whose jobs will suffer."""
    try:
        install()
    except Unavailable as reason:
        if WANTED == "required":
            raise
        pytest.skip(str(reason))
    cluster = SlurmCluster(nodes=5)
    with cluster:
        yield cluster
    assert cluster._processes() == []
    assert not cluster.folder.exists()


class Submitter:
    """Runs launch/submit.py in a folder with photos.beton."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def __call__(self, *flags: str, root: Path = ROOT, **changes) -> subprocess.CompletedProcess:
        settings = SMALL | {"data": "photos.beton"} | JOB | changes
        given = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        return subprocess.run(
            [sys.executable, str(root / "launch/submit.py"), *given, *flags],
            cwd=self.folder,
            env=self.cluster.environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=False,
        )

    def run(self, name: str, *flags: str, **options) -> Run:
        """Submit the run of this name."""
        done = self(*flags, "--out", f"runs/{name}", **options)
        assert done.returncode == 0, done.stderr
        return Run(done.stdout.split()[1].rstrip(","), self.folder / "runs" / name, done.stdout)


@pytest.fixture(scope="module")
def submit(cluster, photos, tmp_path_factory):
    # Compile the loader's kernels: a job takes them along, else each would spend 15 s on them
    next(iter(MultiCropLoader(photos, [[View(8, (1.0, 1.0))]], 4, dtype=torch.float32)))
    folder = tmp_path_factory.mktemp("submitted")
    shutil.copy(photos, folder / "photos.beton")
    return Submitter(cluster, folder)


def nodelist(cluster: SlurmCluster, *numbers: int) -> str:
    """The option that leaves a job these nodes."""
    others = [name for number, name in enumerate(cluster.names) if number not in numbers]
    return f"exclude={','.join(others)}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout that may be changed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("ssl_xcit", "configs", "eval", "launch"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("main_dino.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder / name)
    return folder


# What happens to the runs. Each function waits until its run is under way and returns the number of
# steps that it had logged by then.


def under_way(run: Run, cluster: SlurmCluster) -> int:
    end = time.monotonic() + 300
    while len(run.rows) < 3:
        assert time.monotonic() < end, cluster.job(run.job)
        assert cluster.state(run.job) not in ENDED, run.log
        time.sleep(0.1)
    return len(run.rows)


def command(run: Run, cluster: SlurmCluster, text: str) -> int:
    steps = under_way(run, cluster)
    cluster.run(*shlex.split(text.format(job=run.job)))
    return steps


def wait_for_the_limit(run: Run, cluster: SlurmCluster) -> int:
    """Stop the run's process until SLURM has warned of the limit, lest it ends before.

    SLURM's word counts: of a signal that came just before the stop, the process shows no trace.
    """
    steps = under_way(run, cluster)
    if cluster.has_signalled(run.job, signal.SIGUSR2):
        return 0  # a loaded machine: the limit has come by itself, maybe before these steps
    (pid,) = cluster.tasks(run.job)
    os.kill(pid, signal.SIGSTOP)
    try:
        end = time.monotonic() + 90
        while not cluster.has_signalled(run.job, signal.SIGUSR2):
            assert time.monotonic() < end, cluster.job(run.job)
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    return steps


def lose_node(run: Run, cluster: SlurmCluster) -> int:
    steps = under_way(run, cluster)
    cluster.kill_node(cluster.job(run.job)["NodeList"])
    return steps


@pytest.fixture(scope="module")
def events():
    """What happens to the runs, all at once: name -> a future of the steps logged by then."""
    return {}


@pytest.fixture(scope="module", autouse=True)
def runs(cluster, submit, checkout, events):
    """All runs, submitted before the first test looks at any; each meets its fate from then on."""
    images = ("--eval_train", "photos.beton", "--eval_test", "photos.beton")
    calm, alone, fragile = (nodelist(cluster, *n) for n in ((0, 1), (2,), (3, 4)))
    higher = f"sbatch --partition=high --exclusive --nodelist={cluster.names[2]}"
    higher += " --output=/dev/null --wrap='sleep 1'"
    described = {  # flags, and what happens
        "whole": ([calm], None),
        "signalled": ([calm, "--eval", "knn", *images], (command, "scancel --signal=USR2 {job}")),
        "cancelled": ([calm], (command, "scancel {job}")),
        "requeued": ([calm], (command, "scontrol requeue {job}")),
        "limited": ([calm, "--time", str(1 / 60), "--signal_delay", "10"], (wait_for_the_limit,)),
        "preempted": ([alone, "--partition", "low"], (command, higher)),
        "lost": ([fragile], (lose_node,)),
    }
    found = {}
    with ThreadPoolExecutor(len(described)) as pool:
        for name, (flags, fate) in described.items():
            found[name] = submit.run(name, "--additional", *flags)
            if fate:  # at once: on a loaded machine a run may end before the last is submitted
                events[name] = pool.submit(fate[0], found[name], cluster, *fate[1:])
        ranks = ("--nodes", "2", "--tasks_per_node", "2", "--batch_size_per_gpu", "3")
        pairs = "local_crops_scale=[0.05,0.4],[0.1,0.5]"
        sweep = ("--sweep", pairs, "lr=1e-3", "--additional", calm, "--eval", "knn", *images)
        held = ("--additional", f"{calm} hold")
        found["frozen"] = submit.run("frozen", *held, root=checkout, epochs=1)
        found["ranks"] = submit.run("ranks", "--additional", calm, *ranks, epochs=2)
        found["sweep"] = submit.run("sweep", *sweep, epochs=1)
        yield found


def assert_same_state(run: Run, whole: Run) -> None:
    """Every tensor of the last checkpoints is equal, but the log's own means."""
    (found, _), (expected, _) = (load_latest(r.out / "checkpoints") for r in (run, whole))
    assert found.state["step"] == expected.state["step"] == STEPS
    assert len(expected.tensors) >= 4
    for group in expected.tensors.keys() - {"meters"}:
        for name, tensor in expected.tensors[group].items():
            assert tensor.equal(found.tensors[group][name]), f"{group}/{name}"


def test_a_submitted_run_finishes_and_says_how_to_follow_it(runs, cluster):
    whole = runs["whole"]
    assert cluster.wait_for(whole.job) == "COMPLETED", whole.log
    assert [row["step"] for row in whole.rows] == list(range(STEPS))
    follow = next(line for line in whole.said.splitlines() if line.startswith("follow: "))
    assert Path(follow.split()[-1]) == whole.out / f"slurm/{whole.job}_0_log.out"
    assert f"scancel {whole.job}" in whole.said
    assert "one process (submitit) on cpu" in whole.log


@pytest.mark.parametrize(
    ("name", "why"),
    [("signalled", "SIGUSR2"), ("limited", "SIGUSR2"), ("preempted", "SIGTERM")],
)
def test_a_run_that_is_told_to_stop_goes_on_without_a_step_lost(runs, cluster, events, name, why):
    steps, run = events[name].result(), runs[name]
    assert cluster.wait_for(run.job) == "COMPLETED", run.log
    stops = [int(step) for step in re.findall(rf"stopped by {why} after (\d+) of", run.log)]
    assert steps <= stops[0] < STEPS
    # Each attempt begins where the last one stopped (a loaded machine meets several time limits)
    assert dict.fromkeys(attempt["step"] for attempt in run.attempts) == dict.fromkeys([0, *stops])
    assert cluster.job(run.job)["Restarts"] == str(len(run.attempts) - 1)
    assert len(run.attempts) == 2 or name == "limited"
    assert [row["step"] for row in run.rows] == list(range(STEPS))
    assert cluster.wait_for(runs["whole"].job) == "COMPLETED"
    assert_same_state(run, runs["whole"])


@pytest.mark.parametrize("name", ["requeued", "lost"])
def test_a_run_whose_process_or_node_is_killed_goes_on_from_its_folder(runs, cluster, events, name):
    events[name].result()
    run = runs[name]
    assert cluster.wait_for(run.job) == "COMPLETED", cluster.job(run.job)
    assert cluster.job(run.job)["Restarts"] == "1"
    first, second = run.attempts
    assert (first["host"] != second["host"]) or name == "requeued"
    assert [row["step"] for row in run.rows] == list(range(STEPS))
    assert cluster.wait_for(runs["whole"].job) == "COMPLETED"
    assert_same_state(run, runs["whole"])


def test_a_cancelled_run_saves_and_stays_cancelled(runs, cluster, events):
    events["cancelled"].result()
    run = runs["cancelled"]
    assert cluster.wait_for(run.job) == "CANCELLED"
    assert cluster.job(run.job)["Restarts"] == "0"
    assert len(run.attempts) == 1


def test_an_evaluation_waits_for_its_training_through_every_restart(runs, cluster, events):
    events["signalled"].result()
    run = runs["signalled"]
    job = re.search(r"evaluation knn after it: job (\d+)", run.said).group(1)
    assert cluster.wait_for(job) == "COMPLETED", (run.out / f"slurm/{job}_0_log.err").read_text()
    result = json.loads((run.out / "eval/knn.json").read_text())
    assert result["step"] == STEPS
    assert result["test"]["images"] == 48


def test_tasks_on_two_nodes_are_one_run(runs, cluster):
    run, whole = runs["ranks"], runs["whole"]
    assert cluster.wait_for(run.job) == "COMPLETED", run.log
    places = set()
    for task in range(4):
        text = (run.out / f"slurm/{run.job}_{task}_log.out").read_text()
        place = re.search(r"rank (\d) of 4 \(submitit\), local rank (\d) of 2", text)
        places.add(place.groups())
        assert re.search(rf"rank 0 is at {re.escape(cluster.names[0])}:\d+", text)
    assert places == {("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")}
    # The same images by one process: the schedule of the whole run differs from the second step on
    first = next(row for row in whole.rows if row["step"] == 0)
    assert run.rows[0]["train/loss"] == pytest.approx(first["train/loss"], rel=1e-4)


def test_a_sweep_is_one_array_with_a_run_folder_each(runs, cluster, submit):
    array = re.match(r"job (\d+)_0,", runs["sweep"].said).group(1)
    for number, (low, high) in enumerate(((0.05, 0.4), (0.1, 0.5))):
        assert cluster.wait_for(f"{array}_{number}") == "COMPLETED"
        run = submit.folder / f"runs/sweep/local_crops_scale={low}-{high}_lr=1e-3"
        assert f"job {array}_{number}, run folder runs/sweep/{run.name}" in runs["sweep"].said
        assert read_config(TrainConfig, run / "config.yaml").crops.local_crops_scale == (low, high)
        assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(4))


def table_of(said: str, cluster: SlurmCluster) -> list[list[str]]:
    """The cells of a sweep's last table, when its job has written it."""
    job, path = re.search(r"when all have ended: job (\d+), (\S+)", said).groups()
    assert cluster.wait_for(job) == "COMPLETED"
    return [re.split("  +", line) for line in Path(path).read_text().splitlines()]


def test_a_sweep_ends_with_one_table_of_its_runs_and_their_results(runs, cluster, submit):
    with contextlib.chdir(submit.folder):
        head, *rows = table_of(runs["sweep"].said, cluster)
        listed = list_runs(Path("runs/sweep")).splitlines()
    assert head[:7] == [
        "run",
        "crops.local_crops_scale",
        "optim.lr",
        *["state", "epoch", "steps", "loss"],
    ]
    assert head[7:] == ["k-NN", "logged", "verdict"]
    for row, pair in zip(rows, ("[0.05, 0.4]", "[0.1, 0.5]"), strict=True):
        result = json.loads((submit.folder / "runs/sweep" / row[0] / "eval/knn.json").read_text())
        top1 = max(found["top1"] for found in result["accuracy"])
        assert row[1:6] == [pair, "0.001", "finished", "1/1", "4"]
        assert row[7] == f"{top1:.2f}"
    assert [line.split()[0] for line in listed] == [line[0] for line in (head, *rows)]


def test_a_failed_run_is_called_so_in_the_table_of_its_sweep(cluster, submit):
    calm = nodelist(cluster, 0, 1)
    flags = ("--sweep", "batch_size_per_gpu=12,1000", "--additional", calm)  # of 48 images
    images = ("--eval", "knn", "--eval_train", "photos.beton", "--eval_test", "photos.beton")
    run = submit.run("failing", *flags, *images, epochs=1)
    with contextlib.chdir(submit.folder):
        _, bad, good = table_of(run.said, cluster)
    assert good[:3] == ["batch_size_per_gpu=12", "12", "finished"]
    assert bad == ["batch_size_per_gpu=1000", "1000", "failed", "cancelled"]


def in_shell(cluster: SlurmCluster, command: str, folder: Path) -> str:
    """What a command prints that is typed into the shell of four tasks."""
    line = f"({command}) < /dev/null > {folder}/out 2>&1"
    subprocess.run(
        ["script", "-qec", "srun -n4 --pty bash --norc --noprofile", "/dev/null"],
        input=f"{line}\nexit\n".encode(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=cluster.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False, timeout=120,
    )  # fmt: skip
    return (folder / "out").read_text()


JOIN = "from ssl_xcit.runtime import distributed as d; d.setup('cpu', 60); d.teardown()"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("{python}", "one process (an interactive shell in SLURM, whose 4 tasks need srun)"),
        ("srun --overlap -n2 {python}", "rank 0 of 2 (SLURM)"),  # which inherits SLURM_PTY_PORT
        ("srun --overlap -n2 bash -c '{python}; true'", "rank 0 of 2 (SLURM)"),
        (
            "sbatch --wait -o job --wrap '{python}; true' && cat job",
            "one process (a batch script in SLURM, whose 4 tasks need srun)",
        ),
    ],
)
def test_in_a_shell_of_several_tasks_only_srun_starts_ranks(cluster, tmp_path, command, expected):
    (tmp_path / "join.py").write_text(JOIN)
    line = f"cd {tmp_path}; " + command.format(python=f"{sys.executable} join.py")
    assert expected in in_shell(cluster, line, tmp_path)


def test_a_queued_run_keeps_the_program_that_it_was_submitted_with(runs, cluster, checkout):
    run = runs["frozen"]
    assert cluster.state(run.job) == "PENDING"
    (checkout / "ssl_xcit/dino/train.py").write_text("raise SystemExit('edited meanwhile')\n")
    (checkout / "configs/slurm.yaml").unlink()
    cluster.run("scontrol", "release", run.job)
    assert cluster.wait_for(run.job) == "COMPLETED", run.log
    assert f"program in {run.out}/slurm/code_1" in run.log
    assert (run.out / "slurm/code_1/configs/slurm.yaml").exists()


def test_what_a_dry_run_prints_is_what_sbatch_gets_and_takes(runs, cluster, submit):
    whole = runs["whole"]
    script = (whole.out / f"slurm/{whole.job}_submission.sh").read_text()
    calm = nodelist(cluster, 0, 1)
    done = submit("--out", "runs/whole", "--additional", calm, "--dry-run")
    assert done.stdout.replace("slurm/code_2", "slurm/code_1").startswith(script)
    accepted = subprocess.run(
        ["sbatch", "--test-only"], input=done.stdout, env=cluster.environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert accepted.returncode == 0, accepted.stderr
    assert "Job" in accepted.stderr
    assert "to start at" in accepted.stderr
    assert not (whole.out / "slurm/code_2").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--partition", "nope"), "error: SLURM refused the job: invalid partition specified"),
        (("--cpus_per_task", "1000"), "error: SLURM refused the job: "),
        (("--additional", "colour=blue"), "error: SLURM refused the job: "),
    ],
)
def test_what_slurm_refuses_is_one_line_and_leaves_nothing(submit, flags, complaint):
    done = submit(*flags, "--out", "runs/refused")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(complaint)
    assert done.stderr.count("\n") == 1
    assert not (submit.folder / "runs/refused").exists()


def test_a_folder_whose_job_has_not_ended_takes_no_second_one(cluster, submit):
    run = submit.run("held", "--additional", "hold")
    done = submit("--out", "runs/held")
    cluster.run("scancel", run.job)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"is the folder of job {run.job}, which is PENDING" in done.stderr
    assert submit.run("held", "--additional", "hold").job != run.job
    assert (run.out / "slurm/code_2").exists()


def test_plain_srun_tells_the_ranks_about_each_other(cluster, tmp_path):
    program = (
        "from ssl_xcit.runtime import distributed as d; r = d.setup('cpu', 60); import torch; "
    )
    program += "print('sum', int(d.all_reduce_mean(torch.ones(1) * r.rank) * 4)); d.teardown()"
    output = cluster.run(
        "srun", "--nodes=2", "--ntasks-per-node=2", f"--{nodelist(cluster, 0, 1)}",
        sys.executable, "-c", program, cwd=tmp_path,
    )  # fmt: skip
    assert output.count("sum 6") == 4
    assert output.count("rank 0 of 4 (SLURM), local rank 0 of 2, on cpu") == 1


# The cluster itself: whatever happens, nothing is left of it


def test_an_interrupted_cluster_leaves_no_process_and_no_file(cluster):
    def interrupted(other: SlurmCluster) -> None:
        with other:
            job = other.run("sbatch", "--output=/dev/null", "--wrap=srun sleep 1000").split()[-1]
            other.wait_for(job, "RUNNING")
            assert len(other._processes()) > 3  # the daemons
            raise KeyboardInterrupt

    other = SlurmCluster(nodes=1)
    with pytest.raises(KeyboardInterrupt):
        interrupted(other)
    assert other._processes() == []
    assert not other.folder.exists()
    assert "main" in cluster.run("sinfo")  # the one beside it


def test_the_daemons_of_a_killed_process_end_with_it(cluster):
    program = "import os, signal; from slurm_cluster import SlurmCluster; c = SlurmCluster(1); "
    program += "c.__enter__(); print(c.folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = object.__new__(SlurmCluster)
    left.folder, left._daemons = Path(done.stdout.strip()), {}
    end = time.monotonic() + 20
    while left._processes() and time.monotonic() < end:
        time.sleep(0.1)
    remaining = left._processes()
    left.__exit__()
    assert remaining == []
