"""Cost of a logged step's health metrics: CPU-ms of a step with and without them.

    python benchmarks/diagnostics.py [--setting demo|small] [--pairs 15]

Runs real steps of `ssl_xcit.dino.train` in one thread on one repeated batch of random pixels,
alternately with and without the extra work of a logged step: health metrics of logits and features,
the numbers of the row, and the verdict. `diagnostics_ms` times only this work, because the
difference between two steps is lost in noise. Figures are medians of CPU time; shares refer to an
interval of `log_every` steps, of which one is logged.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

SETTINGS = {
    "demo": ["--config", "configs/demo.yaml"],
    "small": ["--arch", "xcit_small_12_p16", "--batch_size_per_gpu", "8", "--out_dim", "65536"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="demo")
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"setting": args.setting, **measure(args, Path(folder))}))


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Return {"plain_ms": ..., "logged_ms": ..., "diagnostics_ms": ..., "share_percent": ...}."""
    import torch

    from ssl_xcit.dino import algorithm, train
    from ssl_xcit.dino.config import TrainConfig
    from ssl_xcit.runtime import distributed
    from ssl_xcit.runtime.config import load_config
    from ssl_xcit.training.engine import train_step
    from ssl_xcit.training.guard import BatchStatistics

    torch.set_num_threads(1)
    given = ["--data", str(write_noise(folder)), "--out", str(folder / "run"), "--device", "cpu"]
    given += ["--num_workers", "1", "--epochs", "1", "--warmup_epochs", "0", "--every", "0"]
    config = load_config(TrainConfig, ["pretrain/{arch}.yaml"], [*SETTINGS[args.setting], *given])
    task = train.Pretraining(config, distributed.setup("cpu"))
    statistics_of = BatchStatistics(task.modules())
    task.loader.set_epoch(0, 0)
    batch = next(iter(task.loader))
    batch = tuple(part.clone() for part in batch)
    task.loader.close()
    spent: dict[bool, list[float]] = {False: [], True: []}
    means, alone = algorithm.batch_means, []

    def timed(*arguments: object) -> torch.Tensor:
        start = time.process_time()
        found = means(*arguments)
        alone.append(1000 * (time.process_time() - start))
        return found

    algorithm.batch_means = timed
    for _, logged in itertools.product(range(args.pairs + 1), (False, True)):
        task.recorded = lambda step, logged=logged: logged
        start = time.process_time()
        train_step(task, iter([batch] * config.optim.accumulation_steps), 0, statistics_of)
        after = time.process_time()
        if logged:
            row = {"step": 0, "epoch": 0, "progress": 0.5, "train/loss": 1.0, "train/bad_steps": 0}
            row |= {f"health/{name}": value for name, value in task.health().items()}
            task.verdict([row] * 7)
            alone[-1] += 1000 * (time.process_time() - after)
        spent[logged].append(1000 * (time.process_time() - start))
    plain, logged = (statistics.median(spent[kind][1:]) for kind in (False, True))  # first: warm-up
    extra = statistics.median(alone[1:])
    interval = config.run.log_every * plain
    return {
        "plain_ms": round(plain, 1),
        "logged_ms": round(logged, 1),
        "diagnostics_ms": round(extra, 2),
        "log_every": config.run.log_every,
        "difference_percent": round(100 * (logged - plain) / interval, 3),
        "share_percent": round(100 * extra / interval, 3),
    }


def write_noise(folder: Path) -> Path:
    """Write a .beton of 64 JPEGs of random pixels."""
    import numpy as np
    from PIL import Image

    from ssl_xcit.data.writer import write_beton

    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(64):
        pixels = draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.jpg")
    write_beton(folder / "images", folder / "noise.beton", labels=False, progress=False)
    return folder / "noise.beton"


if __name__ == "__main__":
    main()
