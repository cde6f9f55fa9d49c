"""A report as its reader has it: in headless Chromium, where there is one; its figures and pictures
against the log, scikit-learn and numpy.
"""

import base64
import html
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import chromium
import forked
import numpy as np
import pytest
import shallow
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from test_finetune import config as finetune_config
from test_train import config

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.loader import EvalLoader
from ssl_xcit.data.views import EvalView
from ssl_xcit.dino import train
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.verdict import verdict
from ssl_xcit.evaluation.config import KnnConfig
from ssl_xcit.evaluation.knn import evaluate_knn
from ssl_xcit.evaluation.subject import checkpoint_subject
from ssl_xcit.finetune.train import finetune
from ssl_xcit.report import charts
from ssl_xcit.report.charts import Chart, Series, thinned, ticks
from ssl_xcit.report.curves import curves
from ssl_xcit.report.gather import find_results, write_report
from ssl_xcit.report.pictures import seen
from ssl_xcit.runtime.config import read_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training.metrics import read_metrics

EVIL = 'a<b>&"c'  # what a folder may be called


@pytest.fixture(scope="module", autouse=True)
def _shallow_networks():
    with shallow.networks():
        yield


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory) -> Path:
    """A finished run of 8 steps with a probe and a k-NN evaluation."""
    out = tmp_path_factory.mktemp("runs") / EVIL
    probe = {"every": 1, "probe_train": photos, "probe_test": photos, "probe_k": 5}
    small = {"probe_resize": 48, "probe_crop": 48}
    train.train(config(photos, out, epochs=2, **probe, **small))
    source = {"checkpoint": str(out), "train": str(photos), "test": str(photos)}
    evaluate_knn(KnnConfig(**source, k=(3,), resize=48, crop=48, out=str(out / "eval/knn.json")))
    return out


@pytest.fixture(scope="module")
def report(run) -> Path:
    """Its report."""
    return write_report(run, device="cpu")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window."""
    if chromium.CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian's package chromium)")
    page = chromium.Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


def figures(text: str) -> dict[str, dict]:
    """The charts of a page by title: {"last": what is read off, "lines": [...]}"""
    found = {}
    for figure in re.findall(r'<figure class="chart">.*?</figure>', text, re.DOTALL):
        title = html.unescape(re.search("<h4>(.*?)</h4>", figure)[1])
        lines = json.loads(html.unescape(re.search('data-lines="(.*?)"', figure)[1]))
        found[title] = {"lines": lines, "last": re.findall("<b>(.*?)</b>", figure), "svg": figure}
    return found


# In the browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1600])
def test_it_opens_without_complaint_network_or_sideways_scrolling(report, browser, width, scheme):
    browser.open(report, width, 900, scheme)
    assert browser.complaints == []
    assert browser.requests == [report.absolute().as_uri()]
    size = "[document.documentElement.scrollWidth, innerWidth]"
    assert browser.run(size) == [width, width]
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.run(broken) == 0
    assert browser.run("document.images.length") > 50
    assert browser.run("[...document.images].every(image => image.alt)")


def contrast(colours: list[str]) -> float:
    """WCAG 2's ratio of two colours as a browser computes them, "rgb(1, 2, 3)"."""
    light = []
    for colour in colours:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible_in_light_and_in_dark(report, browser, scheme):
    browser.open(report, 1200, 900, scheme)
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (contrast([paper, "rgb(0, 0, 0)"]) > 10) == (scheme == "light")
    texts = browser.run(
        """[...new Set([...document.querySelectorAll("body *")].filter(e => [...e.childNodes].some(
        n => n.nodeType == 3 && n.data.trim())).map(e => getComputedStyle(e)[
        e instanceof SVGElement ? "fill" : "color"]))]"""
    )
    assert len(texts) >= 3
    assert min(contrast([paper, colour]) for colour in texts) >= 4.5


def test_a_pointer_reads_values_off_a_chart(run, report, browser):
    browser.open(report, 1200, 900)
    losses = [row["train/loss"] for row in read_metrics(run / "metrics.jsonl")]
    shown = 'document.querySelector(".chart .readout").textContent'
    before = browser.run(shown)
    assert before == f"{losses[-1]:.4g}step 8"
    place = """(() => { const svg = document.querySelector(".chart svg");
        svg.scrollIntoView({block: "center"}); const box = svg.getBoundingClientRect();
        const x = JSON.parse(svg.dataset.lines)[0].x[2];
        return [box.left + x / svg.viewBox.baseVal.width * box.width, box.top + 30]; })()"""
    x, y = browser.run(place)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert browser.run(shown) == f"{losses[2]:.4g}step 3"
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.run(shown) == before
    assert browser.complaints == []


# The page


def test_the_page_is_one_file_that_asks_for_nothing(report):
    text = report.read_text()
    assert len(text) < 5_000_000
    assert (
        re.findall(r"(?:https?:|url\(|@import|<link (?!rel=\"icon\" href=\"data:,\"))", text) == []
    )
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(source.startswith("data:") for source in sources)
    assert [path.name for path in report.parent.glob("report*")] == ["report.html"]


