"""The HTML of a report, a function for each section. All text is escaped."""

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from ssl_xcit.report.charts import Chart, chart_html
from ssl_xcit.report.pictures import Seen, Shot, data_uri
from ssl_xcit.report.style import SCRIPT, STYLE
from ssl_xcit.training.verdict import Verdict

# The page loads nothing from anywhere, whatever the run's texts contain
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
MOODS = {"healthy": "good", "too early to tell": "wait"}  # else bad
PIXELS = 100  # images up to this side are shown with square pixels
FEW = 6  # pictures: longer rows get the full width of the page


class Result(NamedTuple):
    """A row in the table of evaluations."""

    evaluation: str
    network: str
    features: str
    top1: float
    top5: float | None
    images: int | None
    file: str
    ours: bool  # of this run's weights


def document(name: str, facts: Sequence[str], sections: Sequence[str]) -> str:
    """The page of the run called `name`."""
    name = escape(name)
    told = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{name}: ssl_xcit report</title>'
        f"<style>{STYLE}</style></head>\n<body>\n"
        f"<header><h1>{name}</h1><p class=facts>{told}</p></header>\n"
        + "\n".join(filter(None, sections))
        + "\n<footer>Written by <code>ssl-xcit report</code>; run it again to update the page."
        f"</footer>\n<script>{SCRIPT}</script></body></html>\n"
    )


def verdict_section(verdict: Verdict) -> str:
    """The verdict in large type, with cause and advice."""
    mood = MOODS.get(verdict.name, "bad")
    name, sentence = (escape(text[:1].upper() + text[1:]) for text in verdict[:2])
    why = [("Likely cause", verdict.cause), ("What to change", verdict.advice)]
    rows = "".join(f"<dt>{term}</dt><dd>{escape(text)}</dd>" for term, text in why if text)
    return (
        f'<section class="verdict {mood}" aria-label="Verdict"><p class="name">{name}</p>'
        f'<p class="sentence">{sentence}.</p>' + (f"<dl>{rows}</dl>" if rows else "") + "</section>"
    )


def numbers_section(numbers: Mapping[str, str]) -> str:
    """Label -> value, for the head of the page."""
    return f'<dl class="numbers">{_terms(numbers)}</dl>' if numbers else ""


def curves_section(groups: Mapping[str, Sequence[Chart]]) -> str:
    """Heading -> charts."""
    if not groups:
        return section("Curves", lead="Nothing has been logged yet.")
    body = (
        f'<h3>{escape(heading)}</h3><div class="charts">{"".join(map(chart_html, charts))}</div>'
        for heading, charts in groups.items()
    )
    return section("Curves", "".join(body))


def seen_sections(seen: Seen) -> str:
    """What the network sees in sample images, and their nearest neighbours."""
    return section(
        "What the network sees",
        _gallery("row", seen.sights),
        "Beside each sample: the first three principal components of its patch tokens as red, "
        "green and blue (patches of one colour look alike to the network), then the attention of "
        "each head of the last class-attention layer, from dark to light over its own range. The "
        f"network is {seen.network}.",
    ) + section(
        "Nearest neighbours",
        _gallery("row square", seen.queries),
        f"Beside each sample: the nearest of {seen.searched:,} images of {seen.where} by the "
        "cosine of their cls tokens. Neighbours of another class have a red frame and a cross.",
    )


def views_section(views: Sequence[Sequence[Shot]]) -> str:
    """Stored images and their views."""
    return section(
        "What it learns from",
        _gallery("strip", views),
        "The first images of the first epoch as stored, and the very views that training made of "
        "them. The student gets all views, the teacher the global ones.",
    )


def results_section(results: Sequence[Result]) -> str:
    """The table of evaluations."""
    if not results:
        none = "None in the run folder; --results FILE or FOLDER adds others."
        return section("Evaluations", lead=none)
    head = (
        '<tr><th>Evaluation</th><th>Network</th><th class="figure">Top-1 %</th>'
        '<th class="figure">Top-5 %</th><th class="figure where">Test images</th></tr>'
    )
    rows = []
    for a in results:
        top5 = "" if a.top5 is None else f"{a.top5:.2f}"
        images = "" if a.images is None else f"{a.images:,}"
        rows.append(
            f'<tr title="{escape(a.file)}"><td>{escape(a.evaluation)} '
            f'<span class="soft">{escape(a.features)}</span></td>'
            f'<td>{escape(a.network)}</td><td class="figure best">{a.top1:.2f}</td>'
            f'<td class="figure">{top5}</td><td class="figure where">{images}</td></tr>'
        )
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return section("Evaluations", table)


def settings_section(settings: Mapping[str, str], changed: frozenset[str]) -> str:
    """Dotted name -> value; those `changed` are in bold."""
    groups: dict[str, str] = {}
    for name, value in settings.items():
        group, _, leaf = name.rpartition(".")
        mark = ' class="own"' if name in changed else ""
        row = f"<dt>{_breakable(leaf)}</dt><dd{mark}>{_breakable(value)}</dd>"
        groups[group or "run"] = groups.get(group or "run", "") + row
    body = "".join(
        f"<div><h3>{escape(group)}</h3><dl>{rows}</dl></div>" for group, rows in groups.items()
    )
    lead = "Every setting; those that are not defaults are in bold."
    return section("Configuration", f'<div class="settings">{body}</div>', lead)


def environment_section(facts: Mapping[str, object]) -> str:
    """What environment.json says of the command, the machine and the versions."""
    told = {name: str(value) for name, value in facts.items() if value not in (None, 0, "")}
    told.pop("command", None)
    if "started" in told:
        told["started"] = told["started"].replace("T", " ").replace("+00:00", " UTC")
    words = (escape(shlex.quote(str(word))) for word in facts.get("command", ()))
    command = " ".join(f"<span>{word}</span>" if word.startswith("-") else word for word in words)
    body = f"<pre>{command}</pre>" if command else ""
    return section("Where it ran", f'{body}<dl class="places">{_terms(told)}</dl>')


def section(title: str, body: str = "", lead: str = "") -> str:
    """A heading, a sentence below it, and the rest as HTML."""
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>"


def _terms(values: Mapping[str, str]) -> str:
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_breakable(value)}</dd></div>"
        for name, value in values.items()
    )


def _gallery(kind: str, rows: Sequence[Sequence[Shot]]) -> str:
    """Rows of pictures, side by side if they are short; rows of more than ten break in two."""
    longest = max(map(len, rows), default=0)
    across = longest if longest <= 10 else -(-longest // 2)
    body = "".join(f'<div class="{kind}">{"".join(map(_figure, row))}</div>' for row in rows)
    wide = " wide" if longest > FEW else ""
    return f'<div class="gallery{wide}" style="--across:{across}">{body}</div>'


def _figure(shot: Shot) -> str:
    """A picture with its caption; small ones are enlarged to square pixels."""
    picture, caption = shot.image, escape(shot.caption)
    small = not shot.photo or max(picture.size) <= PIXELS
    if shot.same is False:
        caption += "&nbsp;&times;"
    return (
        f'<figure class="{"other" if shot.same is False else ""}" style="--width:{shot.width:.3g}">'
        f'<img{" class=pixels" if small else ""} src="{data_uri(picture, shot.photo)}" '
        f'width="{picture.width}" height="{picture.height}" alt="{escape(shot.alt)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _breakable(text: str) -> str:
    """Escaped; lines may break after a slash."""
    return escape(text).replace("/", "/<wbr>")
