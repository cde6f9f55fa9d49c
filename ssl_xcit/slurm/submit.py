"""Submission of jobs to SLURM through submitit; no other module knows it.

job.py is what the jobs do, folder.py where their files are.
"""

import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.runtime import options
from ssl_xcit.runtime.config import load_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.slurm.config import SlurmConfig, SubmitConfig
from ssl_xcit.slurm.evaluations import settings_of
from ssl_xcit.slurm.folder import check_run_folder, describe, job_folder, next_code
from ssl_xcit.slurm.job import Job, PretrainJob, ScriptJob

try:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError
except ModuleNotFoundError as error:
    raise UserError("SLURM needs submitit: pip install 'ssl_xcit[slurm]'") from error

PLACEHOLDER = "PLACEHOLDER: no --data given, nor slurm.images in configs/slurm.yaml"

# Arguments of an evaluation that follows a training; {run} is the run folder
AFTER_TRAINING = {
    "knn": "--checkpoint {run} --train {train} --test {test} --out {run}/eval/knn.json",
    "linear": "--checkpoint {run} --train {train} --test {test} --out {run}/eval/linear",
    "finetune": "--init {run} --data {train} --test {test} --out {run}/eval/finetune",
}
SWEEP_SYNTAX = "name=value,value ..., or for a setting of several numbers name=[a,b],[c,d]"
SWEEP_TABLE = "sweep.txt"  # in --out
RESULT_FILES = {"knn": "knn.json", "supervised": "supervised.json"}  # the others write a folder


@dataclass(frozen=True)
class Submission:
    """Jobs that are submitted together: one, or the members of an array.

    `folder` takes their logs, submitit's files and the copy of the program. `dependency` is what
    they wait for, in SLURM's words.
    """

    name: str
    folder: Path
    slurm: SlurmConfig
    jobs: tuple[Job, ...]
    dependency: str = ""

    def parameters(self) -> dict:
        """The arguments of submitit.AutoExecutor; None leaves a choice to the cluster."""
        slurm = self.slurm
        setup = [
            # Since SLURM 22.05 srun does not inherit sbatch's cores: one core per process
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
            *self.environment(),
        ]
        # On clusters that do not requeue by default, a preempted job would be lost
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
        """The user's lines of shell, and two that make the job import the copy of the program.

        PYTHONSAFEPATH: otherwise `python -m` would look first into the working directory, which
        stays the same so that relative paths keep their meaning.
        """
        code = shlex.quote(self.jobs[0].code)
        return [
            *self.slurm.setup.splitlines(),
            "export PYTHONSAFEPATH=1",
            f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
        ]

    def script(self) -> str:
        """The script for sbatch; needs no SLURM."""
        executor = submitit.AutoExecutor(self.folder, cluster="debug")
        executor.cluster, executor._executor = "slurm", _OfflineExecutor(self.folder)
        executor.update_parameters(**self.parameters())
        offline = executor._executor
        if len(self.jobs) > 1:
            offline.parameters["map_count"] = len(self.jobs)
        return offline._make_submission_file_text(offline._submitit_command_str, "")

    def submit(self) -> list[submitit.Job]:
        """Submit the jobs. Raises UserError if SLURM refuses them."""
        try:
            with _outside_of_any_job(), contextlib.redirect_stderr(io.StringIO()):
                executor = submitit.AutoExecutor(self.folder, cluster=self.slurm.cluster)
                executor.update_parameters(**self.parameters())
                return executor.submit_array(self.jobs)
        except (FailedJobError, FailedSubmissionError) as error:
            said = "; ".join(dict.fromkeys(str(error).replace("sbatch: error: ", "").splitlines()))
            raise UserError(f"SLURM refused the job: {said}") from error


