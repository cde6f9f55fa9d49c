"""The style sheet and the script of a report, see `ssl_xcit.report.page`.

System fonts, light or dark as the reader's system is, from phones to wide screens and print. The
script shows the values under the pointer; the page is complete without it.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: light-dark(#fff, #151618); --ink: light-dark(#1c1d1f, #e9e9e7);
  --soft: light-dark(#5b5e64, #a4a7ad); --rule: light-dark(#dddee0, #34373c);
  --wash: light-dark(#f4f4f2, #1e2023);
  --s0: light-dark(#1a5fb4, #82b4ff); --s1: light-dark(#b8500f, #f2a56b);
  --good: light-dark(#17703c, #74d19b); --bad: light-dark(#b3261e, #ff9188);
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 78rem; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 3rem);
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
h1, h2, h3, h4, p, dl, dd, figure { margin: 0; }
h1, h2 { font-size: 1.375rem; font-weight: 650; line-height: 1.25; }
h2 { margin-bottom: .35rem; }
h3 { font-size: 1rem; font-weight: 650; margin: 1.75rem 0 .75rem; }
h4 { font-size: .9375rem; font-weight: 600; color: var(--ink); }
code, pre { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: .875em; }
.soft, .note, .lead, .facts, dt, figcaption, footer { color: var(--soft); }
.numbers dt, .settings, .settings h3, .places, footer { font-size: .875rem; }
.note, .readout, .gallery figcaption { font-size: .8125rem; line-height: 1.4; }
.lead { max-width: 44rem; margin-bottom: 1.25rem; }
section { margin-top: clamp(2.25rem, 5vw, 3.5rem); padding-top: 1.25rem;
  border-top: 1px solid var(--rule); }
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; margin-top: .35rem; }
.numbers, .charts, .gallery, .places { display: grid; gap: 2rem 2.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); }

.verdict { border-top: 0; padding-top: 0; margin-top: clamp(1.75rem, 4vw, 2.75rem); }
.verdict .name { font-size: clamp(2.25rem, 7vw, 3.75rem); font-weight: 680; line-height: 1.08; }
.verdict .sentence { font-size: 1.1875rem; max-width: 46rem; margin-top: .75rem; }
.good .name { color: var(--good); } .bad .name { color: var(--bad); }
.verdict dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem;
  max-width: 46rem; margin-top: 1.25rem; }
.numbers { --least: 8.5rem; margin-top: clamp(1.75rem, 4vw, 2.5rem); }
.numbers div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.numbers dd { font-size: 1.625rem; font-weight: 600; line-height: 1.25; }

.charts { --least: 20.5rem; }
.s0 { --line: var(--s0); } .s1 { --line: var(--s1); }
.chart figcaption, .readout { display: flex; flex-wrap: wrap; justify-content: space-between;
  align-items: baseline; gap: 0 .85rem; }
.readout b { color: var(--ink); font-weight: 600; }
.readout i { display: inline-block; width: .75rem; height: .1875rem; margin-right: .3rem;
  vertical-align: .22rem; background: var(--line); }
svg { display: block; width: 100%; margin: .35rem 0 .25rem; touch-action: pan-y;
  overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); }
svg .y, svg text.level { text-anchor: end; }
svg text.level { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
svg .frame { fill: none; }
svg .grid { stroke: var(--rule); }
svg .floor, svg .at, svg line.level { stroke: var(--soft); }
svg line.level { stroke-dasharray: 3 3; }
svg .line { fill: none; stroke: var(--line); stroke-width: 1.75; stroke-linejoin: round; }
svg .band { fill: var(--line); opacity: .18; }
svg .dot { fill: var(--line); }

img { display: block; width: 100%; height: auto; background: var(--wash); }
img.pixels { image-rendering: pixelated; }
.gallery { --least: 31rem; }
.gallery.wide { --least: 100%; }
.gallery figcaption { margin: .25rem 0; }
.row { display: grid; gap: .6rem .5rem; align-items: start;
  grid-template-columns: repeat(var(--across), minmax(0, 1fr)); }
.row :first-child figcaption { color: var(--ink); font-weight: 600; }
.square img { aspect-ratio: 1; object-fit: cover; }
.other img { outline: 2px solid var(--bad); outline-offset: -2px; }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-end; }
.strip figure { max-width: 100%; width: calc(6.5rem * var(--width)); }

table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th { text-align: left; font-weight: 600; }
th, td { padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: baseline; }
.figure { text-align: right; padding: .4rem 0 .4rem 1rem; white-space: nowrap; }
.best { font-weight: 600; }

.settings { columns: 21rem; column-gap: 2.25rem; }
.settings div { break-inside: avoid; margin-bottom: 1.25rem; }
.settings h3 { margin: 0 0 .25rem; }
.settings dl { display: grid; gap: 0 .75rem;
  grid-template-columns: minmax(0, 11rem) minmax(0, 1fr); }
.settings .own { font-weight: 650; }
.places { --least: 11rem; gap: .75rem 1.5rem; }
pre { margin: 0 0 1.25rem; white-space: pre-wrap; }
pre span { white-space: nowrap; }
footer { margin-top: 3rem; }

@media (max-width: 34rem) {
  .row { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  th, td, .figure { padding: .4rem .25rem .4rem 0; }
  .where { display: none; }
  .verdict dl { grid-template-columns: 1fr; gap: 0; }
  .verdict dt { margin-top: .75rem; }
}
@media print {
  :root { color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt;
    -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  figure, .row, .strip, tr, .settings div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .charts { grid-template-columns: repeat(2, 1fr); }
}
"""

SCRIPT = """
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg"), lines = JSON.parse(svg.dataset.lines);
  const values = [...chart.querySelectorAll(".readout b")], at = chart.querySelector(".at");
  const last = [...values, at].map(element => element.textContent);
  svg.insertAdjacentHTML("beforeend", "<g></g>");
  const marks = svg.lastElementChild, frame = svg.querySelector(".frame").getBBox();
  const read = event => {
    const size = svg.getBoundingClientRect();
    const x = (event.clientX - size.left) / size.width * svg.viewBox.baseVal.width;
    let drawn = "";
    lines.forEach((line, k) => {
      if (!line.x.length) return;
      const i = line.x.reduce((best, place, j) =>
        Math.abs(place - x) < Math.abs(line.x[best] - x) ? j : best, 0);
      values[k].textContent = line.text[i];
      at.textContent = "step " + line.step[i].toLocaleString("en");
      drawn += `<line class="at" x1="${line.x[i]}" x2="${line.x[i]}" y1="${frame.y}"
        y2="${frame.y + frame.height}"/><circle class="dot s${k}" r="3.5" cx="${line.x[i]}"
        cy="${line.y[i]}"/>`;
    });
    marks.innerHTML = drawn;
  };
  svg.addEventListener("pointermove", read);
  svg.addEventListener("pointerdown", read);
  svg.addEventListener("pointerleave", () => {
    marks.innerHTML = "";
    [...values, at].forEach((element, i) => { element.textContent = last[i]; });
  });
}
"""
