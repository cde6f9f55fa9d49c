"""Is a pretraining working? A verdict in words: `ssl-xcit verdict RUN`.

It follows from rows of metrics.jsonl and the configuration alone. The first of these that holds is
the verdict; where a figure is of several rows, it is the median of the newest RECENT ones.

    too early to tell           less than EARLY of the run is done
    diverging                   steps are bad: a loss or gradient is not finite (BAD_STEPS)
    teacher not moving          it will end with more than KEPT of its initial weights
    diverging                   the loss is RISE ln K above the lowest it has been, and either above
                                LOST ln K, or the features hardly differ any more (GONE)
    uniform collapse            the teacher's entropy is UNIFORM ln K: it favours no prototype
    single-prototype collapse   all images share FEW prototypes
    dimensional collapse        the features hardly differ (SPREAD), or in few directions (RANK)
    healthy                     none of these

K is `out_dim`. The thresholds, and why they are where they are, stand below. The figures named
there are of trainings of an xcit_nano_12 on Fashion-MNIST: the demo's, and ones made to fail.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.runtime.config import read_config
from ssl_xcit.runtime.errors import UserError, exit_on_user_error
from ssl_xcit.training.verdict import Verdict

# Share of the run. Before, every run looks alike: its outputs are nearly uniform (a loss of 1.01
# ln K in the demo, which is healthy) while the centre settles and the learning rate warms up.
EARLY = 0.05
# Uniform outputs are normal until the learning rate has warmed up, but not beyond this share.
LONGEST_WARMUP = 0.2
# Rows. A single one may be one batch; five are over soon enough to show a change.
RECENT = 5
# Share of the steps. The run itself gives up only after `max_bad_steps` of them in a row.
BAD_STEPS = 0.1
# Share of the teacher's weights. Its momentum m rises to 1 over the N steps of a run on a half
# cosine, so about exp(-(1 - m) N / 2) of where it started is left in the end. Above a half, it is
# more of a random network than an average of students. (The demo ends with 4 %; a momentum near 1
# at the end is the schedule's own and no matter.)
KEPT = 0.5
# Of ln K. A healthy loss falls, or wavers by a tenth; when steps are too long it swings: from 0.01
# to 0.7 and back in 20 steps. The lowest is sought at the present temperature of the teacher,
# because a warmer teacher has a higher entropy, and so a higher loss, with nothing being wrong.
RISE = 0.25
# Of ln K, and of the features' largest standard deviation: what the run knew is lost. ln K is the
# loss of a student that knows nothing. A rise alone may come from the centre, which in a run of
# tens of steps settles after the student has found the few prototypes that it still allowed.
LOST, GONE = 1.1, 0.1
# Of ln K. At worst, early, the demo has 0.93; 0.9999 is what a loss stuck at ln K means.
UNIFORM = 0.99
# Prototypes, exp(entropy of their mean shares): a healthy batch has one per image or all K.
# Without a centre 1.00 is left after 10 steps.
FEW = 2.0
# Of the features' largest standard deviation: healthy 0.5 to 0.8, collapsed 0.02, destroyed 0.0001.
# (Networks of 24 layers begin at 0.00001, which is why they get the same time as uniform outputs.)
SPREAD = 0.01
# RankMe over the largest possible rank: healthy 0.15 to 0.24. Of an untrained network's features
# one direction holds nearly all, 0.02.
RANK = 0.05

HEALTHY = "healthy"
TOO_EARLY = "too early to tell"
UNIFORM_COLLAPSE = "uniform collapse"
SINGLE_PROTOTYPE = "single-prototype collapse"
DIMENSIONAL = "dimensional collapse"
DIVERGING = "diverging"
TEACHER_NOT_MOVING = "teacher not moving"


def verdict(rows: list[dict], config: TrainConfig) -> Verdict:
    """What the rows of a run's metrics.jsonl, in order, say about it.

    They may be all rows or the `recent` ones. What a row of an older version lacks is not judged.
    """
    done = _progress(rows[-1], config) if rows else 0.0
    if done < EARLY:
        return Verdict(
            TOO_EARLY,
            f"{100 * done:.1f} % of the run is done, and before {100 * EARLY:.0f} % every run "
            "looks alike",
        )
    figures = Figures([row for row in rows if _progress(row, config) >= EARLY], config)
    if figures.teacher_entropy is None and figures.loss is not None:
        return Verdict(TOO_EARLY, "metrics.jsonl holds no health figures yet")
    checks = (
        _bad_steps,
        _still_teacher,
        _rising_loss,
        _uniform,
        _single_prototype,
        _dimensional,
    )
    found = (check(figures, config) for check in checks)
    return next(filter(None, found), Verdict(HEALTHY, figures.sentence()))


def recent(rows: list[dict]) -> list[dict]:
    """The rows that a verdict of all `rows` rests on: few, however long the run.

    `recent([*recent(rows), row])` is `recent([*rows, row])`.
    """
    late = [row for row in rows if row.get("progress", 1.0) >= EARLY]
    kept = rows[-RECENT:]
    for chosen in (_lowest_loss(late), _last_with(late, "health/rankme_share")):
        if chosen is not None and chosen["step"] not in {row["step"] for row in kept}:
            kept = [chosen, *kept]
    return sorted(kept, key=lambda row: row["step"])


class Figures:
    """What the verdict is about; None where no row tells."""

    def __init__(self, rows: list[dict], config: TrainConfig) -> None:
        """`rows`: those beyond the early part; at least one."""
        self.rows, self.last = rows[-RECENT:], rows[-1]
        self.ln_k = math.log(config.head.out_dim)
        self.steps = round((self.last["step"] + 1) / _progress(self.last, config))
        warmup = min(config.optim.warmup_epochs / config.optim.epochs, LONGEST_WARMUP)
        self.warm = _progress(self.last, config) >= warmup
        self.loss = self._over_ln_k("train/loss")
        self.teacher_entropy = self._over_ln_k("health/teacher_entropy")
        self.kl = self._over_ln_k("health/kl")
        self.prototypes = self._median("health/prototypes")
        self.spread = self._median("health/feature_std")
        lowest = _lowest_loss(rows)
        self.lowest = None if lowest is None else _number(lowest, "train/loss") / self.ln_k
        probed = _last_with(rows, "health/rankme_share") or {}
        self.rank = _number(probed, "health/rankme")
        self.rank_share = _number(probed, "health/rankme_share")
        self.knn = _number(probed, "probe/top1_cls")

    def sentence(self, *more: str) -> str:
        """The figures in a line, `more` first."""
        parts = list(more)
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f} of ln K")
        if self.teacher_entropy is not None:
            parts.append(f"teacher's entropy {self.teacher_entropy:.3f} of ln K")
        if self.prototypes is not None:
            parts.append(f"{self.prototypes:,.4g} prototypes share a batch")
        if self.spread is not None:
            parts.append(f"feature spread {self.spread:.3f} of the largest")
        if self.rank is not None:
            parts.append(f"RankMe {self.rank:.1f}")
        if self.knn is not None:
            parts.append(f"k-NN {self.knn:.1f} %")
        return ", ".join(parts)

    def _median(self, key: str) -> float | None:
        numbers = [_number(row, key) for row in self.rows]
        numbers = [number for number in numbers if number is not None]
        return statistics.median(numbers) if numbers else None

    def _over_ln_k(self, key: str) -> float | None:
        nats = self._median(key)
        return None if nats is None or self.ln_k == 0 else nats / self.ln_k


def _bad_steps(figures: Figures, config: TrainConfig) -> Verdict | None:
    first, last = figures.rows[0], figures.rows[-1]
    bad = last.get("train/bad_steps", 0) - first.get("train/bad_steps", 0)
    passed = max(1, last["step"] - first["step"])
    lost = _number(last, "train/loss") is None  # not one step since the row before was good
    if not lost and bad < BAD_STEPS * passed:
        return None
    return Verdict(
        DIVERGING,
        f"loss or gradients were not finite in {last.get('train/bad_steps', 'some')} steps",
        *_too_fast(config),
    )


def _still_teacher(figures: Figures, config: TrainConfig) -> Verdict | None:
    momentum, steps = config.loss.momentum_teacher, figures.steps
    kept = math.exp(-(1 - momentum) * steps / 2)
    if kept <= KEPT:
        return None
    better = min(0.996, max(0.5, 1 - 6 / steps))  # 5 % kept
    return Verdict(
        TEACHER_NOT_MOVING,
        f"with momentum {momentum:g} from the start, {100 * kept:.0f} % of the teacher's initial "
        f"weights are left after the run's {steps:,} steps",
        "the teacher's momentum is too near 1 for so few steps",
        f"--loss.momentum_teacher {better:.3g}",
    )


def _rising_loss(figures: Figures, config: TrainConfig) -> Verdict | None:
    if figures.loss is None or figures.lowest is None or figures.loss - figures.lowest < RISE:
        return None
    if figures.loss < LOST and (figures.spread is None or figures.spread >= GONE):
        return None
    return Verdict(
        DIVERGING,
        figures.sentence(f"the loss was down to {figures.lowest:.3f} of ln K and has risen again"),
        *_too_fast(config),
    )


def _uniform(figures: Figures, config: TrainConfig) -> Verdict | None:
    if figures.teacher_entropy is None or figures.teacher_entropy < UNIFORM:
        return None
    if not figures.warm:
        return Verdict(
            TOO_EARLY,
            figures.sentence(
                "outputs are uniform, as at the start, and the learning rate warms up"
            ),
        )
    loss = config.loss
    warm = loss.warmup_teacher_temp > loss.teacher_temp
    temperature = max(loss.warmup_teacher_temp, loss.teacher_temp)
    advice = f"--loss.{'warmup_' if warm else ''}teacher_temp 0.04"
    if temperature >= loss.student_temp:
        cause = (
            f"no sharpening: the teacher's temperature ({temperature:g}) is not below the "
            f"student's ({loss.student_temp:g})"
        )
    elif temperature > 0.04:
        cause = f"too little sharpening by a teacher's temperature of {temperature:g}"
    elif not config.head.norm_last_layer:
        cause, advice = "prototypes with free norms are unstable", "--head.norm_last_layer true"
    else:
        cause = "steps too long for a young network, or more prototypes than the images need"
        advice = f"--optim.lr {config.optim.lr / 2:.2g}, then --head.out_dim {_fewer(config)}"
    return Verdict(UNIFORM_COLLAPSE, figures.sentence(), cause, advice)


def _single_prototype(figures: Figures, config: TrainConfig) -> Verdict | None:
    if figures.prototypes is None or figures.prototypes >= FEW:
        return None
    loss = config.loss
    if loss.center_momentum > 0.99:
        cause = (
            f"no centring: with center_momentum {loss.center_momentum:g} the centre stays behind"
        )
        advice = "--loss.center_momentum 0.9"
    elif loss.teacher_temp < 0.04:
        cause = f"too much sharpening by a teacher's temperature of {loss.teacher_temp:g}"
        advice = "--loss.teacher_temp 0.04"
    else:
        cause, advice = _too_fast(config)
    return Verdict(SINGLE_PROTOTYPE, figures.sentence(), cause, advice)


def _dimensional(figures: Figures, config: TrainConfig) -> Verdict | None:
    if figures.warm and figures.spread is not None and figures.spread < SPREAD:
        return Verdict(DIMENSIONAL, figures.sentence(), *_too_fast(config))
    if figures.rank_share is None or figures.rank_share >= RANK:
        return None
    share = f"the features have {100 * figures.rank_share:.1f} % of the directions that they could"
    return Verdict(
        DIMENSIONAL,
        figures.sentence(share),
        "views of an image so alike, or so few prototypes, that a few directions solve the task",
        "stronger views (--crops.brightness 0.8 --crops.contrast 0.8), then --head.out_dim "
        f"{2 * config.head.out_dim}",
    )


def _too_fast(config: TrainConfig) -> tuple[str, str]:
    """Cause and advice."""
    lr, warmup = config.optim.lr, config.optim.warmup_epochs
    advice = f"--optim.lr {lr / 4:.2g}"
    if warmup < 0.1 * config.optim.epochs:
        advice += f", then --optim.warmup_epochs {max(1, config.optim.epochs // 10)}"
    return f"steps too long, with lr {lr:g} (for 256 images) and warmup_epochs {warmup}", advice


def _fewer(config: TrainConfig) -> int:
    """Prototypes."""
    return max(2, config.head.out_dim // 4)


def _lowest_loss(rows: list[dict]) -> dict | None:
    """The row with the lowest loss at the newest row's temperature of the teacher."""
    temperature = rows[-1].get("schedule/teacher_temp") if rows else None
    rows = [row for row in rows if row.get("schedule/teacher_temp") == temperature]
    rows = [row for row in rows if _number(row, "train/loss") is not None]
    return min(rows, key=lambda row: row["train/loss"], default=None)


