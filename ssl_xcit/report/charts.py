"""Line charts as inline SVG, without a library or a network.

Colours and font sizes are in `ssl_xcit.report.style`. A chart is complete without JavaScript; the
page's script adds the value under the pointer.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import NamedTuple

WIDTH, HEIGHT = 360, 180  # of the drawing, in SVG units: about pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 16, 24  # margins around the frame
MOST_POINTS = 240  # of a line: more cannot be told apart at this width

Value = float | int
Points = Sequence[tuple[Value, Value | None]]


class Series(NamedTuple):
    """A line: (step, value) by increasing step; None marks a value that is not finite."""

    label: str  # may be empty if the chart has no other line
    points: Points


class Chart(NamedTuple):
    """Lines over the steps of a run: what they show, and the lines once there are rows."""

    title: str
    note: str = ""
    keys: Mapping[str, str] = MappingProxyType({})  # of metrics.jsonl -> label of the line
    series: Sequence[Series] = ()
    scale: float = 1.0  # from logged values to drawn ones
    percent: bool = False  # values are shares, shown as percent
    reference: tuple[Value, str] | None = None  # a level to compare with, and its label
    limits: tuple[Value, Value] | None = None  # of the y axis; by default those of the values
    dots: bool = False  # mark each value


class Point(NamedTuple):
    """A drawn point: one value, or the mean and range of several; None if none is finite."""

    step: Value
    value: Value | None
    low: Value | None
    high: Value | None


def thinned(points: Points) -> list[Point]:
    """At most MOST_POINTS, each of a group of equal size: its last step, mean and range."""
    size = -(-len(points) // MOST_POINTS)
    kept = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        step, finite = group[-1][0], [value for _, value in group if value is not None]
        mean = math.fsum(finite) / len(finite) if finite else None
        kept.append(Point(step, mean, min(finite, default=None), max(finite, default=None)))
    return kept


def ticks(low: Value, high: Value) -> list[Value]:
    """About four round numbers in [low, high]: multiples of 1, 2 or 5 x 10^n."""
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def number(value: Value, percent: bool = False) -> str:
    """A value in a few characters: 2.944, 12,345, 4e-5, 78.4 %."""
    if percent:
        return f"{100 * value:.3g} %" if abs(value) < 0.9995 else f"{100 * value:.0f} %"
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def chart_html(chart: Chart) -> str:
    """The chart as an HTML figure: title, last value of each line, drawing, note."""
    lines = [(label, thinned(points)) for label, points in chart.series]
    readouts = []
    for i, (label, points) in enumerate(lines):
        finite = _finite(points)
        last = number(finite[-1].value, chart.percent) if finite else "not finite"
        named = f"<i></i>{escape(label)} " if label else ""
        readouts.append(f'<span class="s{i}">{named}<b>{last}</b></span>')
    end = max(points[-1].step for _, points in lines)
    note = chart.note
    if any(len(line.points) > MOST_POINTS for line in chart.series):
        note += " Points are means of several records, the band is their range."
    return (
        '<figure class="chart"><figcaption>'
        f"<h4>{escape(chart.title)}</h4>"
        f'<p class="readout">{"".join(readouts)}<span class="at">step {end:,.0f}</span></p>'
        f"</figcaption>{_svg(chart, lines)}"
        f'<p class="note">{escape(note)}</p></figure>'
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.value is not None]


class _Frame:
    """Maps steps and values to coordinates of the drawing."""

    def __init__(self, chart: Chart, lines: list[tuple[str, list[Point]]]) -> None:
        steps = [point.step for _, points in lines for point in points]
        finite = [point for _, points in lines for point in _finite(points)]
        values = [value for point in finite for value in (point.low, point.high)]
        values += [chart.reference[0]] if chart.reference else []
        values += chart.limits or ([] if values else [0.0, 1.0])
        low, high = min(values), max(values)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant: in the middle
            room = abs(high) / 2 or 0.5
        else:
            room = 0.0 if chart.limits else 0.04 * (high - low)
        self.low, self.high = low - room, high + room
        self.first, self.last = min(steps), max(steps)
        if self.last == self.first:
            self.last += 1

    def x(self, step: Value) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - self.first) / (self.last - self.first)

    def y(self, value: Value) -> float:
        height = HEIGHT - TOP - BOTTOM
        return HEIGHT - BOTTOM - height * (value - self.low) / (self.high - self.low)


def _svg(chart: Chart, lines: list[tuple[str, list[Point]]]) -> str:
    frame = _Frame(chart, lines)
    parts = [_axes(chart, frame)]
    data = []
    for i, (_, points) in enumerate(lines):
        finite = _finite(points)
        if any(point.low < point.high for point in finite):
            edges = [(point.step, point.high) for point in finite]
            edges += [(point.step, point.low) for point in reversed(finite)]
            outline = " ".join(f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in edges)
            parts.append(f'<polygon class="band s{i}" points="{outline}"/>')
        parts.append(f'<path class="line s{i}" d="{_path(points, frame)}"/>')
        places = [(round(frame.x(p.step), 1), round(frame.y(p.value), 1)) for p in finite]
        if chart.dots or len(finite) == 1:
            parts += (f'<circle class="dot s{i}" r="2.6" cx="{x}" cy="{y}"/>' for x, y in places)
        data.append(
            {
                "step": [point.step for point in finite],
                "x": [x for x, _ in places],
                "y": [y for _, y in places],
                "text": [number(point.value, chart.percent) for point in finite],
            }
        )
    if chart.reference:  # over the lines, so that its label stays legible
        right, y = WIDTH - RIGHT, frame.y(chart.reference[0])
        parts += (
            f'<line class="level" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="level" x="{right}" y="{y - 5:.1f}">{escape(chart.reference[1])}</text>',
        )
    described = "; ".join(_in_words(label, points, chart.percent) for label, points in lines)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-lines="'
        f'{escape(json.dumps(data, separators=(",", ":")))}" '
        f'aria-label="{escape(chart.title)}: {escape(described)}">'
        f"{''.join(parts)}</svg>"
    )


def _path(points: Sequence[Point], frame: _Frame) -> str:
    """A line, with a gap wherever a value is not finite."""
    path, pen = "", "M"
    for point in points:
        if point.value is None:
            pen = "M"
        else:
            path += f"{pen}{frame.x(point.step):.1f} {frame.y(point.value):.1f}"
            pen = "L"
    return path


def _axes(chart: Chart, frame: _Frame) -> str:
    """Grid lines with their values, and steps below the frame."""
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    inner = f'x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{floor - TOP}"'
    parts = [f'<rect class="frame" {inner}/>']
    for value in ticks(frame.low, frame.high):
        y = frame.y(value)
        text = number(value, chart.percent) if abs(value) > 1e-12 else "0"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{text}</text>')
    for step in ticks(frame.first, frame.last):
        if step != round(step):
            continue
        text = f"{step / 1000:,g}k" if step >= 10_000 and step % 100 == 0 else f"{step:,.0f}"
        x, below = min(frame.x(step), right), floor + 16
        side = "end" if x > right - 12 else "middle"
        parts.append(f'<text class="x" x="{x:.1f}" y="{below}" text-anchor="{side}">{text}</text>')
    parts.append(f'<line class="floor" x1="{LEFT}" x2="{right}" y1="{floor}" y2="{floor}"/>')
    return "".join(parts)


def _in_words(label: str, points: Sequence[Point], percent: bool) -> str:
    """A text alternative, for screen readers."""
    values = [point.value for point in _finite(points)]
    if not values:
        return f"{label} is never finite".strip()
    told = values[0], values[-1], min(values), max(values)
    first, last, low, high = (number(value, percent) for value in told)
    return f"{label} from {first} to {last}, between {low} and {high}".strip()