def test_whatever_things_are_called_is_escaped(report):
    text = report.read_text()
    assert EVIL not in text
    assert f"<h1>{html.escape(EVIL)}</h1>" in text


def test_the_verdict_stands_at_the_top_in_words(run, report):
    found = verdict(
        read_metrics(run / "metrics.jsonl"), read_config(TrainConfig, run / "config.yaml")
    )
    text = html.unescape(report.read_text())
    top = text[: text.index("<h2>")]
    assert found.name in top.lower()
    for words in (found.sentence[1:], found.cause, found.advice):
        assert words in top
    assert "finished" in top
    assert "epoch 2 of 2" in top


def test_the_curves_are_those_of_the_log(run, report):
    rows, found = read_metrics(run / "metrics.jsonl"), figures(report.read_text())
    expected = {"Loss": "train/loss", "Gradient norm": "train/grad_norm"}
    expected |= {"Learning rate": "schedule/lr", "Speed": "speed/images_per_sec"}
    expected |= {"Feature spread": "health/feature_std"}
    for title, key in expected.items():
        values = [row[key] for row in rows]
        (line,) = found[title]["lines"]
        assert line["step"] == [row["step"] + 1 for row in rows]
        # Places on the drawing are the values and steps, scaled, up on the screen being less
        assert np.corrcoef(line["y"], values)[0, 1] == pytest.approx(-1, abs=1e-3)
        assert np.corrcoef(line["x"], line["step"])[0, 1] == pytest.approx(1, abs=1e-6)
        read = [float(text.replace(",", "")) for text in line["text"]]
        assert read == pytest.approx(values, rel=1e-2)
    assert len(found["k-NN accuracy"]["lines"]) == 2
    assert len(found["Entropy / ln K"]["lines"]) == 2
    assert f"ln K = {math.log(32):.2f}" in found["Loss"]["svg"]


def test_evaluations_in_the_run_folder_and_elsewhere_are_listed(run, report, tmp_path):
    result = json.loads((run / "eval/knn.json").read_text())
    row = result["accuracy"][0]
    (cells,) = re.findall(r"<tr title=.*?</tr>", report.read_text())
    for text in ("k-NN, k = 3", "teacher, step 8", f">{row['top1']:.2f}<", f">{row['top5']:.2f}<"):
        assert text in cells
    linear = {key: result[key] for key in ("versions", "test", "source", "checkpoint", "step")}
    chosen = {"top1": 61.25, "top5": 99.0, "selected": {"features": "cls+patch"}}
    (tmp_path / "lin").mkdir()
    (tmp_path / "lin/result.json").write_text(json.dumps(linear | {"fast": chosen}))
    (tmp_path / "lin/linear_run.json").write_text('{"epochs": 3}')
    (found,) = find_results(run, [tmp_path], asked=True)
    assert found[:4] == ("linear probe, fast", "network, step 8", "cls+patch", 61.25)
    assert find_results(tmp_path, [run / "eval"]).__next__().network == f"teacher, {EVIL}, step 8"
    with pytest.raises(UserError, match="found none"):
        list(find_results(run, [tmp_path / "nothing"], asked=True))


def test_every_setting_and_what_is_not_default_is_shown(report):
    text = report.read_text()
    settings = dict(re.findall(r"<dt>(\w+)</dt><dd(.*?)</dd>", text))
    assert settings["out_dim"] == ' class="own">32'
    assert settings["center_momentum"] == ">0.9"
    assert {"momentum_teacher", "clip_grad", "probe_k"} <= settings.keys()
    assert torch.__version__ in text


# Pictures


def test_neighbours_are_those_of_scikit_learn(run, photos):
    shown = seen(run, read_config(TrainConfig, run / "config.yaml"), "cpu")
    subject, beton = checkpoint_subject(run), Beton(photos)
    loader = EvalLoader(beton, EvalView(48, 48), 48)
    mean, std = (torch.tensor(values)[:, None, None] for values in (subject.mean, subject.std))
    (images, labels, _) = next(iter(loader))
    with torch.no_grad():
        features = subject.backbone.eval()((images / 255 - mean) / std).double().numpy()
    asked = [int(re.search(r"\d+$", query[0].alt)[0]) for query in shown.queries]
    assert len(asked) == 6
    known = np.setdiff1d(np.arange(48), asked)
    assert shown.searched == len(known)
    search = NearestNeighbors(n_neighbors=5, metric="cosine").fit(features[known])
    distances, places = search.kneighbors(features[asked])
    names = beton.class_names
    for query, row, far, near in zip(shown.queries, asked, distances, known[places], strict=True):
        assert query[0].caption == names[labels[row]]
        for shot, cosine, i in zip(query[1:], 1 - far, near, strict=True):
            assert shot.alt == f"{names[labels[i]]} {i}, cosine {cosine:.3f}"
            assert shot.same == (labels[i] == labels[row]).item()
            np.testing.assert_array_equal(np.asarray(shot.image), beton.decode(int(i)))
    assert {shot.same for query in shown.queries for shot in query[1:]} == {True, False}


