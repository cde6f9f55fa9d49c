"""Does a pretraining work? A verdict in words, in the log and by `ssl-xcit verdict RUN`.

It rests on the rows of metrics.jsonl and the configuration alone. The first of these that holds is
the verdict; figures are medians of the newest RECENT rows.

    too early to tell           less than EARLY of the run is done
    diverging                   loss or gradients are not finite in BAD_STEPS of the steps
    teacher not moving          more than KEPT of the teacher's initial weights will remain
    diverging                   the loss is RISE ln K above its minimum, and either above LOST ln K
                                or the features hardly differ any more (GONE)
    uniform collapse            the teacher's entropy exceeds UNIFORM ln K: it prefers no prototype
    single-prototype collapse   all images share FEW prototypes
    dimensional collapse        the features hardly differ (SPREAD), or in few directions (RANK)
    healthy                     none of these

K is `out_dim`. The comments below give the reasons for the thresholds. Their figures are from
trainings of an xcit_nano_12 on Fashion-MNIST: the demo, and runs made to fail.
"""

import math
import statistics

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.training.verdict import Verdict

# Share of the run. Up to here all runs look alike: outputs are nearly uniform (the healthy demo has
# a loss of 1.01 ln K) while the centre settles and the learning rate warms up.
EARLY = 0.05
# Share of the run. Uniform outputs are normal during the warmup, but not for longer than this.
LONGEST_WARMUP = 0.2
# Rows. One row may be one batch; five pass soon enough to show a change.
RECENT = 5
# Share of the steps. The run itself gives up only after `max_bad_steps` in a row.
BAD_STEPS = 0.1
# Share of the teacher's weights. Its momentum rises from m to 1 on a half cosine over the N steps
# of a run, so about exp(-(1 - m) N / 2) of the initial weights remain at the end. Above a half, the
# teacher is more a random network than an average of students. (The demo ends with 4 %; a momentum
# near 1 at the end of the schedule is intended.)
KEPT = 0.5
# Of ln K. A healthy loss falls, or fluctuates by a tenth; with too high a learning rate it swings
# from 0.01 to 0.7 and back in 20 steps. The minimum is that at the present teacher temperature: a
# higher temperature raises the entropy, and so the loss, of a healthy run.
RISE = 0.25
# Of ln K, and of the maximal standard deviation of the features: all learning is lost. ln K is the
# loss of uniform outputs. A rise alone may come from the centre, which in a run of tens of steps
# settles after the student has found the few prototypes that the centre still allowed.
LOST, GONE = 1.1, 0.1
# Of ln K. The demo reaches 0.93 at most, early; a loss stuck at ln K has 0.9999.
UNIFORM = 0.99
# Prototypes: exp(entropy of their mean probabilities). A healthy batch has one per image, or all K;
# without centering 1.00 is left after 10 steps.
FEW = 2.0
# Of the maximal standard deviation: healthy 0.5 to 0.8, collapsed 0.02, destroyed 0.0001. (Networks
# of 24 layers start at 0.00001, so they get the same time as uniform outputs.)
SPREAD = 0.01
# RankMe over the maximal rank: healthy 0.15 to 0.24. In the features of an untrained network one
# direction holds nearly all of the variance: 0.02.
RANK = 0.05

HEALTHY = "healthy"
TOO_EARLY = "too early to tell"
UNIFORM_COLLAPSE = "uniform collapse"
SINGLE_PROTOTYPE = "single-prototype collapse"
DIMENSIONAL = "dimensional collapse"
DIVERGING = "diverging"
TEACHER_NOT_MOVING = "teacher not moving"


def verdict(rows: list[dict], config: TrainConfig) -> Verdict:
    """Judge a run by the rows of its metrics.jsonl, in order: all of them, or the `recent` ones.

    Keys that rows of an older version lack are not judged.
    """
    done = _progress(rows[-1], config) if rows else 0.0
    if done < EARLY:
        return Verdict(
            TOO_EARLY, f"{100 * done:.1f} % of the run is done, a verdict needs {100 * EARLY:.0f} %"
        )
    figures = Figures([row for row in rows if _progress(row, config) >= EARLY], config)
    if figures.teacher_entropy is None and figures.loss is not None:
        return Verdict(TOO_EARLY, "metrics.jsonl has no health figures yet")
    checks = (_bad_steps, _still_teacher, _rising_loss, _uniform, _single_prototype, _dimensional)
    found = (check(figures, config) for check in checks)
    return next(filter(None, found), Verdict(HEALTHY, figures.sentence()))


