"""A run as one page, `RUN/report.html`: `ssl-xcit report RUN [--results PATH ...]`.

The page is complete in itself: it asks the network for nothing. It holds the verdict, the curves of
metrics.jsonl, pictures of sample images by the newest checkpoint, the results of evaluations, and
the configuration. A run that has not saved or logged yet has a page without what is missing.
"""

import argparse
import os
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.verdict import verdict
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.report import pictures as report_pictures
from ssl_xcit.report.curves import curves
from ssl_xcit.report.page import Number, Report, Result, page
from ssl_xcit.report.runs import describe_run, job_states, read_json
from ssl_xcit.runtime import options
from ssl_xcit.runtime.config import read_config
from ssl_xcit.runtime.errors import UserError, exit_on_user_error
from ssl_xcit.runtime.files import new_file
from ssl_xcit.training.metrics import read_metrics

Config = TrainConfig | FinetuneConfig
Made = TypeVar("Made")


def write_report(run: Path, results: Sequence[Path] = (), device: str = "auto") -> Path:
    """Write `run`/report.html, complete or not at all, and return its path.

    Args:
        run: folder of a pretraining or fine-tuning.
        results: JSON files of evaluations, or folders of them, beside those in the run folder.
        device: where the network runs that the pictures are of.

    Raises:
        UserError: no run folder, a result that is none, or a page that cannot be written.
    """
    config = _read_run(run)
    text = page(gather(run, config, results, device))
    out = run / "report.html"
    with new_file(out, overwrite=True) as file:
        file.write(text.encode())
    return out


def gather(run: Path, config: Config, results: Sequence[Path], device: str) -> Report:
    """All that the page shows of a run."""
    log = run / "metrics.jsonl"
    rows = read_metrics(log) if log.exists() else []
    environment = read_json(run / "environment.json")
    pretraining = isinstance(config, TrainConfig)
    found = [*find_results(run, [run, run / "eval"]), *find_results(run, results, asked=True)]
    found = sorted(dict.fromkeys(found), key=_place)
    return Report(
        name=run.absolute().name,
        facts=_facts(run, config, rows),
        verdict=verdict(rows, config) if pretraining and rows else None,
        numbers=_numbers(rows, found),
        charts=curves(rows, config.head.out_dim if pretraining else None) if rows else {},
        seen=_or_why(lambda: report_pictures.seen(run, config, device)),
        views=_or_why(lambda: report_pictures.views(config)) if pretraining else None,
        results=found,
        settings={name: options.as_text(v) for name, v in options.flat(config).items()},
        own=_own(config),
        environment=_environment(environment),
        command=shlex.join(map(str, environment.get("command", []))),
    )


def _read_run(run: Path) -> Config:
    if not (run / "config.yaml").is_file() or not (run / "run.json").is_file():
        raise UserError(f"{run} is no run folder: expected config.yaml and run.json in it")
    kind = read_json(run / "run.json").get("kind", "pretraining")
    return read_config(
        FinetuneConfig if kind == "fine-tuning" else TrainConfig, run / "config.yaml"
    )


def _or_why(make: Callable[[], Made]) -> Made | str:
    """What `make` makes, or why it could not."""
    try:
        return make()
    except UserError as error:
        return str(error)


def _facts(run: Path, config: Config, rows: list[dict]) -> list[str]:
    """Architecture, data, how far it is."""
    arch = config.arch or "as in its start"
    facts = [arch, f"{Path(config.data).name}", describe_run(run, job_states())["state"]]
    if rows:
        last = rows[-1]
        facts.append(f"epoch {last['epoch'] + 1} of {config.optim.epochs}")
        facts.append(f"{last['step'] + 1:,} steps")
    return facts


def _numbers(rows: list[dict], results: list[Result]) -> list[Number]:
    """The newest of what matters most."""
    numbers = []
    for key, label in (
        ("probe/top1_cls", "k-NN, cls token"),
        ("probe/top1_patch", "k-NN, mean of patches"),
        ("test/top1", "top-1 on the test images"),
    ):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            numbers.append(Number(f"{values[-1]:.1f} %", label))
    linear = [a.top1 for a in results if a.evaluation.startswith("linear") and a.ours]
    if linear:
        numbers.append(Number(f"{max(linear):.1f} %", "linear probe"))
    losses = [row["train/loss"] for row in rows if row.get("train/loss") is not None]
    if losses:
        numbers.append(Number(f"{losses[-1]:.2f}", f"loss, at first {losses[0]:.2f}"))
    speeds = [row["speed/images_per_sec"] for row in rows if row.get("speed/images_per_sec")]
    if speeds:
        numbers.append(Number(f"{statistics.median(speeds):,.0f}", "images a second, median"))
    bad = next((row["train/bad_steps"] for row in reversed(rows) if row.get("train/bad_steps")), 0)
    if bad:
        numbers.append(Number(f"{bad:,}", "steps left out: not finite"))
    return numbers


