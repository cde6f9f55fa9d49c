"""The main job end to end on real images: `ssl-xcit demo [--out runs/demo] [--fresh]`.

Fashion-MNIST -> two .beton files -> DINO pretraining of an xcit_nano_12_p8 -> k-NN and linear probe
-> verdict and report.
Every stage is a command, printed before it runs. A stage whose result is in the folder is not
repeated: a second call prints the end alone, a killed one continues.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.verdict import verdict
from ssl_xcit.runtime.config import CONFIGS, read_config
from ssl_xcit.runtime.errors import UserError, exit_on_user_error
from ssl_xcit.runtime.processor import usable_cores
from ssl_xcit.training.metrics import read_metrics

TRAIN_IMAGES, TEST_IMAGES = 9_000, 2_000
KNN = ["--features", "cls", "patch", "--k", "20"]
VIEW = ["--resize", "32", "--crop", "32"]
LINEAR = ["--mode", "fast", "--features", "cls+patch", "--l2", "0.1", "0.01", "0.001"]


def main(argv: list[str] | None = None) -> None:
    """Run the missing stages, then print the results."""
    parser = argparse.ArgumentParser(prog="ssl-xcit demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything")
    parser.add_argument("--fresh", action="store_true", help="delete the last run, train anew")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    arguments = parser.parse_args(argv)
    with exit_on_user_error():
        if arguments.fresh:
            forget(arguments.out)
        demo(arguments.out.absolute(), arguments.seed)


def forget(out: Path) -> None:
    """Delete the last run and its results, and nothing else in the folder."""
    shutil.rmtree(out / "run", ignore_errors=True)
    for folder in out.glob("linear_*"):
        shutil.rmtree(folder)
    for result in out.glob("knn_*.json"):
        result.unlink()


def demo(out: Path, seed: int = 0) -> None:
    """Write the data, pretrain, evaluate, report; skip each stage whose result exists."""
    out.mkdir(parents=True, exist_ok=True)
    train, test, run = out / "fashion_train.beton", out / "fashion_test.beton", out / "run"
    for split, path, limit in (("train", train, TRAIN_IMAGES), ("test", test, TEST_IMAGES)):
        if not path.exists():
            options = ["--split", split, "--limit", str(limit)]
            _run("data", "write", "FashionMNIST", str(path), *options)
    finished = run / "finished"
    if not finished.exists():
        probe = ["--probe_train", str(train), "--probe_test", str(test)]
        options = ["--config", str(CONFIGS / "demo.yaml"), "--data", str(train), "--out", str(run)]
        _run("pretrain", *options, *probe, "--seed", str(seed))
        finished.touch()
    config = read_config(TrainConfig, run / "config.yaml")
    start = ("--arch", config.arch, "--random_init", "true", "--seed", str(config.seed))
    sources = {
        "untrained network": ("untrained", *start),  # what the pretraining started from
        "pretrained teacher": ("teacher", "--checkpoint", str(run)),
    }
    data = out, train, test
    # One process per core: neither their start nor their small steps gain from more threads
    with ThreadPoolExecutor(usable_cores()) as pool:
        waiting = {"raw pixels": [pool.submit(_knn, *data, "pixels", "--pixels", "true")]}
        for label, (name, *source) in sources.items():
            waiting[label] = [pool.submit(each, *data, name, *source) for each in (_knn, _linear)]
        rows = {
            label: [value for part in parts for value in part.result()]
            for label, parts in waiting.items()
        }
    metrics = read_metrics(run / "metrics.jsonl")
    report = run / "report.html"
    if not report.exists():
        results = [*sorted(out.glob("knn_*.json")), *sorted(out.glob("linear_*"))]
        _run("report", str(run), "--results", *map(str, results))
    print(table(rows, metrics))
    print(verdict(metrics, config).text)
    print(f"run folder {run}\nreport     {report}")


def table(rows: dict[str, list[float]], metrics: list[dict]) -> str:
    """The result as text: top-1 in percent for each source of features, and the loss.

    A row holds k-NN of the cls token, k-NN of the mean patch token, and the linear probe of both;
    for pixels, k-NN alone.
    """
    lines = [
        f"top-1 in % on {TEST_IMAGES:,} test images, {TRAIN_IMAGES:,} training images",
        f"{'':<22}{'k-NN, k = 20':^30}{'linear':>10}",
        f"{'features':<22}{'cls token':>12}{'mean of patches':>18}{'both':>10}",
    ]
    for label, values in rows.items():
        columns = zip(values, (12, 18, 10), strict=False)
        lines.append(f"{label:<22}" + "".join(f"{value:>{width}.1f}" for value, width in columns))
    first, last = metrics[0]["train/loss"], metrics[-1]["train/loss"]
    lines.append(f"loss {first:.2f} -> {last:.2f} in {metrics[-1]['step'] + 1} steps")
    return "\n" + "\n".join(lines)


def _knn(out: Path, train: Path, test: Path, name: str, *source: str) -> list[float]:
    """k-NN top-1 in percent for each kind of features; a stored result is read, not repeated."""
    result = out / f"knn_{name}.json"
    if not result.exists():
        data = ["--train", str(train), "--test", str(test), "--out", str(result)]
        _run("knn", *source, *data, *VIEW, *KNN, beside=True)
    return [row["top1"] for row in json.loads(result.read_text())["accuracy"]]


def _linear(out: Path, train: Path, test: Path, name: str, *source: str) -> list[float]:
    """Top-1 in percent of the fast linear probe; a stored result is read, not repeated."""
    folder = out / f"linear_{name}"
    if not (folder / "result.json").exists():
        data = ["--train", str(train), "--test", str(test), "--out", str(folder)]
        _run("linear", *source, *data, *VIEW, *LINEAR, beside=True)
    return [json.loads((folder / "result.json").read_text())["fast"]["top1"]]


def _run(*words: str, beside: bool = False) -> None:
    """Print `ssl-xcit WORDS`, run it, and stop with its exit status if it fails.

    `beside` others it has one thread, and its output appears when it ends.
    """
    line, options = "$ ssl-xcit " + " ".join(words), {}
    if beside:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        options = {"env": environment, "stdout": subprocess.PIPE, "text": True}
        options["stderr"] = subprocess.STDOUT
    else:
        print(line, flush=True)
    done = subprocess.run([sys.executable, "-m", "ssl_xcit", *words], check=False, **options)
    if beside:
        print(f"{line}\n{done.stdout}", end="", flush=True)
    status = done.returncode
    if status == 2:
        raise UserError(
            "the command above failed; if an older demo is in the way: ssl-xcit demo --fresh "
            "(make demo FRESH=1)"
        )
    if status:
        raise SystemExit(status)
