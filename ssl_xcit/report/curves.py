"""The curves of a report: which keys of metrics.jsonl each chart shows, and what it tells."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ssl_xcit.report.charts import Chart, Series, Value

Values = dict[str, Value | None]  # a row of metrics.jsonl
# No curve of its own: a repetition of another key, or no quantity of the training
NOT_DRAWN = {"step", "epoch", "progress", "train/bad_steps"}
NOT_DRAWN |= {"health/prototypes", "health/rankme_share"}
NOT_DRAWN |= {f"health/{what}_over_ln_k" for what in ("loss", "teacher_entropy", "student_entropy")}


class Curve(NamedTuple):
    """A chart without its lines, and key -> label of the lines."""

    chart: Chart
    keys: dict[str, str]
    scale: float = 1.0  # from the logged value to the drawn one


LEARNING = [
    Curve(
        Chart(
            "k-NN accuracy",
            "Top-1 on the probe's images, by the teacher's cls token and its mean patch token.",
            percent=True,
        ),
        {"probe/top1_cls": "cls token", "probe/top1_patch": "patches"},
        scale=0.01,
    ),
    Curve(
        Chart("Test accuracy", "On the test images, at the end of epochs.", percent=True),
        {"test/top1": "top-1", "test/top5": "top-5"},
        scale=0.01,
    ),
]
HEALTH = [
    Curve(
        Chart(
            "Prototypes in use",
            "Prototypes that share a batch, as a share of the most that it can use.",
            percent=True,
            limits=(0, 1),
        ),
        {"health/prototypes_used": ""},
    ),
    Curve(
        Chart(
            "Feature spread",
            "Standard deviation of the teacher's features: 1 if uniform on the sphere, 0 if "
            "collapsed.",
            reference=(1.0, "uniform"),
            limits=(0, 1),
        ),
        {"health/feature_std": ""},
    ),
    Curve(
        Chart("Effective rank", "RankMe of the probe's cls tokens: directions in use."),
        {"health/rankme": ""},
    ),
    Curve(Chart("Norm of the centre", "Of the teacher's logits."), {"health/center_norm": ""}),
    Curve(Chart("Gradient norm", "Of the student, before clipping."), {"train/grad_norm": ""}),
]
RUNNING = [
    Curve(Chart("Learning rate", "Scaled to the global batch."), {"schedule/lr": ""}),
    Curve(Chart("Weight decay"), {"schedule/weight_decay": ""}),
    Curve(
        Chart("Teacher momentum", "Near 1 the teacher stands still, as it should at the end."),
        {"schedule/momentum_teacher": ""},
    ),
    Curve(
        Chart("Temperatures", "The teacher's is lower: it sharpens."),
        {"schedule/student_temp": "student", "schedule/teacher_temp": "teacher"},
    ),
    Curve(Chart("Speed", "Images per second, over all ranks."), {"speed/images_per_sec": ""}),
    Curve(
        Chart("Data wait", "Share of the time spent waiting for images.", percent=True),
        {"speed/data_wait": ""},
    ),
    Curve(
        Chart("Evaluation time", "Share of the time spent on the probe.", percent=True),
        {"speed/evaluation_share": ""},
    ),
    Curve(Chart("Peak memory", "GiB, of the GPU or of the process."), {"memory/peak_gib": ""}),
]


def curves(rows: Sequence[Values], prototypes: int | None) -> dict[str, list[Chart]]:
    """Heading -> charts of the keys that the rows have.

    `prototypes`: K of a pretraining; None for a fine-tuning.
    """
    learning = [_loss(prototypes), *LEARNING, *_entropies(prototypes or 1), *HEALTH]
    known = {key for curve in learning + RUNNING for key in curve.keys}
    others = dict.fromkeys(key for row in rows for key in row if key not in known | NOT_DRAWN)
    running = [*RUNNING, *(Curve(Chart(key), {key: ""}) for key in others)]
    groups = {"What it learns": _drawn(rows, learning), "How it runs": _drawn(rows, running)}
    return {heading: charts for heading, charts in groups.items() if charts}


def _loss(prototypes: int | None) -> Curve:
    chart = Chart("Loss", "Mean of the training loss since the last record.")
    if prototypes:
        level = math.log(prototypes)
        chart = Chart(
            "Loss",
            "Stuck at ln K: all outputs are uniform. Near 0: all images share a prototype.",
            reference=(level, f"ln K = {level:.2f}: uniform"),
        )
    return Curve(chart, {"train/loss": ""})


def _entropies(prototypes: int) -> list[Curve]:
    """Of a pretraining's softmax outputs; the rows of other trainings have none."""
    shares = Chart(
        "Entropy / ln K",
        "1: every image fits all prototypes alike. 0: every image has one prototype.",
        reference=(1.0, "uniform"),
        limits=(0, 1),
    )
    keys = {f"health/{who}_entropy": who for who in ("teacher", "student")}
    divergence = Chart("KL divergence", "Teacher to student, nats: what is left to learn.")
    scale = 1 / math.log(prototypes) if prototypes > 1 else 1.0
    return [Curve(shares, keys, scale), Curve(divergence, {"health/kl": ""})]


def _drawn(rows: Sequence[Values], wanted: Sequence[Curve]) -> list[Chart]:
    """The charts of `wanted` of which the rows have anything."""
    charts = []
    for curve in wanted:
        lines = [_series(label, rows, key, curve.scale) for key, label in curve.keys.items()]
        lines = [line for line in lines if line.points]
        if lines:
            few = 2 * max(len(line.points) for line in lines) <= len(rows)
            charts.append(curve.chart._replace(series=lines, dots=few))
    return charts


def _series(label: str, rows: Sequence[Values], key: str, scale: float) -> Series:
    """The values of `key`; a null, which stands for NaN or infinity, is None."""
    found = ((row["step"] + 1, row[key]) for row in rows if key in row)
    return Series(label, [(step, v if v is None else v * scale) for step, v in found])
