"""Submission of jobs to SLURM, through submitit (the only module that knows it).

What the jobs do is in job.py, where they lie in folder.py.
"""

import contextlib
import io
import itertools
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.runtime import options
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.slurm.config import SlurmConfig, SubmitConfig
from ssl_xcit.slurm.evaluations import Script, find_script
from ssl_xcit.slurm.folder import check_run_folder, describe, job_folder, next_code
from ssl_xcit.slurm.job import Job, PretrainJob, ScriptJob

try:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError
except ModuleNotFoundError as error:
    raise UserError("SLURM needs submitit: pip install 'ssl_xcit[slurm]'") from error

PLACEHOLDER = "PLACEHOLDER: no --data given, nor slurm.images in configs/slurm.yaml"
Member = tuple[TrainConfig, dict[str, options.Value]]  # a run, and the values of its sweep

# What an evaluation after a training is given, {run} being the run folder
AFTER_TRAINING = {
    "knn": "--checkpoint {run} --train {train} --test {test} --out {run}/eval/knn.json",
    "linear": "--checkpoint {run} --train {train} --test {test} --out {run}/eval/linear",
    "finetune": "--init {run} --data {train} --test {test} --out {run}/eval/finetune",
}
RESULT_FILES = {"knn": "knn.json", "supervised": "supervised.json"}  # the others write a folder


@dataclass(frozen=True)
class Submission:
    """Jobs that are submitted together: one, or the members of an array.

    `folder` is where their logs, submitit's files and the copy of the program lie. `dependency` is
    what they wait for, in SLURM's words.
    """

    name: str
    folder: Path
    slurm: SlurmConfig
    jobs: tuple[Job, ...]
    dependency: str = ""

    def parameters(self) -> dict:
        """The jobs in the words of submitit.AutoExecutor; None leaves a choice to the cluster."""
        slurm = self.slurm
        setup = [
            # Since SLURM 22.05 srun does not inherit sbatch's cores: one core per process
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
            *self.environment(),
        ]
        # Where the cluster's default is not to queue again, a preempted job would be lost
        additional = {"requeue": True, **_additional(slurm.additional)}
        if self.dependency:
            additional["kill-on-invalid-dep"] = "yes"
        return {
            "name": self.name,
            "nodes": slurm.nodes,
            "tasks_per_node": slurm.tasks_per_node or max(1, slurm.gpus_per_node),
            "gpus_per_node": slurm.gpus_per_node or None,
            "cpus_per_task": slurm.cpus_per_task,
            "mem_gb": slurm.mem or None,
            "timeout_min": max(1, round(60 * slurm.time)),
            "slurm_partition": slurm.partition or None,
            "slurm_account": slurm.account or None,
            "slurm_qos": slurm.qos or None,
            "slurm_constraint": slurm.constraint or None,
            "slurm_dependency": self.dependency or None,
            "slurm_signal_delay_s": slurm.signal_delay,
            "slurm_additional_parameters": additional,
            "slurm_setup": setup,
            "slurm_srun_args": ["--kill-on-bad-exit=1"],  # one dead rank ends them all
            "local_setup": self.environment(),
        }

    def environment(self) -> list[str]:
        """The user's shell lines, and such that make the job import the copy of the program.

        PYTHONSAFEPATH: or else `python -m` would first look into the working directory, which is
        left as it was so that relative paths mean the same.
        """
        code = shlex.quote(self.jobs[0].code)
        return [
            *self.slurm.setup.splitlines(),
            "export PYTHONSAFEPATH=1",
            f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
        ]

    def script(self) -> str:
        """What sbatch is given."""
        executor = _OfflineExecutor(self.folder)
        given = {key: value for key, value in self.parameters().items() if value is not None}
        general = {key: given[key] for key in given if not key.startswith(("slurm_", "local_"))}
        special = {k.removeprefix("slurm_"): v for k, v in given.items() if k.startswith("slurm_")}
        executor.parameters = executor._convert_parameters(general) | special
        if len(self.jobs) > 1:
            executor.parameters["map_count"] = len(self.jobs)
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def submit(self) -> list[submitit.Job]:
        """Submit them. Raises UserError when SLURM refuses."""
        try:
            with _outside_of_any_job(), contextlib.redirect_stderr(io.StringIO()):
                executor = submitit.AutoExecutor(self.folder, cluster=self.slurm.cluster)
                executor.update_parameters(**self.parameters())
                return executor.submit_array(self.jobs)
        except (FailedJobError, FailedSubmissionError) as error:
            said = "; ".join(dict.fromkeys(str(error).replace("sbatch: error: ", "").splitlines()))
            raise UserError(f"SLURM refused the job: {said}") from error