def recent(rows: list[dict]) -> list[dict]:
    """The few rows that give the same verdict as all `rows`, however long the run.

    `recent([*recent(rows), row])` is `recent([*rows, row])`.
    """
    late = [row for row in rows if row.get("progress", 1.0) >= EARLY]
    kept = rows[-RECENT:]
    for chosen in (_lowest_loss(late), _last_with(late, "health/rankme_share")):
        if chosen is not None and chosen["step"] not in {row["step"] for row in kept}:
            kept = [chosen, *kept]
    return sorted(kept, key=lambda row: row["step"])


class Figures:
    """The quantities that a verdict rests on; None if no row has one."""

    def __init__(self, rows: list[dict], config: TrainConfig) -> None:
        """`rows`: at least one, all beyond EARLY."""
        self.rows, self.last = rows[-RECENT:], rows[-1]
        ln_k = math.log(config.head.out_dim)
        self.steps = round((self.last["step"] + 1) / _progress(self.last, config))
        warmup = min(config.optim.warmup_epochs / config.optim.epochs, LONGEST_WARMUP)
        self.warm = _progress(self.last, config) >= warmup
        self.loss = self._median("train/loss", ln_k)
        self.teacher_entropy = self._median("health/teacher_entropy", ln_k)
        self.prototypes = self._median("health/prototypes")
        self.spread = self._median("health/feature_std")
        lowest = _lowest_loss(rows)
        self.lowest = lowest["train/loss"] / ln_k if lowest and ln_k else None
        probed = _last_with(rows, "health/rankme_share") or {}
        self.rank = _number(probed, "health/rankme")
        self.rank_share = _number(probed, "health/rankme_share")
        self.knn = _number(probed, "probe/top1_cls")

    def sentence(self, *first: str) -> str:
        """The known figures, after `first`."""
        figures = [
            ("loss {:.3f} ln K", self.loss),
            ("teacher entropy {:.3f} ln K", self.teacher_entropy),
            ("{:,.4g} prototypes per batch", self.prototypes),
            ("feature spread {:.3f}", self.spread),
            ("RankMe {:.1f}", self.rank),
            ("k-NN {:.1f} %", self.knn),
        ]
        known = (text.format(value) for text, value in figures if value is not None)
        return ", ".join([*first, *known])

    def _median(self, key: str, unit: float = 1.0) -> float | None:
        """Over the recent rows, in this unit; a unit of 0 (K = 1) says nothing."""
        numbers = [number for row in self.rows if (number := _number(row, key)) is not None]
        return statistics.median(numbers) / unit if numbers and unit else None


def _bad_steps(figures: Figures, config: TrainConfig) -> Verdict | None:
    first, last = figures.rows[0], figures.rows[-1]
    bad = last.get("train/bad_steps", 0) - first.get("train/bad_steps", 0)
    passed = max(1, last["step"] - first["step"])
    none_good = _number(last, "train/loss") is None  # since the row before
    if not none_good and bad < BAD_STEPS * passed:
        return None
    steps = last.get("train/bad_steps", "some")
    return Verdict(
        DIVERGING, f"loss or gradients are not finite in {steps} steps", *_too_fast(config)
    )


def _still_teacher(figures: Figures, config: TrainConfig) -> Verdict | None:
    momentum, steps = config.loss.momentum_teacher, figures.steps
    kept = math.exp(-(1 - momentum) * steps / 2)
    if kept <= KEPT:
        return None
    better = min(0.996, max(0.5, 1 - 6 / steps))  # keeps 5 %
    return Verdict(
        TEACHER_NOT_MOVING,
        f"at momentum {momentum:g}, {100 * kept:.0f} % of the teacher's initial weights remain "
        f"after all {steps:,} steps",
        "a teacher momentum too near 1 for so few steps",
        f"--loss.momentum_teacher {better:.3g}",
    )


def _rising_loss(figures: Figures, config: TrainConfig) -> Verdict | None:
    if figures.loss is None or figures.lowest is None or figures.loss - figures.lowest < RISE:
        return None
    if figures.loss < LOST and (figures.spread is None or figures.spread >= GONE):
        return None
    risen = f"the loss has risen from its minimum of {figures.lowest:.3f} ln K"
    return Verdict(DIVERGING, figures.sentence(risen), *_too_fast(config))


