"""The charts of a report: which keys of metrics.jsonl each shows, and what it tells."""

import math
from collections.abc import Sequence

from ssl_xcit.report.charts import Chart, Series, Value

Values = dict[str, Value | None]  # a row of metrics.jsonl
# No curve of its own: a repetition of another key, or no quantity of the training
NOT_DRAWN = {"step", "epoch", "progress", "train/bad_steps"}
NOT_DRAWN |= {"health/prototypes", "health/rankme_share"}
NOT_DRAWN |= {f"health/{what}_over_ln_k" for what in ("loss", "teacher_entropy", "student_entropy")}

LEARNING = [
    Chart(
        "k-NN accuracy",
        "Top-1 on the probe's images, by the teacher's cls token and its mean patch token.",
        {"probe/top1_cls": "cls token", "probe/top1_patch": "patches"},
        scale=0.01,
        percent=True,
    ),
    Chart(
        "Test accuracy",
        "On the test images, at the end of epochs.",
        {"test/top1": "top-1", "test/top5": "top-5"},
        scale=0.01,
        percent=True,
    ),
]
HEALTH = [
    Chart("KL divergence", "Teacher to student, nats: what is left to learn.", {"health/kl": ""}),
    Chart(
        "Prototypes in use",
        "Prototypes that share a batch, as a share of the most that it can use.",
        {"health/prototypes_used": ""},
        percent=True,
        limits=(0, 1),
    ),
    Chart(
        "Feature spread",
        "Standard deviation of the teacher's features: 1 if uniform on the sphere, 0 if collapsed.",
        {"health/feature_std": ""},
        reference=(1.0, "uniform"),
        limits=(0, 1),
    ),
    Chart(
        "Effective rank",
        "RankMe of the probe's cls tokens: directions in use.",
        {"health/rankme": ""},
    ),
    Chart("Norm of the centre", "Of the teacher's logits.", {"health/center_norm": ""}),
    Chart("Gradient norm", "Of the student, before clipping.", {"train/grad_norm": ""}),
]
RUNNING = [
    Chart("Learning rate", "Scaled to the global batch.", {"schedule/lr": ""}),
    Chart("Weight decay", "", {"schedule/weight_decay": ""}),
    Chart(
        "Teacher momentum",
        "Near 1 the teacher stands still, as it should at the end.",
        {"schedule/momentum_teacher": ""},
    ),
    Chart(
        "Temperatures",
        "The teacher's is lower: it sharpens.",
        {"schedule/student_temp": "student", "schedule/teacher_temp": "teacher"},
    ),
    Chart("Speed", "Images per second, over all ranks.", {"speed/images_per_sec": ""}),
    Chart(
        "Data wait",
        "Share of the time spent waiting for images.",
        {"speed/data_wait": ""},
        percent=True,
    ),
    Chart(
        "Evaluation time",
        "Share of the time spent on the probe.",
        {"speed/evaluation_share": ""},
        percent=True,
    ),
    Chart("Peak memory", "GiB, of the GPU or of the process.", {"memory/peak_gib": ""}),
]


def curves(rows: Sequence[Values], prototypes: int | None) -> dict[str, list[Chart]]:
    """Heading -> charts of the keys that the rows have; `prototypes`: K, None in fine-tuning."""
    learning = [_loss(prototypes), *LEARNING, _entropy(prototypes or 1), *HEALTH]
    known = NOT_DRAWN.union(*(chart.keys for chart in learning + RUNNING))
    others = dict.fromkeys(key for row in rows for key in row if key not in known)
    running = [*RUNNING, *(Chart(key, "", {key: ""}) for key in others)]
    groups = {}
    for heading, charts in (("What it learns", learning), ("How it runs", running)):
        if drawn := [found for chart in charts if (found := _with_lines(chart, rows)).series]:
            groups[heading] = drawn
    return groups


def _loss(prototypes: int | None) -> Chart:
    keys = {"train/loss": ""}
    if not prototypes:
        return Chart("Loss", "Mean of the training loss since the last record.", keys)
    level = math.log(prototypes)
    return Chart(
        "Loss",
        "Stuck at ln K: all outputs are uniform. Near 0: all images share a prototype.",
        keys,
        reference=(level, f"ln K = {level:.2f}: uniform"),
    )


def _entropy(prototypes: int) -> Chart:
    return Chart(
        "Entropy / ln K",
        "1: every image fits all prototypes alike. 0: every image has one prototype.",
        {f"health/{who}_entropy": who for who in ("teacher", "student")},
        scale=1 / (math.log(prototypes) or 1.0),
        reference=(1.0, "uniform"),
        limits=(0, 1),
    )


def _with_lines(chart: Chart, rows: Sequence[Values]) -> Chart:
    """The chart with a line for each of its keys that the rows have."""
    lines = []
    for key, label in chart.keys.items():
        if found := [(row["step"] + 1, row[key]) for row in rows if key in row]:
            # None stands for NaN and infinity
            scaled = [(step, v if v is None else v * chart.scale) for step, v in found]
            lines.append(Series(label, scaled))
    few = 2 * max((len(line.points) for line in lines), default=0) <= len(rows)
    return chart._replace(series=lines, dots=few)