class _OfflineExecutor(submitit.SlurmExecutor):
    """Knows what would be submitted, also on a machine without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def submit(config: SubmitConfig) -> None:
    """Submit `config` as one job, or a sweep as an array, and say how to follow it.

    Raises UserError for what can be known now: no data, no SLURM, a folder that cannot be written
    or is not shared, that belongs to another configuration or to a job that has not ended, and
    whatever SLURM refuses.
    """
    slurm = config.slurm
    config = replace(
        config,
        data=config.data or slurm.images,
        out=config.out or str(Path(slurm.runs) / config.arch),
    )
    out = Path(config.out)
    runs = _sweep(config) if slurm.sweep else [(_training(config), {})]
    evaluations = {name: _evaluation_arguments(name, config, runs) for name in slurm.eval}
    if slurm.dry_run:
        _print_plan(config, runs, evaluations)
        return
    if not config.data:
        raise UserError(
            "missing --data, and configs/slurm.yaml names no slurm.images: which .beton is it?"
        )
    if not Path(config.data).exists():
        raise UserError(f"no file {config.data}: --data must be on a disk that all machines share")
    for train, _ in runs:
        check_run_folder(train)
    with job_folder(out, slurm) as code:
        jobs = _pretraining(config, runs, code).submit()
    array, first = len(runs) > 1, jobs[0].job_id.partition("_")[0]
    dependency = f"{'aftercorr' if array else 'afterok'}:{first}"
    after = {}
    try:
        for name, arguments in evaluations.items():
            submitted = _evaluation(name, arguments, config, code, dependency).submit()
            after[name] = [job.job_id for job in submitted]
    except UserError as error:
        subprocess.run(["scancel", first], check=False)
        raise UserError(f"{error} (evaluation {name}; job {first} is cancelled)") from error
    for number, ((train, point), job) in enumerate(zip(runs, jobs, strict=True)):
        facts = {"sweep": point, "evaluations": {name: ids[number] for name, ids in after.items()}}
        describe(Path(train.out) / "slurm", job.job_id, slurm.cluster, code, facts)
    for (train, _), job in zip(runs, jobs, strict=True):
        print(f"job {job.job_id}, run folder {train.out}")
    for name, ids in after.items():
        print(f"evaluation {name} after it: job {ids[0].partition('_')[0]}")
    _print_advice(jobs, slurm, out if array else out.parent)
    _run_now(jobs, slurm)


def submit_script(script: Script, arguments: Sequence[str], slurm: SlurmConfig) -> None:
    """Submit an evaluation with these arguments, and say how to follow it.

    The evaluation of a run folder has its logs there, and by default its result in eval/; of
    anything else in a folder of its own in slurm.runs. Raises UserError as `submit` does.
    """
    run = _run_folder_of(arguments)
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    out = run or Path(slurm.runs) / "evaluations" / f"{script.name}_{stamp}"
    if not any(token.partition("=")[0] == "--out" for token in arguments):
        results = out / "eval" if run else out
        result = results / RESULT_FILES.get(script.name, script.name)
        arguments = [*arguments, "--out", str(result)]
    settings = script.check(arguments)

    def submission(code: str) -> Submission:
        job = ScriptJob(code, str(out), slurm.max_idle_attempts, script.name, tuple(arguments))
        return Submission(script.name, out.absolute() / "slurm", slurm, (job,))

    if slurm.dry_run:
        print(submission(next_code(out, slurm)).script())
        print(_commented(f"ssl-xcit {script.name} {shlex.join(arguments)}\n"))
        print(_commented(options.to_yaml(settings)))
        return
    with job_folder(out, slurm) as code:
        jobs = submission(code).submit()
    print(f"job {jobs[0].job_id}, ssl-xcit {script.name} {shlex.join(arguments)}")
    _print_advice(jobs, slurm, None)
    _run_now(jobs, slurm)


# What is submitted


def _pretraining(config: SubmitConfig, runs: list[Member], code: str) -> Submission:
    """The trainings."""
    limit = config.slurm.max_idle_attempts
    jobs = tuple(PretrainJob(code, train.out, limit, train) for train, _ in runs)
    folder = Path(config.out).absolute() / "slurm"
    return Submission(Path(config.out).name, folder, config.slurm, jobs)


def _evaluation_arguments(name: str, config: SubmitConfig, runs: list[Member]) -> list[list[str]]:
    """What an evaluation is given for each run, once its training has ended.

    Raises UserError unless it is an evaluation that can be, of images that are named.
    """
    slurm = config.slurm
    if name not in AFTER_TRAINING:
        raise UserError(f"--eval takes {', '.join(AFTER_TRAINING)}, got {name}")
    if slurm.cluster != "slurm":
        raise UserError(
            f"--eval needs SLURM, got cluster {slurm.cluster}: run ssl-xcit {name} afterwards"
        )
    images = {
        "train": slurm.eval_train or config.probe.probe_train,
        "test": slurm.eval_test or config.probe.probe_test,
    }
    missing = [f"--eval_{key}" for key, path in images.items() if not path]
    if missing:
        raise UserError(f"--eval {name} needs labelled images: pass {' and '.join(missing)}")
    words = AFTER_TRAINING[name].split()
    found = [[word.format(run=train.out, **images) for word in words] for train, _ in runs]
    for arguments in found:
        find_script(name).check(arguments)
    return found


def _evaluation(
    name: str, arguments: list[list[str]], config: SubmitConfig, code: str, dependency: str
) -> Submission:
    """The evaluations of all runs, on one machine each."""
    out, limit = Path(config.out), config.slurm.max_idle_attempts
    jobs = tuple(
        ScriptJob(code, words[-1], limit, name, tuple(words))  # the last word is --out's
        for words in arguments
    )
    label, folder = f"{name}_{out.name}", out.absolute() / "slurm"
    return Submission(label, folder, replace(config.slurm, nodes=1), jobs, dependency)


def _training(config: SubmitConfig, **changes: options.Value) -> TrainConfig:
    """The settings of a training without those of the job."""
    values = {k: v for k, v in options.flat(config).items() if not k.startswith("slurm.")}
    return options.build(TrainConfig, values | changes)


def _sweep(config: SubmitConfig) -> list[Member]:
    """Every combination of the sweep's values, each with a run folder named after them.

    Raises UserError for a name or value that is none.
    """
    grid: dict[str, list[str]] = {}
    for word in config.slurm.sweep:  # commas and spaces have parted "seed=0,1 lr=1"
        name, equals, value = word.partition("=")
        if equals:
            grid[name] = [value]
        elif grid:
            grid[list(grid)[-1]].append(word)
        else:
            raise UserError(f"--sweep takes name=value,value ..., got {word}")
    runs = []
    for values in itertools.product(*grid.values()):
        point: dict[str, options.Value] = {}
        for name, value in zip(grid, values, strict=True):
            given, _, _ = options.read_flags(TrainConfig, [f"--{name}={value}"])
            if given.keys() & {"arch", "out"}:
                raise UserError(f"--sweep cannot vary {name}: it decides recipe or folder")
            point |= given
        leaves = (name.rpartition(".")[2] for name in grid)
        words = [f"{leaf}={value}" for leaf, value in zip(leaves, values, strict=True)]
        folder = Path(config.out) / "_".join(words).replace("/", "-")
        runs.append((_training(config, **point, out=str(folder)), point))
    if len({train.out for train, _ in runs}) < len(runs):
        raise UserError(f"--sweep names a value twice: {' '.join(config.slurm.sweep)}")
    return runs


def _additional(text: str) -> dict[str, str | bool]:
    """Options of sbatch's from "nodelist=n1 exclusive"."""
    found = {}
    for word in shlex.split(text):
        name, equals, value = word.partition("=")
        found[name.removeprefix("--").replace("_", "-")] = value if equals else True
    return found