def _own(config: Config) -> frozenset[str]:
    """Names of the settings that differ from the defaults."""
    needed = {name: getattr(config, name) for name in options.required(type(config))}
    if isinstance(config, FinetuneConfig):
        needed |= {"init": config.init, "from_scratch": config.from_scratch, "arch": config.arch}
    default = options.flat(type(config)(**needed))
    return frozenset(
        k for k, v in options.flat(config).items() if k not in needed and v != default[k]
    )


def _environment(facts: Mapping[str, object]) -> dict[str, str]:
    """What `run_folder` noted, in words."""
    told = {name: str(value) for name, value in facts.items() if value not in (None, 0, "")}
    told.pop("command", None)
    if "started" in told:
        told["started"] = told["started"].replace("T", " ").replace("+00:00", " UTC")
    return told


def _place(result: Result) -> tuple:
    """k-NN, then linear probes, then what learned all weights; the best of each first."""
    kinds = ("k-NN", "linear", "")
    kind = next(i for i, word in enumerate(kinds) if result.evaluation.startswith(word))
    return kind, result.evaluation, -result.top1


def find_results(run: Path, paths: Sequence[Path], asked: bool = False) -> Iterator[Result]:
    """The evaluations in JSON files, or in folders and the folders in these.

    Raises UserError for a path that was `asked` for and has none.
    """
    for path in paths:
        files = [path] if path.is_file() else sorted([*path.glob("*.json"), *path.glob("*/*.json")])
        found = [result for file in files for result in _results(run, file)]
        if asked and not found:
            raise UserError(
                f"{path}: expected the result of an evaluation, or a folder with some, found none"
            )
        yield from found


def _results(run: Path, file: Path) -> Iterator[Result]:
    """The lines of one file; none if it is something else."""
    result = read_json(file)
    if "versions" not in result or "source" not in result:
        return
    network, ours = _network(run, result)
    images = result.get("test", {}).get("images")
    name = str(file)
    for row in result.get("accuracy", []):
        temperature = "" if row["temperature"] == 0.07 else f", T = {row['temperature']:g}"
        label = f"k-NN, k = {row['k']}{temperature}"
        kind = row.get("features", result["features"])  # of older results, the file's
        kind = "" if kind == "pixels" else kind
        yield Result(label, network, kind, row["top1"], row["top5"], images, name, ours)
    for protocol in ("fast", "official"):
        if "top1" in (found := result.get(protocol) or {}):
            kind = found.get("selected", {}).get("features", "")
            label = f"linear probe, {protocol}"
            yield Result(label, network, kind, found["top1"], found.get("top5"), images, name, ours)
    if "top1" in result:
        label = (
            f"fine-tuning, {result['epochs']} epochs" if "epochs" in result else "own classifier"
        )
        yield Result(label, network, "", result["top1"], result.get("top5"), images, name, ours)


def _network(run: Path, result: Mapping) -> tuple[str, bool]:
    """Whose features or weights these are, and whether they are this run's."""
    if result["source"] == "pixels":
        return "raw pixels", False
    if result["source"] != "checkpoint":
        return "untrained network", False
    checkpoint = Path(str(result.get("checkpoint")))
    step = result.get("step")
    where = f"step {step:,}" if step is not None else checkpoint.name
    ours = Path(os.path.realpath(run)) in Path(os.path.realpath(checkpoint)).parents
    owner = "" if ours or step is None else f"{checkpoint.parent.parent.name}, "
    return f"{result.get('role') or 'network'}, {owner}{where}", ours


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="ssl-xcit report",
        description="Write RUN/report.html: a run as one page.",
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], help="evaluations: JSON files, or folders"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args(argv)
    with exit_on_user_error():
        print(write_report(arguments.run, arguments.results, arguments.device))


if __name__ == "__main__":
    main()
