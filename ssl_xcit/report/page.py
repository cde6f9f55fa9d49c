"""The one page of a report, from what `gather` has found; everything is escaped."""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ssl_xcit.report.charts import Chart, chart_html
from ssl_xcit.report.pictures import Seen, Shot, Views, data_uri
from ssl_xcit.report.style import SCRIPT, STYLE
from ssl_xcit.training.verdict import Verdict

# Nothing may be loaded from anywhere, whatever the run's texts contain
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
MOODS = {"healthy": "good", "too early to tell": "wait"}  # else bad
PIXELS = 100  # images up to this side are shown with square pixels


class Number(NamedTuple):
    """A figure at the head of the page."""

    value: str
    label: str


class Result(NamedTuple):
    """An evaluation's line in the table."""

    evaluation: str
    network: str
    features: str
    top1: float
    top5: float | None
    images: int | None
    file: str
    ours: bool  # of this very run's weights


class Report(NamedTuple):
    """All that the page shows. In place of pictures a text says why there are none."""

    name: str
    facts: list[str]
    verdict: Verdict | None
    numbers: list[Number]
    charts: Mapping[str, list[Chart]]
    seen: Seen | str
    views: list[Views] | str | None  # None: this training has no such views
    results: list[Result]
    settings: Mapping[str, str]  # by dotted name
    own: frozenset[str]  # names of settings that are not the defaults
    environment: Mapping[str, str]
    command: str


def page(report: Report) -> str:
    """The HTML document."""
    name = html.escape(report.name)
    facts = "".join(f"<span>{html.escape(fact)}</span>" for fact in report.facts)
    parts = [
        f"<header><h1>{name}</h1><p class=facts>{facts}</p></header>",
        _verdict(report.verdict),
        _numbers(report.numbers),
        _curves(report.charts),
        _seen(report.seen),
        _views(report.views),
        _results(report.results),
        _settings(report.settings, report.own),
        _environment(report.environment, report.command),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{name}: ssl_xcit report</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(filter(None, parts)) + "\n"
        "<footer>Made by <code>ssl-xcit report</code>; the same command makes it anew."
        f"</footer>\n<script>{SCRIPT}</script></body></html>\n"
    )


def _verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    mood = MOODS.get(verdict.name, "bad")
    name, sentence = (html.escape(text[:1].upper() + text[1:]) for text in verdict[:2])
    why = [("Likely cause", verdict.cause), ("What to change", verdict.advice)]
    rows = "".join(f"<dt>{term}</dt><dd>{html.escape(text)}</dd>" for term, text in why if text)
    return (
        f'<section class="verdict {mood}" aria-label="Verdict"><p class="name">{name}</p>'
        f'<p class="sentence">{sentence}.</p>' + (f"<dl>{rows}</dl>" if rows else "") + "</section>"
    )


def _numbers(numbers: Sequence[Number]) -> str:
    cells = (
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>"
        for value, label in numbers
    )
    return f'<dl class="numbers">{"".join(cells)}</dl>' if numbers else ""


def _section(title: str, body: str, lead: str = "") -> str:
    lead = f'<p class="lead">{html.escape(lead)}</p>' if lead else ""
    return f"<section><h2>{html.escape(title)}</h2>{lead}{body}</section>"


def _curves(groups: Mapping[str, list[Chart]]) -> str:
    if not groups:
        return _section("Curves", "", "Nothing has been logged yet.")
    body = (
        f'<h3>{html.escape(heading)}</h3><div class="charts">'
        f"{''.join(map(chart_html, charts))}</div>"
        for heading, charts in groups.items()
    )
    return _section("Curves", "".join(body))


def _seen(seen: Seen | str) -> str:
    if isinstance(seen, str):
        return _section("What the network sees", "", f"No pictures: {seen}")
    shots = max(len(sight.shots) for sight in seen.sights)
    notes = {sight.note for sight in seen.sights}
    looks = "".join(
        f"<div>{_row(sight.shots)}"
        + (f'<p class="note">{html.escape(sight.note)}</p>' if len(notes) > 1 else "")
        + "</div>"
        for sight in seen.sights
    )
    attention = _section(
        "What the network sees",
        f'<div class="looks{" many" if shots > 6 else ""}">{looks}</div>',
        "Beside each sample its patch tokens, the first three principal components as red, green "
        "and blue: equal colours are alike to it. Then where each head of the last class "
        "attention looks, from dark to light over its own range. The network is "
        f"{seen.network}" + (f"; it saw {notes.pop()}." if len(notes) == 1 else "."),
    )
    queries = "".join(_row(query.shots, query.same) for query in seen.queries)
    neighbours = _section(
        "Nearest neighbours",
        f'<div class="queries">{queries}</div>',
        f"The first of each row is the sample, then the nearest of {seen.searched:,} images of "
        f"{seen.where} by the cosine of their cls tokens. Another class than the sample's has a "
        "red frame and is marked with a cross.",
    )
    return attention + neighbours