@contextlib.contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """Hide what would make a job that is submitted from within another resemble that one."""
    inside = "SLURM_JOB_ID" in os.environ
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    hidden = {
        name: value
        for name, value in os.environ.items()
        if name in ranks
        or name.startswith("SUBMITIT_")
        or (inside and name.startswith(("SLURM_", "SRUN_")) and name != "SLURM_CONF")
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


# What is said


def _print_plan(
    config: SubmitConfig, runs: list[Member], evaluations: dict[str, list[list[str]]]
) -> None:
    """The script, and in comments all the rest, so that the whole can be given to sbatch."""
    code = next_code(Path(config.out), config.slurm)
    if config.slurm.cluster == "slurm":
        print(_pretraining(config, runs, code).script())
    else:
        print(f"# cluster {config.slurm.cluster}: no script\n")
    shown = config if config.data else replace(config, data=PLACEHOLDER)
    print(_commented(f"settings\n{options.to_yaml(shown)}"))
    if config.slurm.sweep:
        print(_commented("run folders\n" + "".join(f"{train.out}\n" for train, _ in runs)))
    for name, arguments in evaluations.items():
        script = _evaluation(name, arguments, config, code, "afterok:ID").script()
        print(_commented(f"evaluation {name}\n{script}"))


def _commented(text: str) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines())


def _print_advice(jobs: list[submitit.Job], slurm: SlurmConfig, runs: Path | None) -> None:
    """Commands to follow and stop the jobs."""
    if slurm.cluster == "debug":
        return
    job = jobs[0].job_id.partition("_")[0]
    print(f"follow: tail -F {shlex.quote(str(jobs[0].paths.stdout))}")
    if runs is not None:
        print(f"all runs: ssl-xcit runs {shlex.quote(str(runs))}")
    print(f"stop: {'scancel' if slurm.cluster == 'slurm' else 'kill'} {job}", flush=True)


def _run_now(jobs: list[submitit.Job], slurm: SlurmConfig) -> None:
    """On the cluster "debug": run the jobs, one after the other, in this process."""
    if slurm.cluster != "debug":
        return
    for job in jobs:
        os.environ.update(job.environ)
        # exception() runs it; result() would open a debugger when it fails
        if error := job.exception():
            raise error


def _run_folder_of(arguments: Sequence[str]) -> Path | None:
    """The run folder that an evaluation is about, if it is about one."""
    for option, value in itertools.pairwise([*arguments, ""]):
        name, equals, inline = option.partition("=")
        if name in ("--checkpoint", "--init"):
            path = Path(inline if equals else value)
            return path if (path / "run.json").exists() else None
    return None