def _last_with(rows: list[dict], key: str) -> dict | None:
    return next((row for row in reversed(rows) if key in row), None)


def _number(row: dict, key: str) -> float | None:
    """The row's number; None if it has none, or one that is not finite."""
    value = row.get(key)
    return value if value is not None and math.isfinite(value) else None


def _progress(row: dict, config: TrainConfig) -> float:
    """Share of the run that is done after `row`; of older rows a lower bound, by the epoch."""
    return row.get("progress", row["epoch"] / config.optim.epochs)


def read_verdict(run: Path) -> Verdict:
    """The verdict on a run folder.

    Raises UserError for a folder that is none, or that of another training.
    """
    facts, described = run / "run.json", run / "config.yaml"
    if not (facts.is_file() and described.is_file()):
        raise UserError(f"{run} is no run folder: expected run.json and config.yaml in it")
    kind = json.loads(facts.read_text()).get("kind", "pretraining")
    if kind != "pretraining":
        raise UserError(f"expected the run folder of a pretraining, {run} is that of a {kind}")
    return verdict(read_rows(run / "metrics.jsonl"), read_config(TrainConfig, described))


def read_rows(path: Path) -> list[dict]:
    """As `metrics.read_metrics`, but without torch, whose import would take most of the time.

    No rows if there is no file.
    """
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="ssl-xcit verdict",
        description="Say in words whether a pretraining works.",
    )
    parser.add_argument("run", type=Path, help="run folder")
    with exit_on_user_error():
        print(read_verdict(parser.parse_args(argv).run).text)


if __name__ == "__main__":
    main()