class _OfflineExecutor(submitit.SlurmExecutor):
    """A SlurmExecutor that does not look for SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def submit(config: SubmitConfig) -> None:
    """Submit `config` as one job, or a sweep as an array, and print how to follow it.

    Raises UserError for what is known before it runs: missing data, no SLURM, a folder that cannot
    be written, is not shared, or belongs to another configuration or a job that has not ended, and
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
    code, limit = next_code(out, slurm), slurm.max_idle_attempts
    jobs = tuple(PretrainJob(code, train.out, limit, train) for train, _ in runs)
    training = Submission(out.name, out.absolute() / "slurm", slurm, jobs)
    evaluations = {name: _evaluation(name, config, training) for name in slurm.eval}
    table = _table(training) if slurm.sweep and slurm.cluster == "slurm" else None
    if slurm.dry_run:
        _print_plan(config, training, evaluations, table)
        return
    if not config.data:
        raise UserError(
            "missing --data, and configs/slurm.yaml names no slurm.images: which .beton is it?"
        )
    if not Path(config.data).exists():
        raise UserError(f"no file {config.data}: --data must be on a disk that all machines share")
    for train, _ in runs:
        check_run_folder(train)
    with job_folder(out, slurm, code):
        submitted = training.submit()
    array, first = len(runs) > 1, submitted[0].job_id.partition("_")[0]
    dependency = f"{'aftercorr' if array else 'afterok'}:{first}"
    after = {}
    try:
        for name, evaluation in evaluations.items():
            waiting = replace(evaluation, dependency=dependency).submit()
            after[name] = [job.job_id for job in waiting]
        if table:
            ids = [first, *(ids[0].partition("_")[0] for ids in after.values())]
            (last,) = replace(table, dependency=f"afterany:{':'.join(ids)}").submit()
    except UserError as error:
        subprocess.run(["scancel", first], check=False)
        what = f"evaluation {name}" if len(after) < len(evaluations) else "table of the sweep"
        raise UserError(f"{error} ({what}; job {first} is cancelled)") from error
    for number, ((train, point), job) in enumerate(zip(runs, submitted, strict=True)):
        facts = {"sweep": point, "evaluations": {name: ids[number] for name, ids in after.items()}}
        describe(Path(train.out) / "slurm", job.job_id, slurm.cluster, code, facts)
        print(f"job {job.job_id}, run folder {train.out}")
    for name, ids in after.items():
        print(f"evaluation {name} after it: job {ids[0].partition('_')[0]}")
    if table:
        print(f"table of the sweep when all have ended: job {last.job_id}, {out / SWEEP_TABLE}")
    _follow(submitted, slurm, out if array else out.parent)


def submit_script(name: str, arguments: Sequence[str], slurm: SlurmConfig) -> None:
    """Submit an evaluation with these arguments, and print how to follow it.

    The evaluation of a run folder has its logs there, and its result in eval/ unless --out says
    otherwise; any other evaluation gets a folder in slurm.runs. Raises UserError as `submit` does.
    """
    given, _, _ = options.read_flags(settings_of(name), arguments)
    about = given.get("checkpoint") or given.get("init")
    if about and (Path(about) / "run.json").exists():
        out, results = Path(about), Path(about) / "eval"
    else:
        stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
        out = results = Path(slurm.runs) / "evaluations" / f"{name}_{stamp}"
    if "out" not in given:
        result = results / RESULT_FILES.get(name, name)
        arguments = [*arguments, "--out", str(result)]
    settings = load_config(settings_of(name), argv=arguments)
    code = next_code(out, slurm)
    job = ScriptJob(code, str(out), slurm.max_idle_attempts, name, tuple(arguments))
    submission = Submission(name, out.absolute() / "slurm", slurm, (job,))
    command = f"ssl-xcit {name} {shlex.join(arguments)}"
    if slurm.dry_run:
        print(submission.script())
        print(_commented(f"{command}\n"))
        print(_commented(options.to_yaml(settings)))
        return
    with job_folder(out, slurm, code):
        submitted = submission.submit()
    print(f"job {submitted[0].job_id}, {command}")
    _follow(submitted, slurm, None)


# What is submitted