def test_the_pictures_of_the_page_are_the_images(run, report, photos):
    text = report.read_text()
    address = r'<img[^>]*src="data:image/\w+;base64,([^"]+)"[^>]*alt="([^"]*)"'
    pictures = {alt: base64.b64decode(data) for data, alt in re.findall(address, text)}
    beton = Beton(photos)
    alts = [alt for alt in pictures if re.fullmatch(r"stored image \d+", alt)]
    assert len(alts) == 4
    for alt in alts:
        with Image.open(io.BytesIO(pictures[alt])) as picture:
            difference = np.asarray(picture, float) - beton.decode(int(alt.split()[-1]))
        assert np.abs(difference).mean() < 6  # JPEG's own
    assert sum("head 4" in alt for alt in re.findall('alt="(.*?)"', text)) == 6


# Runs that lack something


def test_a_run_that_has_not_saved_or_logged_yet_has_a_page_that_says_so(run, tmp_path, browser):
    young = tmp_path / "young"
    young.mkdir()
    for name in ("config.yaml", "run.json", "environment.json"):
        shutil.copy(run / name, young)
    text = write_report(young, device="cpu").read_text()
    assert "Nothing has been logged yet" in text
    assert "holds no complete checkpoint" in text
    assert 'class="name"' not in text
    assert text.count("<img") > 10  # the views need no network
    browser.open(young / "report.html", 360, 800)
    assert browser.complaints == []
    shutil.copy(run / "metrics.jsonl", young)
    assert "Nothing has been logged" not in write_report(young, device="cpu").read_text()


def test_a_run_whose_images_are_gone_has_a_page_without_pictures(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved, symlinks=True)
    described = moved / "config.yaml"
    lost = re.sub(r"\S+\.beton", str(tmp_path / "lost.beton"), described.read_text())
    described.write_text(lost)
    text = write_report(moved, device="cpu").read_text()
    assert text.count("lost.beton: expected a .beton file, found none") == 2
    assert "<img" not in text


def test_a_fine_tuning_has_a_report_too(photos, tmp_path):
    finetune(finetune_config(photos, tmp_path / "ft", epochs=1))
    text = write_report(tmp_path / "ft", device="cpu").read_text()
    assert "Test accuracy" in figures(text)
    assert "What it learns from" not in text
    assert 'class="name"' not in text  # a verdict is about pretraining


def test_what_is_no_run_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "ssl_xcit", "report", str(tmp_path)]
    done = forked.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "is not a run folder" in done.stderr


# Curves and charts


def test_rows_of_older_versions_have_entropies_too():
    rows = [{"step": k, "train/loss": 3.0, "health/teacher_entropy": 1.0 + k} for k in range(3)]
    entropy = next(c for c in curves(rows, 100)["What it learns"] if c.title == "Entropy / ln K")
    assert [a.label for a in entropy.series] == ["teacher"]
    expected = [(1 + k, (1 + k) / math.log(100)) for k in range(3)]
    np.testing.assert_allclose(entropy.series[0].points, expected)


def test_keys_that_nobody_knows_have_a_chart_and_absent_ones_none():
    rows = [{"step": 9, "epoch": 0, "progress": 0.1, "train/loss": 3.0, "health/novel": 0.5}]
    found = curves(rows, None)
    assert [c.title for group in found.values() for c in group] == ["Loss", "health/novel"]


def test_a_value_that_was_not_finite_is_a_gap():
    points = [(1, 2.0), (2, 3.0), (3, None), (4, 1.0), (5, 2.0)]
    text = charts.chart_html(Chart("Loss", series=[Series("", points)]))
    assert re.search(' d="(.*?)"', text)[1].count("M") == 2
    never = charts.chart_html(Chart("Loss", series=[Series("", [(1, None)])]))
    assert "not finite" in never


def test_long_runs_are_thinned_to_means_and_ranges():
    generator = np.random.default_rng(0)
    values = generator.normal(size=10_007)
    line = thinned(list(enumerate(values.tolist())))
    size = 42
    groups = [values[k : k + size] for k in range(0, len(values), size)]
    assert len(line) == len(groups) == 239
    np.testing.assert_allclose([point.value for point in line], [g.mean() for g in groups])
    assert [point[2:] for point in line] == [(g.min(), g.max()) for g in groups]
    assert line[-1].step == 10_006
    few = [(0, 1.0), (1, None)]
    assert thinned(few) == [(0, 1.0, 1.0, 1.0), (1, None, None, None)]
    text = charts.chart_html(Chart("Loss", series=[Series("", list(enumerate(values.tolist())))]))
    assert "their range" in text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (2.7, 7.1, [4, 6]),
        (0.9896, 1.0004, [0.99, 0.995, 1.0]),
        (-3e-5, 5.2e-4, [0, 2e-4, 4e-4]),
    ],
)
def test_ticks_are_round_numbers_within(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.9440, "2.944"), (12345.6, "12,346"), (4e-5, "4e-5"), (2.25e-4, "2.25e-4")],
)
def test_numbers_are_short(value, text):
    assert charts.number(value) == text
    assert charts.number(0.784, percent=True) == "78.4 %"
