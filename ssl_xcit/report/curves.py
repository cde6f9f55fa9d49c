"""Which curves a report shows, from the rows of metrics.jsonl: those whose keys are there."""

import math
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import NamedTuple

from ssl_xcit.report.charts import Chart, Series, Value

Values = dict[str, Value | None]  # a row of metrics.jsonl
Read = Callable[[Values], Value | EllipsisType | None]  # ...: the row says nothing of it
# Shown otherwise (the loss and the entropies beside ln K), or nothing that has a curve
NOT_DRAWN = {"step", "epoch", "progress", "train/loss", "train/bad_steps", "health/kl"}
NOT_DRAWN |= {f"health/{who}_entropy" for who in ("teacher", "student")}
NOT_DRAWN |= {"health/prototypes", "health/rankme_share"}  # what is drawn of them says as much
NOT_DRAWN |= {f"health/{what}_over_ln_k" for what in ("loss", "teacher_entropy", "student_entropy")}


class Curve(NamedTuple):
    """One chart: what it is called, what it tells, and which keys it shows under which name."""

    title: str
    note: str
    keys: dict[str, str]
    percent: bool = False
    scale: float = 1.0
    limits: tuple[Value, Value] | None = None
    reference: tuple[float, str] | None = None


LEARNING = [
    Curve(
        "k-NN accuracy",
        "Top-1 of the teacher's cls token, and of its mean patch token, on the probe's images.",
        {"probe/top1_cls": "cls token", "probe/top1_patch": "patches"},
        percent=True,
        scale=0.01,
    ),
    Curve(
        "Test accuracy",
        "On the test images, at the ends of epochs.",
        {"test/top1": "top-1", "test/top5": "top-5"},
        percent=True,
        scale=0.01,
    ),
]
HEALTH = [
    Curve(
        "Prototypes in use",
        "How many prototypes share a batch, of the most that it could need.",
        {"health/prototypes_used": ""},
        percent=True,
        limits=(0, 1),
    ),
    Curve(
        "Spread of the features",
        "Standard deviation of the teacher's features; 1 is even over the sphere, 0 a collapse.",
        {"health/feature_std": ""},
        limits=(0, 1),
        reference=(1.0, "even"),
    ),
    Curve(
        "Effective rank",
        "RankMe of the probe's cls tokens: in how many directions they differ.",
        {"health/rankme": ""},
    ),
    Curve("Length of the centre", "Norm of the teacher's mean logits.", {"health/center_norm": ""}),
    Curve("Gradient norm", "Of the student, before clipping.", {"train/grad_norm": ""}),
]
RUNNING = [
    Curve("Learning rate", "Scaled to the global batch.", {"schedule/lr": ""}),
    Curve("Weight decay", "", {"schedule/weight_decay": ""}),
    Curve(
        "Teacher's momentum",
        "Near 1 the teacher stands still; that is meant for the end.",
        {"schedule/momentum_teacher": ""},
    ),
    Curve(
        "Temperatures",
        "The teacher's is the lower one: it sharpens.",
        {"schedule/student_temp": "student", "schedule/teacher_temp": "teacher"},
    ),
    Curve("Speed", "Images per second, over all ranks.", {"speed/images_per_sec": ""}),
    Curve(
        "Waiting for data",
        "Share of the time in which training waited for images.",
        {"speed/data_wait": ""},
        percent=True,
    ),
    Curve(
        "Time of the probe",
        "Share of the run's time that its evaluations took.",
        {"speed/evaluation_share": ""},
        percent=True,
    ),
    Curve("Peak memory", "GiB, of the GPU or of the process.", {"memory/peak_gib": ""}),
]


def curves(rows: Sequence[Values], prototypes: int | None) -> dict[str, list[Chart]]:
    """Heading -> charts; `prototypes`: K of a pretraining, None of another training."""
    learning = [_loss(rows, prototypes), *_drawn(rows, LEARNING)]
    if prototypes:
        learning += _entropies(rows, math.log(prototypes))
    groups = {
        "What it learns": learning + _drawn(rows, HEALTH),
        "How it runs": _drawn(rows, RUNNING + _unknown(rows)),
    }
    return {heading: charts for heading, charts in groups.items() if charts}


def _loss(rows: Sequence[Values], prototypes: int | None) -> Chart:
    series = [_series("", rows, lambda row: row.get("train/loss", ...))]
    if not prototypes:
        return Chart("Loss", "Mean of the training loss since the last record.", series)
    note = "Stuck at ln K, all outputs are uniform; near 0, all images have one prototype."
    level = math.log(prototypes)
    return Chart("Loss", note, series, reference=(level, f"ln K = {level:.2f}: uniform"))


def _entropies(rows: Sequence[Values], ln_k: float) -> list[Chart]:
    """Entropies as shares of ln K, and KL, of runs of before and after those shares were logged."""

    def share(who: str) -> Read:
        def read(row: Values) -> Value | EllipsisType | None:
            nats = row.get(f"health/{who}_entropy", ...)
            of_nats = nats / ln_k if isinstance(nats, float) else nats
            return row.get(f"health/{who}_entropy_over_ln_k", of_nats)

        return read

    entropies = [_series(who, rows, share(who)) for who in ("teacher", "student")]
    entropies = [series for series in entropies if series.points]
    kl = _series("", rows, lambda row: row.get("health/kl", ...))
    note = "1: each image fits all prototypes alike; 0: each has chosen one."
    charts = []
    if entropies:
        level = (1.0, "uniform")
        charts.append(Chart("Entropy / ln K", note, entropies, limits=(0, 1), reference=level))
    if kl.points:
        charts.append(Chart("Teacher to student", "KL divergence, nats: what is to learn.", [kl]))
    return charts


def _drawn(rows: Sequence[Values], wanted: Sequence[Curve]) -> list[Chart]:
    """The charts of `wanted` of which the rows have anything."""
    charts = []
    for curve in wanted:
        series = [
            _series(label, rows, lambda row, key=key: row.get(key, ...), curve.scale)
            for key, label in curve.keys.items()
        ]
        series = [a for a in series if a.points]
        if series:
            few = 2 * max(len(a.points) for a in series) <= len(rows)
            charts.append(
                Chart(
                    curve.title,
                    curve.note,
                    series,
                    curve.percent,
                    curve.reference,
                    curve.limits,
                    dots=few,
                )
            )
    return charts


def _series(label: str, rows: Sequence[Values], read: Read, scale: float = 1.0) -> Series:
    """The values that `read` finds; a null, which stands for NaN or infinity, is None."""
    found = ((row["step"] + 1, read(row)) for row in rows)
    return Series(label, [(s, v if v is None else v * scale) for s, v in found if v is not ...])


def _unknown(rows: Sequence[Values]) -> list[Curve]:
    """A plain chart for each key that no other chart shows."""
    known = {key for curve in LEARNING + HEALTH + RUNNING for key in curve.keys}
    keys = dict.fromkeys(key for row in rows for key in row)
    return [Curve(key, "", {key: ""}) for key in keys if key not in known | NOT_DRAWN]
