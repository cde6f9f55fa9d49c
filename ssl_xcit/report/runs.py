"""A list of all runs below a folder: `ssl-xcit runs runs`.

A row for each: the values that a sweep gave it, its state, epoch and finished steps by the newest
row of metrics.jsonl, the loss there, the newest k-NN top-1 in percent (of the cls token: by
eval/knn.json, the best k; else by the probe), how long ago something was logged, and for a
pretraining the verdict (`ssl-xcit verdict RUN` has the reasons). The states:

    pending, running, ...   what SLURM says of the run's job
    finished                all epochs are done
    unfinished              no job, and epochs left: the same command continues
    not started             no job, and nothing logged
"""

import argparse
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.verdict import read_rows, read_verdict
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.runtime import options
from ssl_xcit.runtime.errors import UserError, exit_on_user_error

# Folders that hold no run but many files
NO_RUNS = {"checkpoints", "slurm", "bad_step"}


def find_runs(root: Path) -> Iterator[Path]:
    """All run folders at or below `root`, also those whose job has not started, by name."""
    for folder, names, files in os.walk(root):
        path = Path(folder)
        if "run.json" in files or (path / "slurm/submission.json").exists():
            yield path
        names[:] = sorted(set(names) - NO_RUNS)


def describe_run(run: Path, states: dict[str, str]) -> dict[str, str]:
    """Column -> text; `states`: of the jobs that SLURM knows, by id."""
    submission = read_json(run / "slurm/submission.json")
    values = submission.get("sweep", {})
    swept = {name: options.as_text(value) for name, value in values.items()}
    log, epochs = run / "metrics.jsonl", _epochs(run)
    rows = read_rows(log)
    found = dict.fromkeys(("epoch", "steps", "loss", "k-NN", "logged", "verdict"), "")
    if rows:
        last = rows[-1]
        loss = last.get("train/loss")
        found["epoch"] = f"{last['epoch'] + 1}/{epochs or '?'}"
        found["steps"] = str(last["step"] + 1)
        found["loss"] = "not finite" if loss is None else f"{loss:.4f}"
        found["logged"] = f"{_duration(time.time() - log.stat().st_mtime)} ago"
        if not _fine_tunes(run):
            found["verdict"] = read_verdict(run).name
    probed = [row["probe/top1_cls"] for row in rows if "probe/top1_cls" in row]
    evaluated = [row["top1"] for row in read_json(run / "eval/knn.json").get("accuracy", [])]
    if evaluated or probed:
        found["k-NN"] = f"{max(evaluated) if evaluated else probed[-1]:.2f}"
    if submission.get("job") in states:
        state = states[submission["job"]].lower()
    elif epochs and _finished_epochs(run) >= epochs:
        state = "finished"
    else:
        state = "unfinished" if rows else "not started"
    return swept | {"state": state} | found


def list_runs(root: Path) -> str:
    """The table. Raises UserError where there is no run."""
    runs = list(find_runs(root))
    if not runs:
        raise UserError(f"no run folder at or below {root}")
    states = job_states()
    rows = []
    for run in runs:
        name = str(run.relative_to(root)) if run != root else run.name
        rows.append({"run": name} | describe_run(run, states))
    # Columns of one run, then of all: a sweep's values come between name and state
    swept = dict.fromkeys(key for row in rows for key in list(row)[1 : list(row).index("state")])
    columns = ["run", *swept, *list(rows[0])[list(rows[0]).index("state") :]]
    table = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def job_states() -> dict[str, str]:
    """State by id of the jobs that are in SLURM's queue, array members as "12_3"; {} without it."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--array", "--format", "%i %T"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(line.split(maxsplit=1) for line in found.stdout.splitlines())


def _epochs(run: Path) -> int | None:
    """Epochs that the run is to have."""
    if not (run / "config.yaml").exists():
        return None
    cls = FinetuneConfig if _fine_tunes(run) else TrainConfig
    return options.read_file(cls, run / "config.yaml").get("optim.epochs")


def _fine_tunes(run: Path) -> bool:
    return read_json(run / "run.json").get("kind") == "fine-tuning"


def _finished_epochs(run: Path) -> int:
    """Epochs in the newest checkpoint."""
    documents = (read_json(path) for path in run.glob("checkpoints/step_*/state.json"))
    return max((document.get("epoch", 0) for document in documents), default=0)


def read_json(path: Path) -> dict:
    """What the file says; {} if there is none, none yet, or no JSON object in it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _duration(seconds: float) -> str:
    """In the largest unit that it fills: "3 h"."""
    units = [("d", 86_400), ("h", 3_600), ("min", 60)]
    unit, length = next(((u, n) for u, n in units if seconds >= n), ("s", 1))
    return f"{int(seconds // length)} {unit}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="ssl-xcit runs", description="List all runs.")
    parser.add_argument("folder", type=Path, help="of run folders, or a run folder")
    with exit_on_user_error():
        print(list_runs(parser.parse_args(argv).folder))


if __name__ == "__main__":
    main()
