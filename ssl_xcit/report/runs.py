"""A table of all runs below a folder, `ssl-xcit runs FOLDER`, and one run's verdict.

The table has one row per run: the values that a sweep gave it, its state, epoch, steps and loss by
the last row of metrics.jsonl, the k-NN top-1 of the cls token in percent (the best k of
eval/knn.json, else the last probe), the best top-1 of eval/linear and eval/finetune where there are
any, or the state of the job that is to find it, the time since the last row, and the verdict on a
pretraining.
The states:

    pending, running, ...   SLURM's state of the run's job
    failed, cancelled, ...  how it has ended, as long as SLURM remembers, with epochs left
    finished                all epochs are done
    unfinished              no job, epochs left: the same command continues the run
    not started             no job, no rows
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.verdict import verdict
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.runtime import options
from ssl_xcit.runtime.config import read_config
from ssl_xcit.runtime.errors import UserError, exit_on_user_error
from ssl_xcit.runtime.files import read_metrics, write_text
from ssl_xcit.runtime.sealed import read_sealed
from ssl_xcit.training.verdict import Verdict

Config = TrainConfig | FinetuneConfig
SKIPPED = {"checkpoints", "slurm", "bad_step"}  # folders with many files and no runs
COLUMNS = ("state", "epoch", "steps", "loss", "k-NN", "linear", "fine-tuning", "logged", "verdict")
SOME = {"linear", "fine-tuning"}  # columns that are left out where all are empty
# States of jobs that will not run again
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
ENDED |= {"OUT_OF_MEMORY", "TIMEOUT"}


def find_runs(root: Path) -> Iterator[Path]:
    """All run folders at or below `root` by name, with those whose job has not started."""
    for folder, names, files in os.walk(root):
        path = Path(folder)
        if "run.json" in files or (path / "slurm/submission.json").exists():
            yield path
        names[:] = sorted(set(names) - SKIPPED)


def read_run(run: Path) -> Config:
    """The configuration of a run folder. Raises UserError if it is not one."""
    if not (run / "config.yaml").is_file() or not (run / "run.json").is_file():
        raise UserError(f"{run} is not a run folder: expected config.yaml and run.json in it")
    fine_tuning = read_facts(run).get("kind") == "fine-tuning"
    return read_config(FinetuneConfig if fine_tuning else TrainConfig, run / "config.yaml")


def read_facts(run: Path) -> dict:
    """The content of run.json. Raises UserError if it is damaged."""
    try:
        return read_sealed(run / "run.json")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run}/run.json cannot be read ({error}): copy it from a backup"
        ) from error


def read_verdict(run: Path) -> Verdict:
    """The verdict on a run folder. Raises UserError if it is not that of a pretraining."""
    config = read_run(run)
    if not isinstance(config, TrainConfig):
        raise UserError(f"{run}: expected the run folder of a pretraining, got a fine-tuning's")
    return verdict(read_metrics(run / "metrics.jsonl"), config)


def read_json(path: Path) -> dict:
    """The JSON object in a file; {} if the file is missing, incomplete or something else.

    stderr says of a file that is there why it is left out.
    """
    try:
        return read_sealed(path)
    except OSError:
        return {}
    except ValueError as error:
        print(f"{path}: left out: {error}", file=sys.stderr)
        return {}


def describe_run(run: Path, states: dict[str, str]) -> dict[str, str]:
    """A text for each value that a sweep gave the run, then for each of COLUMNS.

    `states`: SLURM's state of each job, by id.
    """
    config = read_run(run) if (run / "config.yaml").exists() else None
    log = run / "metrics.jsonl"
    rows = read_metrics(log)
    found = dict.fromkeys(COLUMNS, "")
    if rows:
        last = rows[-1]
        loss = last.get("train/loss")
        found["epoch"] = f"{last['epoch'] + 1}/{config.optim.epochs if config else '?'}"
        found["steps"] = str(last["step"] + 1)
        found["loss"] = "not finite" if loss is None else f"{loss:.4f}"
        found["logged"] = f"{_duration(time.time() - log.stat().st_mtime)} ago"
        if isinstance(config, TrainConfig):
            found["verdict"] = verdict(rows, config).name
    submission = read_json(run / "slurm/submission.json")
    found |= _accuracies(run, rows, submission.get("evaluations") or {}, states)
    job = submission.get("job")
    saved = (read_json(path) for path in run.glob("checkpoints/step_*/state.json"))
    epochs = max((document.get("epoch", 0) for document in saved), default=0)
    if job in states and states[job] not in ENDED:
        found["state"] = states[job].lower()
    elif config and epochs >= config.optim.epochs:
        found["state"] = "finished"
    elif states.get(job, "COMPLETED") != "COMPLETED":
        found["state"] = states[job].lower()
    else:
        found["state"] = "unfinished" if rows else "not started"
    swept = submission.get("sweep") or {}
    return {setting: options.as_text(value) for setting, value in swept.items()} | found


def _accuracies(
    run: Path, rows: list[dict], jobs: dict[str, str], states: dict[str, str]
) -> dict[str, str]:
    """Top-1 of each evaluation, or the state of its job (`jobs`, by the evaluation's name)."""
    linear, finetune = (read_json(run / f"eval/{n}/result.json") for n in ("linear", "finetune"))
    fits = [linear.get(protocol) or {} for protocol in ("fast", "official")]
    measured = {
        "knn": [row["top1"] for row in read_json(run / "eval/knn.json").get("accuracy", [])],
        "linear": [fit["top1"] for fit in fits if fit.get("top1") is not None],
        "finetune": [finetune["top1"]] if finetune.get("top1") is not None else [],
    }
    found = {}
    for column, name in (("k-NN", "knn"), ("linear", "linear"), ("fine-tuning", "finetune")):
        tops, state = measured[name], states.get(jobs.get(name), "COMPLETED")
        if not tops and state != "COMPLETED":
            found[column] = state.lower()
            continue
        if not tops and name == "knn":
            tops = [row["probe/top1_cls"] for row in rows if "probe/top1_cls" in row][-1:]
        found[column] = f"{max(tops):.2f}" if tops else ""
    return found


def list_runs(root: Path) -> str:
    """The table. Raises UserError if there is no run."""
    runs = list(find_runs(root))
    if not runs:
        raise UserError(f"no run folder at or below {root}")
    states = job_states()
    rows = []
    for run in runs:
        name = str(run.relative_to(root)) if run != root else run.name
        rows.append({"run": name} | describe_run(run, states))
    swept = dict.fromkeys(key for row in rows for key in row if key not in ("run", *COLUMNS))
    shown = [name for name in COLUMNS if name not in SOME or any(row[name] for row in rows)]
    columns = ("run", *swept, *shown)
    table = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def job_states() -> dict[str, str]:
    """The state of each job by id, "12_3" for array members; {} without SLURM.

    Of those that SLURM still knows: all in its queue, and for some minutes what has ended.
    """
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--array", "--states=all", "--format", "%i %T"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(line.split(maxsplit=1) for line in found.stdout.splitlines())


def _duration(seconds: float) -> str:
    """In the largest unit that fits, rounded down: "3 h"."""
    units = [("d", 86_400), ("h", 3_600), ("min", 60)]
    unit, length = next(((u, n) for u, n in units if seconds >= n), ("s", 1))
    return f"{int(seconds // length)} {unit}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command `ssl-xcit runs`."""
    parser = argparse.ArgumentParser(prog="ssl-xcit runs", description="List the runs in a folder.")
    parser.add_argument("folder", type=Path, help="folder of run folders, or one run folder")
    parser.add_argument("--out", type=Path, help="also write the list into this file")
    arguments = parser.parse_args(argv)
    with exit_on_user_error():
        table = list_runs(arguments.folder)
        print(table)
        if arguments.out:
            write_text(arguments.out, table + "\n")


def verdict_main(argv: Sequence[str] | None = None) -> None:
    """The command `ssl-xcit verdict`."""
    parser = argparse.ArgumentParser(
        prog="ssl-xcit verdict", description="Say in words whether a pretraining works."
    )
    parser.add_argument("run", type=Path, help="run folder")
    with exit_on_user_error():
        print(read_verdict(parser.parse_args(argv).run).text)