def _evaluation(name: str, config: SubmitConfig, training: Submission) -> Submission:
    """An evaluation for each run of `training` when it has ended, on one machine each.

    Raises UserError for a name that cannot follow a training, or images that nothing names.
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
    jobs = []
    for job in training.jobs:
        words = tuple(w.format(run=job.out, **images) for w in AFTER_TRAINING[name].split())
        load_config(settings_of(name), argv=words)  # refuses what the command would
        jobs.append(ScriptJob(job.code, words[-1], job.max_idle_attempts, name, words))
    return replace(
        training,
        name=f"{name}_{training.name}",
        slurm=replace(slurm, nodes=1),
        jobs=tuple(jobs),
        dependency="afterok:ID",  # of the training, once it is submitted
    )


def _table(training: Submission) -> Submission:
    """The last job of a sweep: the list of its runs and of their results, on one core."""
    out = training.folder.parent
    words = (str(out), "--out", str(out / SWEEP_TABLE))
    first = training.jobs[0]
    small = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1}
    return replace(
        training,
        name=f"table_{training.name}",
        slurm=replace(training.slurm, **small, time=0.25, signal_delay=60),
        jobs=(ScriptJob(first.code, str(out), first.max_idle_attempts, "runs", words),),
        dependency="afterany:ID",  # also of what fails
    )


def _training(config: SubmitConfig, **changes: options.Value) -> TrainConfig:
    """The settings of the training, without those of the job."""
    values = {k: v for k, v in options.flat(config).items() if not k.startswith("slurm.")}
    return options.build(TrainConfig, values | changes)


def _sweep(config: SubmitConfig) -> list[tuple[TrainConfig, dict[str, options.Value]]]:
    """The run of every combination of the sweep's values, in a folder named after them; the values.

    Raises UserError for an unknown name or a bad value.
    """
    grid = _grid(" ".join(config.slurm.sweep))
    runs = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        flags = [f"--{name}={value}" for name, value in chosen.items()]
        try:
            point, _, _ = options.read_flags(TrainConfig, flags)
        except UserError as error:
            raise UserError(f"{error} (--sweep takes {SWEEP_SYNTAX})") from error
        if fixed := point.keys() & {"arch", "out"}:
            raise UserError(f"--sweep cannot vary {fixed.pop()}: it decides recipe or folder")
        folder = Path(config.out) / "_".join(map(_folder_word, chosen.items()))
        runs.append((_training(config, **point, out=str(folder)), point))
    if len({train.out for train, _ in runs}) < len(runs):
        raise UserError(f"--sweep names a value twice: {' '.join(config.slurm.sweep)}")
    return runs


def _grid(sweep: str) -> dict[str, list[str]]:
    """The values of each name. Raises UserError for what is not SWEEP_SYNTAX.

    "seed=0,1 lr=1" arrives split at its commas, so a space parts values as a comma does.
    """
    grid: dict[str, list[str]] = {}
    pattern = r"((?<![^\s,])[^\s,=\[\]]+=)|(\[[^\[\]=]*\]|[^\s,\[\]]+)(?=[\s,]|$)|([\s,]+)|(.)"
    for name, value, _, stray in re.findall(pattern, sweep):
        if name:
            grid[name[:-1]] = []
        elif stray or (value and not grid):
            raise UserError(f"--sweep takes {SWEEP_SYNTAX}, got {sweep}")
        elif value:
            grid[list(grid)[-1]].append(value)
    if empty := [name for name, values in grid.items() if not values]:
        raise UserError(f"--sweep takes {SWEEP_SYNTAX}, got no value of {empty[0]}")
    return grid


def _folder_word(assignment: tuple[str, str]) -> str:
    """A part of a folder's name, without what shells take for theirs: scale=0.4-1.0"""
    name, value = assignment
    words = "-".join(value.strip("[]").replace(",", " ").split())
    return f"{name.rpartition('.')[2]}={words}".replace("/", "-")


def _additional(text: str) -> dict[str, str | bool]:
    """Options of sbatch from "nodelist=n1 exclusive"."""
    found = {}
    for word in shlex.split(text):
        name, equals, value = word.partition("=")
        found[name.removeprefix("--").replace("_", "-")] = value if equals else True
    return found


@contextlib.contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """Hide the environment of the job that submits another, but no settings of the user's own."""
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    names |= {name for name in os.environ if name.startswith("SUBMITIT_")}
    if "SLURM_JOB_ID" in os.environ:
        names |= {name for name in os.environ if name.startswith(("SLURM_", "SRUN_"))}
        names -= {"SLURM_CONF"}
    hidden = {name: os.environ.pop(name) for name in names & os.environ.keys()}
    try:
        yield
    finally:
        os.environ.update(hidden)


# What is printed


def _print_plan(
    config: SubmitConfig,
    training: Submission,
    evaluations: dict[str, Submission],
    table: Submission | None,
) -> None:
    """The script, and all the rest in comments, so that sbatch takes the whole."""
    if config.slurm.cluster == "slurm":
        print(training.script())
    else:
        print(f"# cluster {config.slurm.cluster}: no script\n")
    shown = config if config.data else replace(config, data=PLACEHOLDER)
    print(_commented(f"settings\n{options.to_yaml(shown)}"))
    if config.slurm.sweep:
        print(_commented("run folders\n" + "".join(f"{job.out}\n" for job in training.jobs)))
    for name, evaluation in evaluations.items():
        print(_commented(f"evaluation {name}\n{evaluation.script()}"))
    if table:
        print(_commented(f"table of the sweep\n{table.script()}"))


def _commented(text: str) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines())


def _follow(jobs: list[submitit.Job], slurm: SlurmConfig, runs: Path | None) -> None:
    """Print commands to follow and stop the jobs; on the cluster "debug" run them here instead."""
    if slurm.cluster == "debug":
        for job in jobs:
            os.environ.update(job.environ)
            if error := job.exception():  # runs it; result() would open a debugger when it fails
                raise error
        return
    print(f"follow: tail -F {shlex.quote(str(jobs[0].paths.stdout))}")
    if runs is not None:
        print(f"all runs: ssl-xcit runs {shlex.quote(str(runs))}")
    stop = "scancel" if slurm.cluster == "slurm" else "kill"
    print(f"stop: {stop} {jobs[0].job_id.partition('_')[0]}", flush=True)