def _row(shots: Sequence[Shot], same: Sequence[bool | None] = ()) -> str:
    """Pictures side by side; those that are not the `same` as the first are marked."""
    cells = []
    for k, shot in enumerate(shots):
        other = bool(same) and same[k] is False
        caption = f"{shot.caption}\N{NO-BREAK SPACE}\N{MULTIPLICATION X}" if other else shot.caption
        kind = "first" if k == 0 else "other" if other else ""
        cells.append(_shot(shot._replace(caption=caption), kind))
    count = len(shots)
    across = count if count <= 10 else -(-count // 2)
    narrow = 3 if count <= 6 else 4
    return f'<div class="row" style="--wide:{across};--narrow:{narrow}">{"".join(cells)}</div>'


def _shot(shot: Shot, kind: str = "", width: str = "") -> str:
    """A figure; small pictures are enlarged with their pixels as squares."""
    picture = shot.image
    small = not shot.photo or max(picture.size) <= PIXELS
    style = f' style="width:{width}"' if width else ""
    return (
        f'<figure class="{kind}"{style}><img{" class=pixels" if small else ""} '
        f'src="{data_uri(picture, shot.photo)}" width="{picture.width}" height="{picture.height}" '
        f'alt="{html.escape(shot.alt)}"><figcaption>{html.escape(shot.caption)}</figcaption>'
        "</figure>"
    )


def _views(views: list[Views] | str | None) -> str:
    if views is None:
        return ""
    if isinstance(views, str):
        return _section("What it learns from", "", f"No pictures: {views}")
    strips = []
    for view in views:
        widths = (f"{6.5 * width:.2f}rem" for width in view.widths)
        shots = zip(view.shots, widths, strict=True)
        strips.append(f'<div class="strip">{"".join(_shot(s, "", w) for s, w in shots)}</div>')
    many = len(views[0].shots) > 7 if views else False
    return _section(
        "What it learns from",
        f'<div class="views{" many" if many else ""}">{"".join(strips)}</div>',
        "The first images of the first epoch as they are stored, and the very views that training "
        "made of them. The student sees all views, the teacher the global ones.",
    )


def _results(results: Sequence[Result]) -> str:
    if not results:
        return _section(
            "Evaluations",
            "",
            "None found in the run folder; --results FILE or FOLDER shows others.",
        )
    head = (
        '<tr><th>Evaluation</th><th>Network</th><th class="figure">Top-1 %</th>'
        '<th class="figure">Top-5 %</th><th class="figure where">Test images</th></tr>'
    )
    rows = []
    for a in results:
        top5 = "" if a.top5 is None else f"{a.top5:.2f}"
        images = "" if a.images is None else f"{a.images:,}"
        rows.append(
            f'<tr title="{html.escape(a.file)}"><td>{html.escape(a.evaluation)} '
            f'<span class="soft">{html.escape(a.features)}</span></td>'
            f'<td>{html.escape(a.network)}</td><td class="figure best">{a.top1:.2f}</td>'
            f'<td class="figure">{top5}</td><td class="figure where">{images}</td></tr>'
        )
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return _section("Evaluations", table)


def _settings(settings: Mapping[str, str], own: frozenset[str]) -> str:
    sections: dict[str, list[str]] = {}
    for name, value in settings.items():
        section, _, leaf = name.rpartition(".")
        mark = ' class="own"' if name in own else ""
        sections.setdefault(section or "run", []).append(
            f"<dt>{_breakable(leaf)}</dt><dd{mark}>{_breakable(value)}</dd>"
        )
    body = "".join(
        f"<div><h3>{html.escape(name)}</h3><dl>{''.join(rows)}</dl></div>"
        for name, rows in sections.items()
    )
    lead = "Every setting; those in bold are not the program's defaults."
    return _section("Configuration", f'<div class="settings">{body}</div>', lead)


def _environment(environment: Mapping[str, str], command: str) -> str:
    rows = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{_breakable(value)}</dd></div>"
        for name, value in environment.items()
    )
    words = (
        f"<span>{html.escape(word)}</span>" if word.startswith("-") else html.escape(word)
        for word in command.split()
    )
    body = f"<pre>{' '.join(words)}</pre>" if command else ""
    return _section("Where it ran", f'{body}<dl class="places">{rows}</dl>')


def _breakable(text: str) -> str:
    """Escaped; lines may break after a slash."""
    return html.escape(text).replace("/", "/<wbr>")