def _uniform(figures: Figures, config: TrainConfig) -> Verdict | None:
    if figures.teacher_entropy is None or figures.teacher_entropy < UNIFORM:
        return None
    if not figures.warm:
        normal = "outputs are still uniform, as is normal during the warmup"
        return Verdict(TOO_EARLY, figures.sentence(normal))
    loss = config.loss
    warmup = "warmup_" if loss.warmup_teacher_temp > loss.teacher_temp else ""
    temperature = max(loss.warmup_teacher_temp, loss.teacher_temp)
    advice = f"--loss.{warmup}teacher_temp 0.04"
    if temperature >= loss.student_temp:
        cause = (
            f"no sharpening: the teacher temperature ({temperature:g}) is not below the student's "
            f"({loss.student_temp:g})"
        )
    elif temperature > 0.04:
        cause = f"too little sharpening at a teacher temperature of {temperature:g}"
    elif not config.head.norm_last_layer:
        cause = "prototypes whose norm is free, which is unstable"
        advice = "--head.norm_last_layer true"
    else:
        cause = "a learning rate too high for the start, or more prototypes than the images need"
        fewer = max(2, config.head.out_dim // 4)
        advice = f"--optim.lr {config.optim.lr / 2:.2g}, then --head.out_dim {fewer}"
    return Verdict(UNIFORM_COLLAPSE, figures.sentence(), cause, advice)


def _single_prototype(figures: Figures, config: TrainConfig) -> Verdict | None:
    if figures.prototypes is None or figures.prototypes >= FEW:
        return None
    loss = config.loss
    if loss.center_momentum > 0.99:
        cause = f"no centering: at center_momentum {loss.center_momentum:g} the centre lags behind"
        advice = "--loss.center_momentum 0.9"
    elif loss.teacher_temp < 0.04:
        cause = f"too much sharpening at a teacher temperature of {loss.teacher_temp:g}"
        advice = "--loss.teacher_temp 0.04"
    else:
        cause, advice = _too_fast(config)
    return Verdict(SINGLE_PROTOTYPE, figures.sentence(), cause, advice)


def _dimensional(figures: Figures, config: TrainConfig) -> Verdict | None:
    if figures.warm and figures.spread is not None and figures.spread < SPREAD:
        return Verdict(DIMENSIONAL, figures.sentence(), *_too_fast(config))
    if figures.rank_share is None or figures.rank_share >= RANK:
        return None
    return Verdict(
        DIMENSIONAL,
        figures.sentence(f"features use {100 * figures.rank_share:.1f} % of their dimensions"),
        "views so similar, or so few prototypes, that a few directions solve the task",
        "stronger views (--crops.brightness 0.8 --crops.contrast 0.8), then --head.out_dim "
        f"{2 * config.head.out_dim}",
    )


def _too_fast(config: TrainConfig) -> tuple[str, str]:
    """Cause and advice if the learning rate is to blame."""
    lr, warmup = config.optim.lr, config.optim.warmup_epochs
    advice = f"--optim.lr {lr / 4:.2g}"
    if warmup < 0.1 * config.optim.epochs:
        advice += f", then --optim.warmup_epochs {max(1, config.optim.epochs // 10)}"
    return f"too high a learning rate: lr {lr:g} (for 256 images), warmup_epochs {warmup}", advice


def _lowest_loss(rows: list[dict]) -> dict | None:
    """The row with the lowest loss at the teacher temperature of the newest row."""
    temperature = rows[-1].get("schedule/teacher_temp") if rows else None
    rows = [row for row in rows if row.get("schedule/teacher_temp") == temperature]
    rows = [row for row in rows if _number(row, "train/loss") is not None]
    return min(rows, key=lambda row: row["train/loss"], default=None)


def _last_with(rows: list[dict], key: str) -> dict | None:
    return next((row for row in reversed(rows) if key in row), None)


def _number(row: dict, key: str) -> float | None:
    """The row's value; None if it has none, or one that is not finite."""
    value = row.get(key)
    return value if value is not None and math.isfinite(value) else None


def _progress(row: dict, config: TrainConfig) -> float:
    """Share of the run done after `row`; for rows of older versions a lower bound, by the epoch."""
    return row.get("progress", row["epoch"] / config.optim.epochs)
