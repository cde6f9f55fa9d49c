"""A run as one page, `RUN/report.html`: `ssl-xcit report RUN [--results PATH ...]`.

The page is self-contained and needs no network. It holds the verdict, the curves of metrics.jsonl,
pictures of sample images by the newest checkpoint, the results of evaluations, and the
configuration. Whatever a run has not logged or saved yet, its page says so or leaves out.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.verdict import verdict
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.report import page, pictures
from ssl_xcit.report.curves import curves
from ssl_xcit.report.page import Result
from ssl_xcit.report.runs import Config, describe_run, job_states, read_json, read_run
from ssl_xcit.runtime import options
from ssl_xcit.runtime.errors import UserError, exit_on_user_error
from ssl_xcit.runtime.files import new_file, read_metrics


def write_report(run: Path, results: Sequence[Path] = (), device: str = "auto") -> Path:
    """Write `run`/report.html, complete or not at all, and return its path.

    `results`: JSON files of evaluations, or folders of them, besides those in the run folder. The
    network of the pictures runs on `device`. Raises UserError for what is no run folder, a path
    without results, and a page that cannot be written.
    """
    config = read_run(run)
    rows = read_metrics(run / "metrics.jsonl")
    found = [*find_results(run, [run, run / "eval"]), *find_results(run, results, asked=True)]
    found = sorted(dict.fromkeys(found), key=_place)
    pretraining = isinstance(config, TrainConfig)
    settings = {name: options.as_text(v) for name, v in options.flat(config).items()}
    sections = [
        page.verdict_section(verdict(rows, config)) if pretraining and rows else "",
        page.numbers_section(_numbers(rows, found)),
        page.curves_section(curves(rows, config.head.out_dim if pretraining else None)),
        _or_why("What the network sees", page.seen_sections, pictures.seen, run, config, device),
    ]
    if pretraining:
        sections.append(_or_why("What it learns from", page.views_section, pictures.views, config))
    sections += [
        page.results_section(found),
        page.settings_section(settings, _changed(config)),
        page.environment_section(read_json(run / "environment.json")),
    ]
    out = run / "report.html"
    with new_file(out) as file:
        text = page.document(run.absolute().name, _facts(run, config, rows), sections)
        file.write(text.encode())
    return out


def _or_why(title: str, section: Callable, look: Callable, *arguments: object) -> str:
    """The section that shows what `look` returns, or one that says why there is nothing."""
    try:
        return section(look(*arguments))
    except UserError as error:
        return page.section(title, lead=f"No pictures: {error}")


def _facts(run: Path, config: Config, rows: list[dict]) -> list[str]:
    """Architecture, data, state, progress."""
    state = describe_run(run, job_states())["state"]
    facts = [config.arch or "architecture of --init", Path(config.data).name, state]
    if rows:
        last = rows[-1]
        facts.append(f"epoch {last['epoch'] + 1} of {config.optim.epochs}")
        facts.append(f"{last['step'] + 1:,} steps")
    return facts


def _numbers(rows: list[dict], results: list[Result]) -> dict[str, str]:
    """Label -> value, the newest of what matters most."""

    def logged(key: str) -> list[float | int]:
        return [row[key] for row in rows if row.get(key) is not None]

    numbers = {}
    for key, label in (
        ("probe/top1_cls", "k-NN, cls token"),
        ("probe/top1_patch", "k-NN, mean of patches"),
        ("test/top1", "top-1 on the test images"),
    ):
        if values := logged(key):
            numbers[label] = f"{values[-1]:.1f} %"
    if linear := [a.top1 for a in results if a.evaluation.startswith("linear") and a.ours]:
        numbers["linear probe"] = f"{max(linear):.1f} %"
    if losses := logged("train/loss"):
        numbers[f"loss, initially {losses[0]:.2f}"] = f"{losses[-1]:.2f}"
    if speeds := logged("speed/images_per_sec"):
        numbers["images per second, median"] = f"{statistics.median(speeds):,.0f}"
    if any(bad := logged("train/bad_steps")):
        numbers["steps skipped: not finite"] = f"{bad[-1]:,}"
    return numbers


def _changed(config: Config) -> frozenset[str]:
    """Names of the settings that differ from the defaults."""
    needed = {name: getattr(config, name) for name in options.required(type(config))}
    if isinstance(config, FinetuneConfig):
        needed |= {"init": config.init, "from_scratch": config.from_scratch, "arch": config.arch}
    default, settings = options.flat(type(config)(**needed)), options.flat(config)
    return frozenset(k for k, v in settings.items() if k not in needed and v != default[k])


def _place(result: Result) -> tuple:
    """Sort key: k-NN, then linear probes, then the rest; the best of each first."""
    name = result.evaluation
    return not name.startswith("k-NN"), not name.startswith("linear"), name, -result.top1


def find_results(run: Path, paths: Sequence[Path], asked: bool = False) -> Iterator[Result]:
    """The evaluations in JSON files, or in folders and their subfolders.

    Raises UserError for a path that was `asked` for and has none.
    """
    for path in paths:
        files = [path] if path.is_file() else sorted([*path.glob("*.json"), *path.glob("*/*.json")])
        found = [result for file in files for result in _results(run, file)]
        if asked and not found:
            raise UserError(
                f"{path}: expected the result of an evaluation or a folder of results, found none"
            )
        yield from found


def _results(run: Path, file: Path) -> Iterator[Result]:
    """The rows that one file adds to the table; none if it is not a result."""
    result = read_json(file)
    if "versions" not in result or "source" not in result:
        return
    network, ours = _network(run, result)
    images = result.get("test", {}).get("images")

    def row(label: str, found: Mapping, features: str = "") -> Result:
        top = found["top1"], found.get("top5")
        return Result(label, network, features, *top, images, str(file), ours)

    for found in result.get("accuracy", []):
        temperature = "" if found["temperature"] == 0.07 else f", T = {found['temperature']:g}"
        kind = found.get("features", result["features"])  # older results have one for the file
        label = f"k-NN, k = {found['k']}{temperature}"
        yield row(label, found, "" if kind == "pixels" else kind)
    for protocol in ("fast", "official"):
        if "top1" in (found := result.get(protocol) or {}):
            features = found.get("selected", {}).get("features", "")
            yield row(f"linear probe, {protocol}", found, features)
    if "top1" in result:
        tuned = f"fine-tuning, {result['epochs']} epochs" if "epochs" in result else ""
        yield row(tuned or "own classifier", result)


def _network(run: Path, result: Mapping) -> tuple[str, bool]:
    """The network in words, and whether it is this run's."""
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
    """The command `ssl-xcit report`."""
    parser = argparse.ArgumentParser(
        prog="ssl-xcit report", description="Write RUN/report.html: the run as one page."
    )
    parser.add_argument("run", type=Path, help="run folder")
    more = "more evaluations: JSON files, or folders"
    parser.add_argument("--results", type=Path, nargs="+", default=[], help=more)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args(argv)
    with exit_on_user_error():
        print(write_report(arguments.run, arguments.results, arguments.device))
